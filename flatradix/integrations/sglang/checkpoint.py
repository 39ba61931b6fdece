"""How far a checkpoint has come, so that one that a signal cuts short can be done to its end.

The tree and SGLang's allocator are asked what has been done. A cut within SGLang's own code, which none of it expects,
is beyond this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SPLIT, LOCK, UNLOCK = 1, 2, 3


class Checkpoint:
    """place: where it ends, None before the tree has the tokens. lock: the one that the request had before.

    row: the request's row of SGLang's table. duplicates: slots that the request held for what the tree had already.
    free_before: slots that the allocator had before it got these. told: whether KV events know of it.
    """

    __slots__ = ("_begun", "_changes", "duplicates", "free_before", "lock", "place", "req", "row", "told")

    def __init__(self, req: Any, row: torch.Tensor, changes: Callable[[], int]) -> None:
        """changes: `RadixTree.changes`."""
        self.req = req
        self.row = row
        self.lock = req.lock
        self.place: Any = None
        self.duplicates: torch.Tensor | None = None
        self.free_before: int | None = None
        self.told = False
        self._changes = changes
        self._begun = 0, 0

    def is_due(self, phase: int) -> bool:
        """Whether the tree is still to be changed: it was not begun, or begun and not done. The caller does it now."""
        begun, changes = self._begun
        if begun > phase or (begun == phase and changes != self._changes()):
            return False
        self._begun = phase, self._changes()
        return True


def free_slots(allocator: Any) -> int:
    """Slots that SGLang's allocator has, those that wait for the end of a group of frees included."""
    slots = int(allocator.available_size())
    for part in getattr(allocator, "free_group", None) or ():
        slots += part.numel()
    for part in getattr(allocator, "free_page_ids_group", None) or ():
        slots += part.numel() * allocator.page_size
    return slots
