"""Doing each part of a step once, also where the step is begun again because a signal cut it short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flatradix.tree import RadixTree


class Once:
    """What of a step was begun, and what tree and allocator said before: what they say still is not done.

    A cut within SGLang's own code, which none of it expects, is beyond this.
    """

    def __init__(self, tree: RadixTree, allocator: Any) -> None:
        self._tree = tree
        self._allocator = allocator
        self._before: dict[str, int] = {}

    def change(self, name: str, operation: Callable[[Any], object], argument: Any) -> None:
        """Call an operation that changes the tree."""
        if self._before.setdefault(name, self._tree.changes) == self._tree.changes:
            operation(argument)

    def free(self, slots: torch.Tensor, start_pos: int) -> None:
        """Give slots to the allocator."""
        if self._before.setdefault("free", self._given()) == self._given():
            self._allocator.free_segment(slots, start_pos=start_pos)

    def _given(self) -> int:
        """Slots that the allocator has, those that wait for the end of a group of frees included."""
        allocator = self._allocator
        tokens = sum(part.numel() for part in allocator.free_group or ())
        pages = sum(part.numel() for part in getattr(allocator, "free_page_ids_group", None) or ())
        return int(allocator.available_size()) + tokens + pages * int(allocator.page_size)
