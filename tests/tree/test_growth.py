"""Trees without `max_tokens`: their arrays grow. The state machines draw them, too."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flatradix import CapacityError, PrefixCache, RadixTree, Ragged, WaitingQueue
from flatradix.layout import growth
from flatradix.results import Places
from tests.support.depth import cuts
from tests.support.devices import interpreted, settled
from tests.support.inside import index_of
from tests.support.interrupts import bytecodes, fails_at, interrupt_at, skip_if_slow
from tests.support.pairs import numbered, shared_prefixes


@pytest.fixture(autouse=True)
def begin_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "FIRST_TOKENS", 4)


def capacity(tree: RadixTree) -> int:
    return index_of(tree).options.max_tokens


def key(number: int, length: int = 4) -> list[int]:
    return [number, *range(1, length)]


def test_a_tree_grows_by_doubling(device: str) -> None:
    tree = RadixTree(device=device)
    assert tree.max_tokens is None
    assert capacity(tree) == 4
    tree.insert(key(1), range(4))
    assert tree.evict(0).num_tokens == 0
    tree.insert([9], [4])
    assert capacity(tree) == 8
    tree.insert(key(2, 30), range(30))
    assert capacity(tree) == 64
    assert (tree.total_tokens, tree.num_nodes) == (35, 3)
    tree.check()
    assert repr(tree).startswith("RadixTree(35 tokens in 3 nodes, 0 locked")
    assert tree.evict(6).slots.tolist() == [0, 1, 2, 3, 4, *range(30)]
    tree.check()


def test_what_was_cached_before_needs_no_room_again(device: str) -> None:
    tree = RadixTree(device=device)
    for _ in range(8):
        tree.insert(key(1), range(4))
    tree.insert(key(1, 5), range(5))
    for _ in range(8):
        tree.insert([key(1, 5)] * 3, [range(5)] * 3)
    assert tree.total_tokens == 5
    assert capacity(tree) <= 8 * (1 + 3 * (device == "cuda"))  # the host of a GPU counts a whole batch as new
    tree.check()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"page_size": 4, "policy": "lfu"},
        {"bigram": True, "policy": "mru", "slot_device": "cpu"},
        {"policy": lambda nodes: nodes.length, "slot_dtype": torch.int64, "evict_by": "page"},
    ],
)
def test_equal_to_a_tree_that_is_large_enough(options: dict[str, Any], device: str) -> None:
    trees = [RadixTree(most, device=device, **options) for most in (None, 10_000)]
    keys = shared_prefixes(12 if interpreted(device) else 200, page=options.get("page_size", 1))
    for at in range(0, len(keys), 4):
        batch = keys[at : at + 4]
        names = ["a", "b", None, f"{at}"]
        results = [tree.insert(batch, numbered(batch), namespace=names) for tree in trees]
        for tree, result in zip(trees, results, strict=True):
            tree.lock(result)
        assert results[0].prefix_lengths.tolist() == results[1].prefix_lengths.tolist()
        trees[0].check()
        assert trees[0].digest() == trees[1].digest()
        if at % 8:
            for tree, result in zip(trees, results, strict=True):
                tree.unlock(result)
        found = [tree.evict(3) for tree in trees]
        assert found[0].slots.tolist() == found[1].slots.tolist()
    assert capacity(trees[0]) > 8


def test_places_locks_and_pins_stay(device: str) -> None:
    tree = RadixTree(device=device)
    inserted = tree.insert(key(1), range(4))
    locked = tree.match(key(1, 2), lock=True)
    pinned = tree.match(key(1), touch=False)
    tree.want(pinned)
    tree.insert(key(2, 50), range(10, 60))
    assert tree.slots(inserted).to_list() == tree.slots(pinned).to_list() == [[0, 1, 2, 3]]
    assert tree.alive(pinned).tolist() == [True]
    assert (tree.protected_tokens, tree.evictable_tokens) == (2, 52)
    assert tree.evict(1).slots.tolist() == list(range(10, 60))
    assert tree.evict(1).slots.tolist() == [2, 3]
    tree.unlock(locked)
    assert tree.evict(1).slots.tolist() == [0, 1]
    tree.check()


@pytest.mark.parametrize("keep", [False, True])
def test_a_queue_follows(keep: bool, device: str) -> None:
    tree = RadixTree(device=device)
    queue = WaitingQueue(tree, keep=keep)
    prompts = [key(1), key(2), key(3, 20), [77]]
    queue.add(prompts)
    assert queue.cached_lengths().tolist() == [0, 0, 0, 0]
    tree.insert(key(1, 3), range(3))
    assert queue.cached_lengths().tolist() == [3, 0, 0, 0]
    for number in range(4, 12):  # new rows before the queue looks again
        tree.insert(key(number), range(4))
    tree.insert(key(2), range(10, 14))
    tree.insert(key(3, 20), range(20, 40))
    assert queue.cached_lengths().tolist() == tree.match(prompts, touch=False).lengths.tolist() == [3, 4, 20, 0]
    assert queue.plan().ids.tolist() == [0, 1, 2, 3]
    if keep:
        assert tree.evict(1).slots.tolist() == [0, 1, 2, 3]  # of key 4: those before are wanted
        tree.evict(28)
        assert queue.cached_lengths().tolist() == [3, 4, 20, 0]
    tree.evict(1000)
    assert queue.cached_lengths().tolist() == [0, 0, 0, 0]
    tree.check()


def test_a_queue_that_is_dropped_leaves_no_wants(device: str) -> None:
    tree = RadixTree(device=device)
    queue = WaitingQueue(tree, keep=True)
    tree.insert(key(1), range(4))
    queue.add([key(1)])
    queue.cached_lengths()
    tree.insert(key(2, 30), range(10, 40))
    del queue
    assert tree.evict(1).slots.tolist() == [0, 1, 2, 3]
    tree.check()


def test_growth_in_inference_mode(device: str) -> None:
    tree = RadixTree(device=device, slot_device="cpu")
    with torch.inference_mode():
        tree.insert(key(1, 30), range(30))
    tree.insert(key(2), range(40, 44))
    assert tree.evict(1).num_tokens == 30
    tree.reset()
    tree.insert(key(2), range(40, 44))
    tree.check()


def test_more_namespaces_than_rows(device: str) -> None:
    tree = RadixTree(device=device)
    names = [f"tenant {number}" for number in range(20)]
    tree.insert([[1]] * 20, [[slot] for slot in range(20)], namespace=names)
    assert tree.slots(tree.match([[1]] * 20, names)).values.tolist() == list(range(20))
    assert tree.evict(19).num_tokens == 19
    tree.check()
    fixed = RadixTree(1000, device="cpu")
    fixed.insert([[1]] * 20, [[slot] for slot in range(20)], namespace=names)
    fixed.match([[1]] * 20, names)
    fixed.evict(19)
    assert tree.digest() == fixed.digest()


def test_files_and_copies_grow_on(device: str, tmp_path: Path) -> None:
    tree = RadixTree(device=device)
    keys = [key(number) for number in range(5)]
    inserted = tree.insert(keys, numbered(keys))
    tree.save(tmp_path / "tree")
    for copy in (RadixTree.load(tmp_path / "tree", device), tree.to("cpu")):
        assert copy.max_tokens is None
        assert copy.digest() == tree.digest()
        copy.insert(key(9, 60), range(100, 160))
        copy.check()
        there = Places(inserted.lengths.to(copy.device), inserted.handles.to(copy.device))
        assert copy.slots(there).to_list() == numbered(keys)
        copy.evict(1)
    file = io.BytesIO()
    RadixTree(64, device=device).save(file)  # type: ignore[arg-type]
    file.seek(0)
    assert RadixTree.load(file, device).max_tokens == 64  # type: ignore[arg-type]


def test_the_largest_index_is_the_end(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for home in ("host", "device"):
        monkeypatch.setattr(f"flatradix.{home}.core.most_tokens", lambda page_size, halves=1: 12)
    tree = RadixTree(device=device)
    tree.insert(key(1, 10), range(10))
    assert capacity(tree) == 12
    digest = tree.digest()
    with pytest.raises(CapacityError, match="3 new tokens, but 2 of 12 are free") as caught:
        settled(tree, lambda: tree.insert(key(2, 3), range(3)))
    assert (caught.value.needed, caught.value.free) == (3, 2)
    assert tree.digest() == digest
    tree.insert(key(2, 2), range(2))
    assert tree.total_tokens == 12
    tree.check()


def scene(device: str, slot_device: str | None) -> RadixTree:
    tree = RadixTree(device=device, slot_device=slot_device)
    tree.lock(tree.insert(key(1), range(4), namespace="a"))
    return tree


ONE: dict[str, Any] = {"q": [key(2, 9)], "slots": [range(10, 19)], "namespace": "b"}
SEVERAL: dict[str, Any] = {"q": [key(2), key(1, 7)], "slots": [range(10, 14), range(20, 27)], "namespace": ["b", "a"]}


@pytest.mark.parametrize(
    ("slot_device", "call", "single", "folder"),
    [(None, ONE, True, "host"), ("cpu", SEVERAL, False, "host"), (None, SEVERAL, False, "inputs")],
)
def test_interrupted_at_many_bytecodes(
    slot_device: str | None, call: dict[str, Any], single: bool, folder: str, device: str
) -> None:
    """The tree is as before the call or as after it, in the old arrays or in the new."""
    if device == "cuda" and folder == "host":
        folder = "device"
    keywords = call | {"q": call["q"][0], "slots": call["slots"][0]} if single else call
    tree = scene(device, slot_device)
    before = tree.digest()
    total = bytecodes(lambda: tree.insert(**keywords), folder)
    assert capacity(tree) > 4
    after = tree.digest()
    for at in cuts(total, device, f"insert {folder}"):
        tree = scene(device, slot_device)
        interrupt_at(at, lambda tree=tree: tree.insert(**keywords), folder)
        if tree.total_tokens == 4:  # an insert that was undone leaves times of use
            assert tree.digest() == before or not single
        else:
            assert (tree.digest(), capacity(tree) > 4) == (after, True)
        tree.check()
        tree.insert(key(3), range(30, 34))
        again = tree.insert(**keywords)
        assert tree.slots(again).to_list()[0] == list(call["slots"][0])
        assert tree.protected_tokens == 4
        tree.check()


@pytest.mark.parametrize("slot_device", [None, "cpu"])
def test_without_memory_nothing_changes(slot_device: str | None, device: str) -> None:
    skip_if_slow(device)
    at, failed = 0, True
    while failed:
        tree = scene(device, slot_device)
        digest = tree.digest()
        failed = fails_at(at, partial(tree.insert, key(2, 9), range(100, 109)))
        tree.check()
        assert (tree.digest() == digest) == failed
        tree.insert(key(2, 40), range(40))
        tree.check()
        at += 1
    assert at > 5


def test_a_cuda_graph_ends_growth(gpu: str) -> None:
    tree = RadixTree(device=gpu)
    tree.insert(key(1), range(4))
    queries = Ragged.from_sequences([key(1), key(1)]).to(gpu)
    tree.match(queries)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = tree.match(queries)
    graph.replay()
    assert found.lengths.tolist() == [4, 4]
    with pytest.raises(RuntimeError, match="give max_tokens"):
        tree.insert(key(2, 20), range(20))
    graph.replay()
    assert found.lengths.tolist() == [4, 4]
    tree.check()


def test_a_cache_still_needs_a_number() -> None:
    with pytest.raises(TypeError):
        PrefixCache()  # type: ignore[call-arg]
