"""When memory runs out, nothing changes, or no slot is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flatradix import RadixTree
from flatradix.host.slots_apart import SlotsApart


def test_an_eviction_without_memory_for_its_slots_changes_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = RadixTree(64, device=device, slot_device="cpu")
    tree.insert([[1, 9], [2, 9], [3, 9]], [[10, 11], [20, 21], [30, 31]])
    before = tree.digest()

    def no_memory(*_arguments: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(SlotsApart, "allocate_eviction", no_memory)  # of a tree on the CPU
    monkeypatch.setattr(torch, "empty_like", no_memory)  # of a tree on a GPU
    with pytest.raises(torch.OutOfMemoryError):
        tree.evict(3)
    monkeypatch.undo()
    assert tree.digest() == before
    assert tree.evict(3).slots.tolist() == [10, 11, 20, 21]
    tree.check()


def test_an_eviction_has_memory_for_the_longest_node(device: str, tmp_path: Path) -> None:
    """An eviction can free more than was asked for, also of a node from a loaded tree."""
    tree = RadixTree(64, device=device, slot_device="cpu")
    tree.insert([[1] * 20, [2]], [list(range(20)), [99]])
    tree.insert([3] * 30, list(range(30, 60)))
    tree.save(tmp_path / "tree")
    loaded = RadixTree.load(tmp_path / "tree", device, "cpu")
    for one in (tree, loaded):
        assert one.evict(1).slots.tolist() == list(range(20))
        assert one.evict(2).slots.tolist() == [99, *range(30, 60)]
