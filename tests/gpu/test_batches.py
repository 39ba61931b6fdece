"""Batches that are hard for kernels: long shared prefixes, cuts and evictions everywhere, chains, long keys."""

from __future__ import annotations

import contextlib
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flatradix
from flatradix import CapacityError, PrefixCache, RadixTree
from flatradix.layout import numbers
from tests.support.depth import skip_unless_thorough
from tests.support.devices import interpreted, settled
from tests.support.inside import index_of
from tests.support.pairs import Pair, numbered, ragged, shared_prefixes, use


@pytest.mark.parametrize(("page", "bigram"), [(1, False), (2, False), (1, True), (16, False)])
def test_a_batch_of_shared_prefixes(cuda: str, page: int, bigram: bool) -> None:
    count = 18 if interpreted(cuda) else 1025
    use(Pair(cuda, 16384 * page, page, bigram=bigram), shared_prefixes(count, page=page))


def chains(count: int) -> dict[str, list[list[int]]]:
    longest = list(range(count))
    growing = [longest[: 1 + i] for i in range(count)]
    return {
        "each a page longer": growing,
        "each a page shorter": growing[::-1],
        "in no order": random.Random(1).sample(growing, count),
        "all equal": [longest] * count,
        "the last page differs": [[*longest, 1000 + i] for i in range(count)],
        "the first page differs": [[1000 + i, *longest[:5]] for i in range(count)],
        "pairs": [[*longest[: i // 2], 1000 + i] for i in range(count)],
        "one of two": [[*longest[: i % 7], i % 2] for i in range(count)],
    }


@pytest.mark.parametrize("kind", list(chains(1)))
def test_adversarial_batches(cuda: str, kind: str) -> None:
    count = 8 if interpreted(cuda) else 300
    use(Pair(cuda, 300 * count), chains(count)[kind])


def test_cuts_of_one_edge_everywhere(cuda: str) -> None:
    """One batch of locks, or of inserts, ends at every position of one long edge."""
    count = 12 if interpreted(cuda) else 300
    long = list(range(count))
    for cutting in ("lock", "insert"):
        pair = Pair(cuda, 4 * count)
        pair.insert([long], [long])
        prefixes = [long[: 1 + i * 7 % count] for i in range(count)] + [long[: count // 2]] * 3
        if cutting == "lock":
            places = pair.match(prefixes, touch=False)
            pair.on_each("lock", places)
            pair.compare()
            pair.on_each("unlock", places)
        else:
            pair.insert(prefixes, numbered(prefixes))
        pair.compare()
        pair.evict(count // 2)
        pair.compare()


def test_a_lock_names_what_it_locked(cuda: str) -> None:
    """The handle names the locked part even if an earlier lock cut the edge: the rest can go before the unlock."""
    tree = RadixTree(64, device=cuda)
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    first, second, third = tree.match([[1, 2]]), tree.match([1, 2]), tree.match([[1, 2], [1, 2]])
    for places in (first, second, third):
        tree.lock(places)
    assert tree.evict(100).slots.tolist() == [3, 4]
    for places in (first, second, third):
        settled(tree, lambda places=places: tree.unlock(places))
    assert tree.protected_tokens == 0
    tree.check()


def test_a_climb_believes_no_wrong_hint(cuda: str) -> None:
    """Locks climb by hints: the rows above a row when last seen. Cuts, evictions and new rows make hints wrong."""
    count = 14 if interpreted(cuda) else 70
    pair = Pair(cuda, 4 * count)
    key = list(range(count))
    pair.insert([key, [*key[:5], 99]], [key, key[:6]])
    for step in (3, 2, 1):
        pair.on_each("unlock", pair.match([key[:end] for end in range(1, count + 1, step)], lock=True))
        leaves = pair.match([key, key, key[: count // 2], [*key[:5], 99]])
        hints = index_of(pair.tree)._arrays.scratch.above
        rows = pair.tree.content().number(numbers.ROWS)
        rng = torch.Generator().manual_seed(step)
        for wrong in (torch.zeros(len(hints)), torch.randint(rows, hints.shape, generator=rng), None, None):
            if wrong is not None:
                hints.copy_(wrong)
            for what in ("lock", "unlock"):
                pair.on_each(what, leaves)
                pair.compare()
    pair.evict(count // 3)
    pair.insert([[7, *key]], [[count, *key]])
    pair.on_each("lock", pair.match([key, [7, *key], key[:3]]))
    pair.compare()


def test_many_keys_in_a_small_table(cuda: str) -> None:
    """Thousands of one-page keys: entries of the child table collide, with tombstones of evicted nodes between them."""
    size = 48 if interpreted(cuda) else 8192
    pair = Pair(cuda, size)
    rng = random.Random(3)
    for turn in range(3):
        keys = [[key] for key in rng.sample(range(4 * size), size // 2)]
        pair.evict(max(0, pair.host.total_tokens + len(keys) - size))
        pair.insert(keys, numbered(keys), namespace=["ab"[key[0] % 2] for key in keys])
        pair.match([[key] for key in range(0, 4 * size, 1 + 20 * interpreted(cuda))], namespace="a", touch=turn == 1)
        pair.compare()


@pytest.mark.parametrize("bits", [1, 32])
@pytest.mark.parametrize(("page", "bigram"), [(1, False), (2, False), (1, True)])
def test_groups_form_in_any_order(
    cuda: str, page: int, bigram: bool, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last key of a batch claims first. With tags of one bit, the claims of different groups collide."""
    if not interpreted():
        pytest.skip("a GPU takes its own order")
    from triton.runtime.interpreter import interpreter_builder

    from flatradix.kernels.gpu import claim

    set_grid_idx, tag_of = interpreter_builder.set_grid_idx, claim.tag_of
    tags: list[int] = []

    def last_first(x: int, y: int, z: int) -> None:
        set_grid_idx(interpreter_builder.grid_dim[0] - 1 - x, y, z)

    def few_tags(*arguments: Any) -> Any:
        tag = tag_of(*arguments) & (2**bits - 1)
        tags.append(int(tag.handle.data.item()))
        return tag

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", last_first)
    monkeypatch.setattr(claim, "tag_of", few_tags)
    pair = Pair(cuda, 500 * page, page, bigram=bigram)
    names = [None, "a", "b"]
    for seed in range(6):
        keys = shared_prefixes(9, seed, page)
        pair.insert(keys, numbered(keys), namespace=[names[query % 3] for query in range(9)] if seed % 2 else None)
        pair.compare()
        assert (index_of(pair.tree)._arrays.scratch.claims == -1).all()
    assert len(set(tags)) == 2 if bits == 1 else len(set(tags)) > 10


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_evictions_of_all_sizes(cuda: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree has more nodes than a bin, or a sample, of the selection holds; where kernels are interpreted, few."""
    monkeypatch.setattr(sys.modules["flatradix.kernels.gpu.evict"], "FEW_STEPS", 0)
    count = 20 if interpreted(cuda) else 60_000
    pair = Pair(cuda, 2 * count, policy=policy)
    rng = random.Random(9)
    keys = [[key] if key % 3 else [key, 1, key] for key in range(count)]
    pair.insert(keys, numbered(keys))
    for _ in range(2):
        pair.match(rng.sample(keys, count // 2))
    pair.insert(keys[::7], numbered(keys[::7]))
    for part in (0, 1, count // 500, count // 10, count // 3, count):
        pair.evict(part)
        pair.compare()
    pair.insert(keys[:5], numbered(keys[:5]))
    pair.evict(3)
    pair.compare()


@pytest.mark.parametrize("policy", ["lru", "fifo"])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_evictions_by_pages(cuda: str, policy: str, slot_dtype: torch.dtype) -> None:
    """Long and short nodes; the victims that lose only their last pages come first again, and are used again."""
    count, page = (9, 2) if interpreted(cuda) else (20_000, 16)
    pair = Pair(cuda, 6 * count * page, page, policy=policy, slot_dtype=slot_dtype, evict_by="page")
    rng = random.Random(10)
    keys = [[key % 7] * page + [key] * page * rng.randint(1, 4) for key in range(count)]
    pair.insert(keys, numbered(keys))
    for part in (1, 1, page + 1, count, 3 * page, count * page // 2):
        pair.evict(part)
        pair.compare()
        wants = pair.match(rng.sample(keys, 3), touch=False)
        pair.on_each("want", wants)
        pair.match(rng.sample(keys, count // 4))
        pair.insert(keys[:3], numbered(keys[:3]))
    pair.evict(pair.host.total_tokens - page)
    pair.compare()
    assert pair.host.total_tokens == page
    pair.evict(1)
    pair.compare()


def test_evictions_from_one_long_path(cuda: str) -> None:
    """All nodes have equal ticks, so only their depth decides the order."""
    count = 20 if interpreted(cuda) else 20_000
    pair = Pair(cuda, 2 * count)
    key = [token % 5 for token in range(count)]
    ends = pair.insert([key], numbered([key]))
    lengths = torch.arange(1, count + 1)
    for tree, end in zip((pair.host, pair.tree), ends, strict=True):
        places = SimpleNamespace(handles=end.handles.repeat(count), lengths=lengths.to(tree.device))
        tree.lock(places)
        tree.unlock(places)
    pair.match([key])
    pair.compare()
    assert pair.tree.num_nodes == count
    for part in (count // 4, 1, count // 10, count):
        pair.evict(part)
        pair.compare()


def test_long_keys(cuda: str) -> None:
    length = 3000 if interpreted(cuda) else 200_000
    pair = Pair(cuda, 4 * length, 16)
    key = [token % 1000 for token in range(length)]
    other = [*key[: length // 2], *key[: length // 4]]
    pair.insert([key, other], numbered([key, other]))
    for single in (key, other, key[: length // 3], other[:-20]):
        host, tree = pair.host.match(single, lock=True), pair.tree.match(single, lock=True)
        assert (tree.length, tree.lengths.tolist()) == (host.length, [host.length])
        assert torch.equal(pair.tree.slots(tree).values.cpu(), pair.host.slots(host).values)
    pair.compare()


def test_batches_that_outgrow_the_scratch(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.device import core

    sizes = (1024, 3000, 1025, 5)
    if interpreted(cuda):
        monkeypatch.setattr(core, "_SMALLEST_BATCH", 4)
        sizes = (4, 11, 5, 2)
    pair = Pair(cuda, 20_000)
    for seed, size in enumerate(sizes):
        keys = shared_prefixes(size, seed)
        pair.insert(keys, numbered(keys))
        places = pair.match(keys, lock=True)
        pair.compare()
        pair.on_each("unlock", places)
        pair.evict(50)
        pair.compare()


def test_calls_in_a_row_without_waiting(cuda: str) -> None:
    """Only evictions wait. Compactions happen when needed, and refused calls leave no trace, reported or not."""
    rounds, size = (6, 60) if interpreted(cuda) else (300, 600)
    pair = Pair(cuda, size, 2)
    host, tree = (drive(tree, random.Random(7), rounds) for tree in (pair.host, pair.tree))
    assert tree == host
    pair.compare()


def drive(tree: RadixTree, rng: random.Random, rounds: int) -> list[list[int]]:
    """Insert, match, lock and unlock, and sometimes evict; return the lengths or slots of all results."""
    results: list[Any] = []
    locked: list[Any] = []
    for turn in range(rounds):
        keys = shared_prefixes(5, turn // 2, page=2)
        try:
            results.append(tree.insert(keys, numbered(keys), namespace=rng.choice([None, "a"])))
        except CapacityError:
            results.append(SimpleNamespace(lengths=torch.full((len(keys),), -1)))
        results.append(tree.match(keys, touch=rng.random() < 0.5))
        locked.append(tree.match(keys[:3], lock=True))
        if len(locked) > 2:
            tree.unlock(locked.pop(0))
        if rng.random() < 0.4:
            with contextlib.suppress(CapacityError):
                tree.raise_pending()
            results.append(SimpleNamespace(lengths=tree.evict(tree.max_tokens // 3).slots))
    with contextlib.suppress(CapacityError):
        tree.raise_pending()
    return [result.lengths.tolist() for result in results]


class Launches:
    """Records the launched kernels, with the constants and argument widths that each is compiled for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from flatradix.kernels.gpu.launch import Kernel

        launch = Kernel.__call__
        self.seen: set[Any] = set()
        seen = self.seen

        def note(
            kernel: Any, bound: Any, programs: int, arguments: Any, constants: Any = (), wide: Any = (), *rest: Any
        ):
            seen.add((kernel, constants, wide))
            launch(kernel, bound, programs, arguments, constants, wide, *rest)

        patch.setattr(Kernel, "__call__", note)


def test_warm_up(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a warm-up, batches of up to 1023 queries compile nothing."""
    skip_unless_thorough(cuda)
    flatradix.warm_up(cuda, page_size=2, bigram=True)
    launches = Launches(monkeypatch)
    flatradix.warm_up(cuda)
    warm = set(launches.seen)
    tree = RadixTree(512, device=cuda)
    for count in (1, 8, 9, 33):
        keys = ragged([[key, 1, key] for key in range(count)], tree)
        places = tree.insert(keys, keys)
        tree.lock(places)
        tree.unlock(places)
        tree.unlock(tree.match(keys, lock=True))
        tree.raise_pending()
    assert launches.seen == warm


def test_warm_up_is_enough_for_a_prefix_cache(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a warm-up, a PrefixCache compiles nothing."""
    launches = Launches(monkeypatch)
    flatradix.warm_up(cuda, page_size=2)
    compiled = set(launches.seen)
    cache = PrefixCache(
        64, page_size=2, max_requests=4, max_length=16, kv_device="cpu" if interpreted(cuda) else cuda, device=cuda
    )
    prompts = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 7, 8, 9]]
    for names in (None, ["a", "b", "a"]):
        for batch in (prompts[:1], prompts):
            requests = cache.begin(batch, names[: len(batch)] if names else None)
            assert all(request.state == "running" for request in requests)
            cache.commit(requests[:1], 2)  # then the requests have committed different lengths
            cache.commit(requests)
            cache.extend(requests, 1)
            cache.finish(requests)
    cache.check()
    cache.reset()
    assert launches.seen == compiled
