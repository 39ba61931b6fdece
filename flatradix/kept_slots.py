"""Slots that an eviction could not return because their device had no memory for them: the next one returns them."""

from __future__ import annotations

import torch

from flatradix.results import EvictResult


class KeptSlots:
    """None, mostly. tokens: how many there are; the tree has let them go, and only this knows them."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._slots = torch.empty(0, dtype=torch.int64, device="cpu")
        self._nodes = 0
        self.tokens = 0

    def add(self, slots: torch.Tensor, nodes: int, error: torch.OutOfMemoryError) -> None:
        """Keep the slots of `nodes` nodes, int64 in host memory; the error that is to be raised will say so."""
        self._slots = torch.cat((self._slots, slots))
        self._nodes += nodes
        self.tokens = len(self._slots)
        error.args = (
            f"{error}\nevict: {self.tokens} evicted slots cannot be returned before their device has memory for them; "
            "free some and evict again: the next eviction returns them first",
        )

    def join(self, slots: torch.Tensor, tokens: int, nodes: int) -> EvictResult:
        """What an eviction returns: what was kept, then its own slots, int64 [tokens] on the slot device."""
        if self.tokens:
            slots = torch.cat((self._slots.to(slots.device), slots))
            tokens += self.tokens
            nodes += self._nodes
            self.clear()
        return EvictResult(slots, tokens, nodes)
