"""BlockEvents: what a router hears is what is cached, whatever was called, interrupted or refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from flatradix import Block, BlockEvents, PrefixCache, RadixTree
from flatradix.events.blocks import block_hashes
from flatradix.inspect.nodes import nodes_of
from flatradix.layout import numbers
from tests.support.depth import cuts
from tests.support.devices import interpreted
from tests.support.interrupts import bytecodes, fails_at, interrupt_at, skip_if_slow


class Router:
    """What a router knows. Each event must fit what it knows already, unless it was told before."""

    def __init__(self, again: bool = False) -> None:
        """again: whether an event may come a second time."""
        self.blocks: dict[Any, Block] = {}
        self.again = again
        self.calls: list[tuple[str, list[Any]]] = []

    def stored(self, blocks: list[Block]) -> None:
        assert blocks
        self.calls.append(("stored", [block.hash for block in blocks]))
        for block in blocks:
            assert self.again or block.hash not in self.blocks
            assert block.parent_hash is None or block.parent_hash in self.blocks
            assert block.tokens.dtype == np.int32
            self.blocks[block.hash] = block

    def removed(self, hashes: list[Any]) -> None:
        assert hashes
        self.calls.append(("removed", hashes))
        for own in hashes:
            assert self.again or own in self.blocks
            assert self.again or all(block.parent_hash != own for block in self.blocks.values())
            self.blocks.pop(own, None)

    def follow(self, tree: Any, size: int | None = None, **options: Any) -> BlockEvents:
        return BlockEvents(tree, size, on_stored=self.stored, on_removed=self.removed, **options)


def plain_hashes(namespace: Any, path: tuple[Any, ...], size: int) -> list[int]:
    """Return the hashes of all blocks of a key, as the documentation defines them. path: tokens, or pairs of tokens."""
    tag = {type(None): b"n", str: b"s", bytes: b"b", int: b"i"}[type(namespace)]
    if isinstance(namespace, str):
        namespace = namespace.encode()
    elif isinstance(namespace, int):
        namespace = namespace.to_bytes(8, "little", signed=True)
    chain = hashlib.blake2b(tag + (namespace or b""), digest_size=8).digest()
    hashes = []
    for at in range(0, len(path) - size + 1, size):
        units = path[at : at + size]
        tokens = [unit[0] for unit in units] + [units[-1][1]] if isinstance(units[0], tuple) else list(units)
        chain = hashlib.blake2b(chain + b"".join(t.to_bytes(4, "little") for t in tokens), digest_size=8).digest()
        hashes.append(int.from_bytes(chain, "little"))
    return hashes


def cached(tree: RadixTree, size: int) -> set[int]:
    """Return the hashes of all full blocks on all paths of a tree."""
    return {
        own
        for node in nodes_of(tree.content())
        if not node.dropped
        for own in plain_hashes(node.namespace, node.path, size)
    }


def check_late(events: BlockEvents, router: Router) -> None:
    """Check that a router that joins late, by a dump, knows what one knows that was there from the beginning."""
    late = Router()
    blocks = events.dump()
    if blocks:
        late.stored(blocks)
    assert late.blocks.keys() == router.blocks.keys()
    for own, block in late.blocks.items():
        before = router.blocks[own]
        assert (block.parent_hash, block.namespace) == (before.parent_hash, before.namespace)
        assert block.tokens.tolist() == before.tokens.tolist()


class Program:
    """Random calls of a tree, with routers that follow blocks of two sizes."""

    def __init__(self, device: str, seed: int, evict_by: str) -> None:
        self.random = random = Random(seed)
        page = random.choice([1, 2, 3])
        self.bigram = random.random() < 0.3
        self.tree = RadixTree(
            random.choice([None, 60 * page]), page, device, evict_by=evict_by, bigram=self.bigram,
            policy=random.choice(["lru", "lfu"]),
        )  # fmt: skip
        self.page = page
        self.sizes = [page, page * random.choice([2, 3, 4])]
        self.routers = [Router() for _ in self.sizes]
        self.events = [router.follow(self.tree, size) for router, size in zip(self.routers, self.sizes, strict=True)]
        self.locked: list[Any] = []

    def keys(self) -> tuple[list[list[int]], list[Any]]:
        random = self.random
        keys = [random.choices((1, 2), k=random.randint(0, 9 * self.page)) for _ in range(random.randint(1, 3))]
        return keys, [random.choice([None, "a", b"a", 1]) for _ in keys]

    def step(self) -> None:
        tree, random = self.tree, self.random
        act = random.choice(
            ["insert", "insert", "insert", "evict", "evict", "lock", "unlock", "split", "drop", "other"]
        )
        keys, names = self.keys()
        if act == "insert":
            tree.evict(max(0, sum(map(len, keys)) - (60 * self.page - tree.total_tokens)))
            if tree.total_tokens + sum(map(len, keys)) <= 60 * self.page:
                tree.insert(keys, [list(range(len(one))) for one in keys], namespace=names)
        elif act == "evict":
            tree.evict(random.randint(0, 20))
        elif act == "lock":
            self.locked.append(tree.match(keys, namespace=names, lock=True))
        elif act == "unlock" and self.locked:
            tree.unlock(self.locked.pop(random.randrange(len(self.locked))))
        elif act == "split":
            tree.match(keys, namespace=names, split=True)
        elif act == "drop" and random.random() < 0.5:
            places = tree.match(keys, namespace=names)
            if places.lengths.min() > 0:
                tree.drop(places)
        elif act == "other":
            tree.compact()
            if random.random() < 0.1:
                tree.reset()
                self.locked.clear()

    def compare(self) -> None:
        for events, router, size in zip(self.events, self.routers, self.sizes, strict=True):
            events.update()
            assert router.blocks.keys() == cached(self.tree, size)
            assert len(events) == len(router.blocks)


@pytest.mark.parametrize("evict_by", ["node", "page"])
@pytest.mark.parametrize("seed", range(25))
def test_random_programs(seed: int, evict_by: str, device: str) -> None:
    if interpreted(device) and seed > 1:
        pytest.skip("kernels in Python: two programs")
    program = Program(device, seed, evict_by)
    for _ in range(8 if interpreted(device) else 80):
        for _ in range(program.random.randint(1, 4)):
            program.step()
        program.compare()
        if program.random.random() < 0.1:
            for events, router in zip(program.events, program.routers, strict=True):
                check_late(events, router)
    program.tree.reset()
    program.compare()
    assert not any(router.blocks for router in program.routers)


@pytest.mark.parametrize("namespace", [None, "a\u00e4", b"a", -1])
def test_a_router_can_hash_prompts(namespace: Any) -> None:
    prompt = [1, 2, 3, 2**31 - 1, 5, 6, 7]
    for size in (1, 2, 3, 8):
        assert block_hashes(prompt, size, namespace) == plain_hashes(namespace, tuple(prompt), size)
        pairs = tuple(pairwise(prompt))
        assert block_hashes(prompt, size, namespace, bigram=True) == plain_hashes(namespace, pairs, size)
    assert block_hashes([], 2) == []


def test_a_block_may_lie_on_several_nodes(device: str) -> None:
    router = Router()
    tree = RadixTree(64, 1, device, evict_by="page")
    events = router.follow(tree, 4)
    tree.insert([1, 2, 3], [0, 1, 2], namespace="a")
    events.update()
    assert router.calls == []
    tree.insert([1, 2, 3, 4, 5], [0, 1, 2, 3, 4], namespace="a")
    tree.insert([1, 2, 9], [0, 1, 5], namespace="a")
    events.update()
    first, *_ = plain_hashes("a", (1, 2, 3, 4), 4)
    assert router.calls == [("stored", [first])]
    block = router.blocks[first]
    assert (block.parent_hash, block.tokens.tolist(), block.namespace) == (None, [1, 2, 3, 4], "a")
    tree.match([1, 2, 9], namespace="a")
    tree.evict(1)
    events.update()
    assert len(router.calls) == 1  # token 5 is in no full block
    tree.evict(1)
    events.update()
    assert router.calls[1:] == [("removed", [first])]
    events.update()
    assert len(router.calls) == 2


def test_what_comes_and_goes_between_updates_is_not_told(device: str) -> None:
    router = Router()
    tree = RadixTree(64, 2, device)
    events = router.follow(tree)
    tree.insert([1, 1, 2, 2], range(4))
    tree.evict(100)
    events.update()
    assert router.calls == []
    tree.insert([1, 1, 2, 2], range(4))
    events.update()
    tree.evict(100)
    tree.insert([1, 1, 2, 2], range(4))
    tree.insert([1, 1, 3, 3], [0, 1, 8, 9])
    events.update()
    assert [name for name, _ in router.calls] == ["stored", "stored"]
    assert router.calls[1][1] == plain_hashes(None, (1, 1, 3, 3), 2)[1:]


def test_hashes_of_the_callers_choice(device: str) -> None:
    """Bytes, and a root that ignores namespaces: equal prefixes of two namespaces then have one hash, told once."""

    def hash_of(parent: Any, tokens: np.ndarray) -> bytes:
        return bytes(parent) + bytes(tokens.tolist())

    router = Router()
    tree = RadixTree(64, 1, device)
    events = router.follow(tree, 2, hash=hash_of, root=lambda namespace: b"root")
    tree.insert([[1, 2, 3, 4], [1, 2]], [[0, 1, 2, 3], [4, 5]], namespace=["a", "b"])
    events.update()
    assert router.calls == [("stored", [b"root\1\2", b"root\1\2\3\4"])] or set(router.blocks) == {
        b"root\1\2",
        b"root\1\2\3\4",
    }
    assert len(events.dump()) == 2
    tree.match([1, 2], namespace="b")
    tree.evict(4)
    events.update()
    assert router.calls[-1] == ("removed", [b"root\1\2\3\4"])
    tree.evict(2)
    events.update()
    assert not router.blocks


def test_a_prefix_cache_is_followed(where: dict[str, str]) -> None:
    router, random = Router(), Random(3)
    cache = PrefixCache(24, 2, **where)
    events = router.follow(cache, 4)
    for _ in range(6 if interpreted(where["device"]) else 40):
        prompts = [random.choices((1, 2), k=random.randint(1, 10)) for _ in range(2)]
        running = cache.begin(prompts, [None, "a"]).only_running()
        cache.commit(running)
        events.update()
        assert router.blocks.keys() == cached(cache.tree, 4)
        cache.finish(running)
    check_late(events, router)
    cache.reset()
    events.update()
    assert not router.blocks


def test_a_loaded_tree_is_told_from_the_beginning(device: str, tmp_path: Any) -> None:
    tree = RadixTree(64, 2, device)
    tree.insert([[1, 1, 2, 2], [1, 1, 3, 3]], [range(4), range(4, 8)], namespace=b"x")
    tree.save(tmp_path / "tree")
    router = Router()
    events = router.follow(loaded := RadixTree.load(tmp_path / "tree", device))
    events.update()
    assert router.blocks.keys() == cached(tree, 2)
    loaded.evict(2)
    loaded.insert([5, 5], [8, 9])
    events.update()
    assert router.blocks.keys() == cached(loaded, 2)


def test_a_function_that_raises_is_told_again_and_before_anything_else(device: str) -> None:
    router = Router()
    fails = ["stored", "removed"]
    tree = RadixTree(64, 2, device)

    def or_fail(name: str, tell: Callable[[Any], None], blocks: Any) -> None:
        if name in fails:
            fails.remove(name)
            raise OSError(name)
        tell(blocks)

    events = BlockEvents(
        tree,
        on_stored=partial(or_fail, "stored", router.stored),
        on_removed=partial(or_fail, "removed", router.removed),
    )
    tree.insert([1, 1, 2, 2], range(4))
    with pytest.raises(OSError, match="stored"):
        events.update()
    tree.evict(100)
    with pytest.raises(OSError, match="removed"):
        events.update()
    assert [name for name, _ in router.calls] == ["stored"]
    tree.insert([7, 7], range(2))
    assert len(events.dump()) == 1
    assert [name for name, _ in router.calls] == ["stored", "removed", "stored"]
    assert router.blocks.keys() == cached(tree, 2)


def test_the_functions_may_use_the_tree_but_not_the_events(device: str) -> None:
    tree = RadixTree(64, 1, device)
    found: list[int] = []

    def stored(blocks: list[Block]) -> None:
        found.append(tree.match(blocks[-1].tokens, touch=False).length)
        with pytest.raises(RuntimeError, match="called from within another call"):
            events.update()

    events = BlockEvents(tree, 2, on_stored=stored, on_removed=lambda hashes: None)
    tree.insert([1, 2], [0, 1])
    events.update()
    assert found == [2]


def test_no_update_within_a_call_of_the_tree(device: str) -> None:
    router = Router()

    def told(*_: Any) -> None:
        with pytest.raises(RuntimeError, match="called from within another call"):
            events.update()
        router.calls.append(("evicted", []))

    tree = RadixTree(64, 1, device, on_evict=told)
    events = router.follow(tree)
    tree.insert([1], [0])
    events.update()
    tree.evict(1)
    events.update()
    assert [name for name, _ in router.calls] == ["stored", "evicted", "removed"]


def test_what_is_refused() -> None:
    tree = RadixTree(64, 4, "cpu")
    for size in (6, 2):
        with pytest.raises(ValueError, match=f"block_size {size} is no multiple of the page size 4"):
            Router().follow(tree, size)
    for size in (0, -4, 4.0, True):
        with pytest.raises(ValueError, match="block_size must be a positive integer"):
            Router().follow(tree, size)  # type: ignore[arg-type]
    tree.insert([1, 2, 3, 4], range(4))
    for value in (None, 1.5, np.uint64(1)):
        router = Router()
        events = router.follow(tree, hash=lambda parent, tokens, value=value: value)
        with pytest.raises(ValueError, match="the hash of a block must be an int, bytes or a str, not"):
            events.update()
        assert (len(events), router.calls) == (0, [])
    with pytest.raises(TypeError, match="neither pickled nor copied"):
        events.__reduce__()


class Scene:
    """A tree that has changed since its router last heard of it: blocks that came, went, were cut and were split."""

    def __init__(self, device: str) -> None:
        self.router = Router(again=True)
        self.tree = tree = RadixTree(64, 1, device, evict_by="page")
        self.events = self.router.follow(tree, 2)
        tree.insert([[1, 2, 3, 4, 5, 6], [9, 9], [8, 8, 8, 8]], [range(6), range(10, 12), range(20, 24)])
        self.events.update()
        tree.match([1, 2, 3, 4, 5, 6])
        tree.evict(4)
        tree.insert([[1, 2, 3, 7], [8, 8]], [range(4), range(2)], namespace=[None, "a"])


@pytest.mark.parametrize("name", ["update", "dump"])
def test_interrupted_at_many_bytecodes(name: str, device: str) -> None:
    """The next update tells what was not told, and at most one list again."""
    scene = Scene(device)
    total = bytecodes(getattr(scene.events, name))
    expected, calls = dict(scene.router.blocks), list(scene.router.calls)
    assert expected.keys() == cached(scene.tree, 2)
    for at in cuts(total, device, name):
        scene = Scene(device)
        interrupt_at(at, getattr(scene.events, name))
        if at % 4 == 0:
            interrupt_at(Random(at).randrange(total), scene.events.update)
        scene.events.update()
        assert scene.router.blocks.keys() == expected.keys(), at
        told = scene.router.calls
        assert [call for number, call in enumerate(told) if number == 0 or call != told[number - 1]] == calls, at
        scene.router.again = False
        scene.tree.evict(100)
        scene.events.update()
        assert not scene.router.blocks
        assert len(scene.events) == 0


def test_at_every_allocation(device: str) -> None:
    skip_if_slow(device)
    expected = cached(Scene(device).tree, 2)
    for at in range(1000):
        scene = Scene(device)
        failed = fails_at(at, scene.events.update)
        scene.events.update()
        assert scene.router.blocks.keys() == expected, at
        if not failed:
            break


def test_a_growing_tree_keeps_its_events(device: str) -> None:
    """A tree without max_tokens moves to larger arrays."""
    router = Router()
    tree = RadixTree(device=device)
    events = router.follow(tree, 64)
    for start in (0, 1000, 3000):
        tree.insert(torch.arange(start, start + 3000), range(3000))
        events.update()
        assert router.blocks.keys() == cached(tree, 64)


@pytest.mark.parametrize("changes", [numbers.EVENT_RING - 1, numbers.EVENT_RING, numbers.EVENT_RING + 1])
def test_as_many_changes_as_a_tree_remembers(changes: int) -> None:
    told: set[object] = set()
    tree = RadixTree(40_000, device="cpu")
    events = BlockEvents(
        tree,
        on_stored=lambda blocks: told.update(block.hash for block in blocks),
        on_removed=told.difference_update,
    )
    tree.insert([1_000_000], [0])
    events.update()
    tree.insert([[key] for key in range(changes - 2)], [[0]] * (changes - 2))
    tree.insert([1_000_000, 7], [0, 1])
    tree.insert([0, 7], [0, 1])
    events.update()
    assert len(told) == changes + 1
    assert told == cached(tree, 1)
    tree.evict(changes)
    events.update()
    assert told == cached(tree, 1)
    assert len(told) == 1


def test_parents_come_first_where_namespaces_share_hashes() -> None:
    told: list[Block] = []
    tree = RadixTree(100, device="cpu")
    events = BlockEvents(tree, 4, on_stored=told.extend, on_removed=lambda _: None, root=lambda _: 0)
    keys = [[1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9]]
    for key, name in zip(keys, "aab", strict=True):
        tree.insert(key, range(len(key)), namespace=name)
    events.update()
    known: set[object] = {0}
    for block in told:
        assert block.parent_hash in known | {None}
        known.add(block.hash)
    assert len(told) == 3
