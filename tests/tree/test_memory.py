"""Where memory runs out: nothing has changed, or no slot is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flatradix import RadixTree
from flatradix.slot_pool import DeviceSlots


def test_an_eviction_without_memory_for_its_slots_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = RadixTree(64, device=device, slot_device="cpu")
    tree.insert([[1, 9], [2, 9], [3, 9]], [[10, 11], [20, 21], [30, 31]])
    before = tree.digest()

    def no_memory(*_arguments: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(DeviceSlots, "room_for", no_memory)  # of a tree on the CPU
    monkeypatch.setattr(torch, "empty_like", no_memory)  # of a tree on a GPU
    with pytest.raises(torch.OutOfMemoryError):
        tree.evict(3)
    monkeypatch.undo()
    assert tree.digest() == before
    assert tree.evict(3).slots.tolist() == [10, 11, 20, 21]
    tree.check()


def test_an_eviction_has_memory_for_the_longest_node(device: str, tmp_path: Path) -> None:
    """More than was asked for, however the node came into the tree."""
    tree = RadixTree(64, device=device, slot_device="cpu")
    tree.insert([[1] * 20, [2]], [list(range(20)), [99]])
    tree.insert([3] * 30, list(range(30, 60)))
    tree.save(tmp_path / "tree")
    loaded = RadixTree.load(tmp_path / "tree", device, "cpu")
    for one in (tree, loaded):
        assert one.evict(1).slots.tolist() == list(range(20))
        assert one.evict(2).slots.tolist() == [99, *range(30, 60)]


def test_an_eviction_whose_result_cannot_be_had_mixes_no_namespaces(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        pytest.skip("a tree on a GPU asks for the memory of the result before it frees a node")
    tree = RadixTree(8, device=device)
    tree.insert([1, 2], [1, 2], namespace="a")

    def gather(*_arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tree._slots, "gather", gather)
        with pytest.raises(MemoryError):
            tree.evict(2)
    tree.insert([1, 2], [3, 4], namespace="a")
    tree.evict(1)
    tree.insert([1, 2], [5, 6], namespace="b")
    tree.insert([1, 2], [7, 8], namespace="a")
    tree.check()
    assert tree.slots(tree.match([1, 2], namespace="b")).to_list() == [[5, 6]]


def test_a_slot_pool_without_memory_left_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        pytest.skip("a tree on a GPU has one slot pool, beside the index, and compacts it without asking for memory")
    tree = RadixTree(8, device=device, slot_device="cpu")
    tree.insert([[1, 2], [3], [4, 5, 6]], [[1, 2], [3], [4, 5, 6]])
    tree.match([[1, 2], [4, 5, 6]])
    tree.evict(1)
    before = tree.digest()

    def indices(starts: Any, lengths: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tree._slots, "_indices", indices)
        with pytest.raises(MemoryError):
            tree._compact()
        assert tree.digest() == before
        tree.insert([[7], [8]], [[7], [8]])
    assert tree.slots(tree.match([[4, 5, 6], [7], [8]])).to_list() == [[4, 5, 6], [7], [8]]
