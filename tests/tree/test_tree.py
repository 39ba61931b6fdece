"""What the other files do not reach: buffers, pools and their compaction, digests, snapshots, many namespaces."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flatradix
from flatradix import RadixTree, Ragged, meta
from tests.devices import interpreted, settled


def same_queries() -> list[Any]:
    """One batch, in every form that is accepted."""
    rows = [[1, 2, 3], [], [1, 2]]
    odd = np.array([1, 9, 2, 9, 3, 9])[::2]
    return [
        rows,
        tuple(rows),
        Ragged.from_sequences(rows),
        Ragged(torch.tensor([1, 2, 3, 1, 2], dtype=torch.int32), torch.tensor([0, 3, 3, 5])),
        Ragged(torch.tensor([1, 2, 3, 1, 2], dtype=torch.int16), torch.tensor([0, 3, 3, 5])),
        [array("q", row) for row in rows],
        [array("i", row) for row in rows],
        [array("H", row) for row in rows],
        [np.array(row, dtype=np.uint8) for row in rows],
        [torch.tensor(row, dtype=torch.int32) for row in rows],
        [odd, torch.tensor([], dtype=torch.int32), (1, 2)],
        [torch.tensor([1, 9, 2, 9, 3, 9])[::2], range(0), range(1, 3)],
        [np.array(row, dtype=">i8") for row in rows],
    ]


@pytest.mark.parametrize("q", same_queries())
def test_every_form_of_a_batch_means_the_same(q: Any, device: str) -> None:
    tree = RadixTree(16, device=device)
    tree.insert([1, 2, 7], [10, 11, 12])
    m = tree.match(q)
    assert (m.lengths.dtype, m.handles.dtype) == (torch.int32, torch.int64)
    assert m.lengths.tolist() == [2, 0, 2]
    assert tree.slots(m).to_list() == [[10, 11], [], [10, 11]]
    assert tree.insert(q, [[20, 21, 22], [], [23, 24]]).prefix_lengths.tolist() == [2, 0, 2]
    assert tree.slots(tree.match([1, 2, 3])).to_list() == [[10, 11, 22]]


@pytest.mark.parametrize("q", [[1, 2], (1, 2), range(1, 3), array("i", [1, 2]), np.array([1, 2]), torch.tensor([1, 2])])
def test_one_flat_sequence_is_a_batch_of_one(q: Any, device: str) -> None:
    tree = RadixTree(16, device=device)
    r = tree.insert(q, [5, 6])
    assert (r.prefix_length, r.length, r.lengths.tolist()) == (0, 2, [2])
    m = tree.match(q)
    assert (len(m), m.length, m.handle) == (1, 2, int(m.handles[0]))
    assert tree.slots(m).to_list() == [[5, 6]]


def test_an_empty_batch(device: str) -> None:
    tree = RadixTree(16, device=device)
    m = tree.match([])
    tree.lock(m)
    tree.unlock(m)
    assert (len(m), tree.slots(m).to_list(), len(tree.insert([], []))) == (0, [], 0)


def test_lock_renews_the_handle_of_what_it_splits(device: str) -> None:
    tree = RadixTree(64, device=device)
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    m = tree.match([[1, 2, 9]])
    single = tree.match([1, 2])
    before = m.handles.clone()
    tree.lock(m)
    tree.lock(single)
    assert not torch.equal(m.handles, before)
    assert tree.evict(100).slots.tolist() == [3, 4]
    tree.check()
    tree.unlock(m)
    tree.unlock(single)
    assert tree.evict(100).slots.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("slot_dtype", "table_dtype"),
    [(torch.int32, torch.int32), (torch.int32, torch.int64), (torch.int64, torch.int64)],
)
def test_write_slots(slot_dtype: torch.dtype, table_dtype: torch.dtype, device: str) -> None:
    tree = RadixTree(64, device=device, slot_dtype=slot_dtype)
    tree.insert([[1, 2, 3, 4], [1, 2, 5]], [[10, 11, 12, 13], [0, 0, 20]])
    table = torch.full((4, 6), -1, dtype=table_dtype, device=tree.device)
    part = table[:, :4]
    m = tree.match([[1, 2, 3, 4], [1, 2, 5, 9], [7]])
    settled(tree, lambda: tree.write_slots(m, part, torch.tensor([3, 1, 0], device=tree.device)))
    want = [[-1] * 6, [10, 11, 20, -1, -1, -1], [-1] * 6, [10, 11, 12, 13, -1, -1]]
    assert table.tolist() == want
    for rows in ([2], torch.tensor([2], dtype=torch.int32), np.array([2])):
        table[2] = -1
        settled(tree, lambda rows=rows: tree.write_slots(tree.match([1, 2, 3]), part, rows))
        assert table[2].tolist() == [10, 11, 12, -1, -1, -1]
    tree.write_slots(tree.match([]), part, [])
    tree.check()


def test_slots_beside_the_index_are_written_where_they_are_kept(device: str) -> None:
    """`slot_device` is where tables lie; a tree on a GPU writes to those on the GPU only."""
    tree = RadixTree(64, device=device, slot_device="cpu")
    tree.insert([1, 2, 3], [7, 8, 9])
    assert tree.slots(tree.match([1, 2, 3])).device.type == tree.evict(0).slots.device.type == "cpu"
    table = torch.zeros(1, 3, dtype=torch.int32)
    if tree.device.type == "cuda":
        with pytest.raises(ValueError, match="slots are returned on cpu, and the tree is not there"):
            tree.write_slots(tree.match([1, 2, 3]), table, [0])
        return
    settled(tree, lambda: tree.write_slots(tree.match([1, 2, 3]), table, [0]))
    assert table.tolist() == [[7, 8, 9]]


def test_results_do_not_change_with_the_tree(device: str) -> None:
    tree = RadixTree(8, device=device)
    r = tree.insert([1, 2, 3], [7, 8, 9])
    slots = tree.slots(r)
    freed = tree.evict(3)
    tree.insert([4, 5, 6, 7], [1, 1, 1, 1])
    assert slots.to_list() == [[7, 8, 9]]
    assert freed.slots.tolist() == [7, 8, 9]


def _fill_with_holes(tree: RadixTree, rng: random.Random, keys: int = 400) -> dict[int, list[int]]:
    """Keys of random lengths, some locked, so that what eviction frees lies scattered; the first token of each key."""
    kept = {}
    for first in range(1, keys):
        length = rng.randrange(2, 24, 2)
        key = [first] + [rng.randrange(5) for _ in range(length - 1)]
        if tree.total_tokens + length > tree.max_tokens:
            tree.evict(tree.total_tokens + length - tree.max_tokens)
        r = tree.insert(key, list(range(1000 * first, 1000 * first + length)))
        if rng.random() < 0.2 and tree.protected_tokens < tree.max_tokens // 2:
            tree.lock(r)
            kept[first] = key
    return kept


@pytest.mark.parametrize("bigram", [False, True])
@pytest.mark.parametrize("slot_device", [None, "cpu"])
def test_compaction_keeps_everything(bigram: bool, slot_device: str | None, device: str) -> None:
    size, keys = (60, 20) if interpreted(device) else (600, 400)
    tree = RadixTree(size, page_size=2 - bigram, device=device, bigram=bigram, slot_device=slot_device)
    kept = _fill_with_holes(tree, random.Random(5), keys)
    before = tree.digest()
    tree._compact()
    tree.check()
    assert tree.digest() == before
    for first, key in kept.items():
        m = tree.match(key)
        assert m.length == len(key) - bigram
        assert tree.slots(m).to_list() == [list(range(1000 * first, 1000 * first + m.length))]


def test_a_key_as_long_as_the_free_space_always_fits(device: str) -> None:
    rng = random.Random(8)
    size, keys, cases = (60, 15, 4) if interpreted(device) else (600, 400, 20)
    compactions = []
    for seed in range(cases):
        tree = RadixTree(size, page_size=2, device=device)
        _fill_with_holes(tree, random.Random(seed), keys)
        tree.evict(size // 3)
        free = (tree.max_tokens - tree.total_tokens) // 2 * 2
        compacted = _watch_compactions(tree)
        r = tree.insert([[9, 9] + [rng.randrange(5) for _ in range(free - 2)]], [list(range(free))])
        assert tree.total_tokens + 1 >= tree.max_tokens
        assert tree.slots(r).to_list() == [list(range(free))]
        tree.check()
        compactions.append(compacted())
    assert any(compactions), "no case compacted: this tests nothing"


def _watch_compactions(tree: RadixTree) -> Callable[[], bool]:
    """Tells whether the pools have been compacted since. On a GPU each compaction moves all to their other half."""
    seen: list[int] = []
    compact = tree._compact
    half = int(tree._state.meta[meta.POOL_END])

    def counted() -> None:
        seen.append(tree.num_nodes)
        compact()

    tree._compact = counted  # type: ignore[method-assign]
    return lambda: bool(seen) or int(tree._state.meta[meta.POOL_END]) != half


def test_digest_sees_what_matters(device: str) -> None:
    def build(**change: Any) -> str:
        tree = RadixTree(64, device=device, policy=change.pop("policy", "lru"))
        tree.insert([1, 2, 3], change.pop("slots", [7, 8, 9]), namespace=change.pop("namespace", None))
        tree.insert(
            [1, 2, change.pop("token", 4)], [0, 0, 5], priority=change.pop("priority", 0),
            namespace=change.pop("namespace_2", None), inserted_lengths=change.pop("inserted", 0),
        )  # fmt: skip
        if change.pop("lock", False):
            tree.lock(tree.match([1, 2, 3], touch=False))
        if change.pop("touch", False):
            tree.match([1, 2, 3])
        assert not change
        return tree.digest()

    changes: list[dict[str, Any]] = [
        {}, {"slots": [7, 8, 10]}, {"slots": [8, 7, 9]}, {"namespace": "a"}, {"namespace": b"a"}, {"namespace": ""},
        {"token": 5}, {"priority": 1}, {"inserted": 2}, {"lock": True}, {"touch": True}, {"namespace_2": "a"},
    ]  # fmt: skip
    digests = [build(**change) for change in changes]
    assert len(set(digests)) == len(digests)
    assert [build(**change) for change in changes] == digests
    assert build(policy="lfu") == digests[0]


def test_digest_does_not_see_rows_or_places(device: str) -> None:
    plain = RadixTree(64, device=device)
    moved = RadixTree(64, device=device)
    for i in range(3 if interpreted(device) else 10):
        moved.insert([50 + i, 1], [0, 0], namespace=str(i))
    moved.reset()
    moved._state.meta[meta.CLOCK] = 0
    for tree in (plain, moved):
        tree.insert([[1, 2, 3], [1, 2, 4], [1, 5]], [[1, 2, 3], [1, 2, 4], [1, 5]], namespace="n")
    assert plain.digest() == moved.digest()


@pytest.mark.parametrize("policy", ["lfu", "mru"])
def test_snapshot(tmp_path: Path, policy: str, device: str) -> None:
    tree = RadixTree(64, page_size=2, device=device, policy=policy)
    tree.insert([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8]], [[1, 2, 3, 4], [1, 2, 5, 6], [7, 8]], namespace=["a", "a", b"b"])
    m = tree.match([[1, 2, 9, 9]], namespace="a", lock=True)
    tree.evict(2)
    tree.save(tmp_path / "tree")
    loaded = RadixTree.load(tmp_path / "tree", device=device)
    loaded.check()
    assert loaded.digest() == tree.digest()
    assert loaded.match([1, 2, 3, 4], namespace="a").length == tree.match([1, 2, 3, 4], namespace="a").length
    loaded.unlock(m)
    tree.unlock(m)
    assert loaded.evict(99).slots.tolist() == tree.evict(99).slots.tolist()


def test_snapshot_that_is_none(tmp_path: Path, device: str) -> None:
    path = tmp_path / "tree"
    path.write_bytes(b"not a tree")
    with pytest.raises(ValueError, match="no tree that flatradix saved, or is damaged"):
        RadixTree.load(path)
    torch.save({"format": "flatradix tree 99"}, path)
    with pytest.raises(ValueError, match="no tree that this version"):
        RadixTree.load(path)
    with pytest.raises(FileNotFoundError):
        RadixTree.load(tmp_path / "nowhere")
    tree = RadixTree(8, device=device, policy=lambda nodes: nodes.tick)
    tree.save(path)
    with pytest.raises(ValueError, match="give it again"):
        RadixTree.load(path)
    assert RadixTree.load(path, policy=lambda nodes: -nodes.tick).max_tokens == 8


def _insert_in(tree: RadixTree, names: range) -> None:
    for i in names:
        if tree.total_tokens + 4 > tree.max_tokens:
            tree.evict(1000)
        tree.insert([1, 2, 3, i], [1, 2, 3, 4], namespace=f"tenant {i}")


@pytest.mark.slow
def test_a_million_namespaces_leave_nothing_behind(device: str) -> None:
    import resource

    if interpreted(device):
        pytest.skip("a million calls of kernels in Python would take a day")
    many = 1_000_000 if device == "cpu" else 200_000
    tree = RadixTree(10_000, device=device)
    _insert_in(tree, range(many // 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _insert_in(tree, range(many // 20, many))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2048, f"{grown} KiB more at its highest"
    names = [name for _, name in tree._namespaces.items()]
    assert len(names) == tree.num_nodes + 1 <= 2501
    tree.check()
    tree.evict(10_000)
    assert tree._namespaces.items() == [(0, None)]


def test_namespaces_of_a_refused_batch_leave_nothing_behind(device: str) -> None:
    tree = RadixTree(10, device=device)
    count = 12 if interpreted(device) else 50
    one_each = [[i] for i in range(count)]
    for _ in range(3):
        with pytest.raises(flatradix.CapacityError):
            settled(tree, lambda: tree.insert(one_each, one_each, namespace=[str(i) for i in range(count)]))
        tree.insert(one_each[:10], one_each[:10], namespace=[f"{i}!" for i in range(10)])
        tree.check()
        assert len(tree._namespaces.items()) == 11
        tree.evict(10)


def test_slots_of_64_bits(device: str) -> None:
    tree = RadixTree(16, device=device, slot_dtype=torch.int64)
    tree.insert([1, 2, 3], [2**31, 2**62, 5])
    assert tree.slots(tree.match([1, 2, 3])).to_list() == [[2**31, 2**62, 5]]
    with pytest.raises(ValueError, match="negative"):
        settled(tree, lambda: tree.insert([4, 5], [-(2**63), 1]))


@pytest.mark.parametrize("tokens", [1, 2, 7, 31, 63, 64, 127])
def test_a_tree_full_of_the_smallest_nodes(tokens: int, device: str) -> None:
    if interpreted(device) and tokens > 7:
        pytest.skip("a kernel in Python takes 20 ms for each query of the batch")
    tree = RadixTree(tokens, device=device)
    for _ in range(2):
        r = tree.insert([[i] for i in range(tokens)], [[i] for i in range(tokens)])
        tree.insert([0], [0])
        tree.lock(r)
        tree.check()
        tree.unlock(r)
        assert tree.num_nodes == tokens
    assert tree.evict(tokens).num_nodes == tokens


def test_a_handle_from_after_the_save_is_stale_in_the_loaded_tree(tmp_path: Path, device: str) -> None:
    tree = RadixTree(8, device=device)
    tree.insert([1, 2], [1, 2])
    tree.evict(2)
    tree.save(tmp_path / "tree")
    loaded = RadixTree.load(tmp_path / "tree", device=device)
    later = tree.insert([3, 4], [3, 4])
    with pytest.raises(flatradix.StaleHandleError):
        settled(loaded, lambda: loaded.lock(later))
    loaded.check()


@pytest.mark.parametrize("name", [None, "", b"", "\ud800", b"\xff\x00", "tenant"])
def test_snapshot_of_any_namespace(name: str | bytes | None, tmp_path: Path, device: str) -> None:
    tree = RadixTree(8, device=device)
    tree.insert([1, 2], [1, 2], namespace=name)
    tree.save(tmp_path / "tree")
    assert RadixTree.load(tmp_path / "tree", device=device).match([1, 2], namespace=name).length == 2


def test_nothing_behind_a_start(device: str) -> None:
    tree = RadixTree(8, device=device)
    m = tree.insert([1, 2], [1, 2])
    assert tree.match([], start=m).lengths.tolist() == [2]
    r = tree.insert([], [], start=m)
    assert (r.prefix_lengths.tolist(), r.lengths.tolist()) == ([2], [2])
    with pytest.raises(ValueError, match="batch of one, and this is one of 0"):
        _ = tree.match([]).length


def test_inference_mode_makes_no_difference(device: str) -> None:
    """A tree that was made or used in it can be used outside, as what PyTorch makes in it mostly cannot."""
    with torch.inference_mode():
        tree = RadixTree(16, device=device, policy="lfu")
        m = tree.insert([[1, 2, 3], [1, 4]], [[1, 2, 3], [1, 4]], namespace="a")
        single = tree.match([1, 2], namespace="a")
        tree.lock(m)
    tree.lock(single)
    tree.unlock(m)
    assert tree.evict(9).slots.tolist() == [4, 3]
    tree.unlock(single)
    tree._compact()
    with torch.inference_mode():
        tree.insert([[5], [6]], [[5], [6]])
        before = tree.digest()
    assert tree.digest() == tree.to("cpu").digest() == before
    assert tree.evict(9).num_tokens == 4
    tree.check()


def test_a_tree_is_not_subclassed() -> None:
    with pytest.raises(TypeError, match="not made to be subclassed"):
        type("Mine", (RadixTree,), {})


def test_a_tree_is_neither_pickled_nor_copied(device: str) -> None:
    import copy
    import pickle

    tree = RadixTree(8, device=device)
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"use save\(\) and RadixTree.load"):
            call(tree)
