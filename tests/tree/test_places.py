"""Calls that take the places of a result: locks, splits, slots, rows of a table."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flatradix import QueryError, RadixTree, Ragged, StaleHandleError
from tests.support.devices import settled


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


@pytest.mark.parametrize("operation", ["lock", "want", "split"])
def test_handles_with_gaps_that_were_made_in_inference_mode(operation: str, device: str) -> None:
    """torch refuses to write to such tensors outside inference mode: the lock had been made by then."""
    tree = RadixTree(64, device=device)
    made = tree.insert([[1, 2, 3, 4], [5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7]])
    with torch.inference_mode():
        handles = torch.stack([made.handles, made.handles], dim=1)[:, 0]
        lengths = torch.tensor([[2, 0], [3, 0]], dtype=torch.int32, device=tree.device)[:, 0]
    places = SimpleNamespace(handles=handles, lengths=lengths)
    assert not handles.is_contiguous()
    assert handles.is_inference()
    settled(tree, lambda: getattr(tree, operation)(places))
    assert tree.protected_tokens == (5 if operation == "lock" else 0)
    assert tree.slots(places).to_list() == [[1, 2], [5, 6, 7]]
    assert handles[0] != made.handles[0]
    if operation == "lock":
        tree.unlock(places)
    tree.check()
    assert tree.protected_tokens == 0


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
    tree.write_slots(tree.match(Ragged.from_sequences([])), part, [])
    tree.check()


def test_slots_beside_the_index_are_written_where_they_are_kept(device: str) -> None:
    """Tables must be on `slot_device`; a tree on a GPU writes only to tables on the GPU."""
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


@pytest.mark.parametrize("slot_device", [None, "cpu"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_come_in_the_type_they_are_kept_in(dtype: torch.dtype, slot_device: str | None, device: str) -> None:
    """An engine joins the slots with its free list and writes them into its tables."""
    tree = RadixTree(16, device=device, slot_dtype=dtype, slot_device=slot_device)
    tree.insert([[1, 2, 3], [1, 2, 4]], [[1, 2, 3], [0, 0, 4]])
    single, batch = tree.match([1, 2, 3]), tree.match([[1, 2, 4], [1]])
    found = tree.path_slots(single), tree.slots(single).values, tree.slots(batch).values
    assert {values.dtype for values in found} == {dtype}
    assert {tree.evict(count).slots.dtype for count in (0, 1, 2)} == {dtype}


def test_split_ends_an_edge_and_locks_nothing(device: str) -> None:
    tree = RadixTree(16, device=device)
    whole = tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    places = tree.match([[1, 2], [1, 2, 3]])
    stale = places.handles.clone()
    tree.split(places)
    assert (tree.num_nodes, tree.protected_tokens) == (3, 0)
    assert not torch.equal(places.handles, stale)
    tree.check()
    assert tree.evict(1).slots.tolist() == [4]
    with pytest.raises(StaleHandleError):
        settled(tree, lambda: tree.split(whole))
    assert tree.match([1, 2, 9], split=True).length == 2
    assert tree.slots(tree.match([1, 2, 3, 4])).to_list() == [[1, 2, 3]]
    found = tree.match([[1, 9], [5]], split=True)
    assert (found.lengths.tolist(), tree.num_nodes) == ([1, 0], 3)
    tree.check()


def test_match_array(device: str) -> None:
    tree = RadixTree(16, device=device)
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4], namespace="a")
    key = array("q", [1, 2, 3, 9])
    assert [tree.match_array(key, limit, "a").length for limit in (None, 9, 3, 2, 0, -1)] == [3, 3, 3, 2, 0, 0]
    assert (tree.match_array(key).length, tree.num_nodes) == (0, 1)
    assert (tree.match_array(key, 2, "a", split=True).length, tree.num_nodes) == (2, 2)
    with pytest.raises(ValueError, match="an array of int64"):
        tree.match_array(array("i", [1, 2]))
    with pytest.raises(QueryError, match="query 0: the token at position 0"):
        settled(tree, lambda: tree.match_array(array("q", [-1])))


def test_slots_of_64_bits(device: str) -> None:
    tree = RadixTree(16, device=device, slot_dtype=torch.int64)
    tree.insert([1, 2, 3], [2**31, 2**62, 5])
    assert tree.slots(tree.match([1, 2, 3])).to_list() == [[2**31, 2**62, 5]]
    with pytest.raises(ValueError, match="negative"):
        settled(tree, lambda: tree.insert([4, 5], [-(2**63), 1]))
