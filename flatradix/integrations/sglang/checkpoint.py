"""The progress of a checkpoint, so that an interrupted checkpoint can be completed.

The tree and SGLang's allocator tell which steps have been done. An interruption inside SGLang's own code is not
handled: that code is not written for interruptions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

SPLIT, LOCK, UNLOCK = 1, 2, 3


class Checkpoint:
    """The progress of one checkpoint.

    place: the end of the checkpoint; None before the tree has the tokens. lock: the lock that the request had before.
    row: the request's row of SGLang's table. duplicates: the request's slots for tokens that the tree had before.
    free_before: free slots of the allocator before it gets the duplicates. told: whether KV events were recorded.
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
        """Return whether the tree change of a phase is still to be done, and note that the caller begins it now.

        It is to be done if it was not begun, or if the tree has not changed since it was begun.
        """
        begun, changes = self._begun
        if begun > phase or (begun == phase and changes != self._changes()):
            return False
        self._begun = phase, self._changes()
        return True


def free_slots(allocator: Any) -> int:
    """Return the free slots of SGLang's allocator, including slots that wait for the end of a group of frees."""
    slots = int(allocator.available_size())
    for part in getattr(allocator, "free_group", None) or ():
        slots += part.numel()
    for part in getattr(allocator, "free_page_ids_group", None) or ():
        slots += part.numel() * allocator.page_size
    return slots
