"""Counts: the counters of a PrefixCache."""

from __future__ import annotations

from typing import NamedTuple


class Counts(NamedTuple):
    """The counters of a PrefixCache since its start, and its slots by state. `PrefixCache.counts` returns them."""

    requests: int  # requests begun, without refused requests
    refused: int  # refusals by `begin`: a prompt that is passed again counts again
    running: int
    prompt_tokens: int
    cached_tokens: int  # prompt tokens that were found in the cache
    evicted_tokens: int
    duplicate_tokens: int  # computed though cached: another request committed first, or the last page for its logits
    shared_tokens: int  # prompt tokens that were not cached, with slots of another prompt of the same `begin`
    slots: int
    free: int
    evictable: int
    protected: int
    held: int  # by running requests, not in the tree

    @property
    def hit_rate(self) -> float:
        """The share of all prompt tokens that was cached."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def occupancy(self) -> float:
        """The share of all slots that is in use."""
        return 1 - self.free / self.slots
