"""Counts: what a PrefixCache did, in numbers."""

from __future__ import annotations

from typing import NamedTuple


class Counts(NamedTuple):
    """What a PrefixCache did so far, and where its slots are. See `PrefixCache.counts`."""

    requests: int  # begun, refused ones left out
    refused: int  # answers of `begin`: a prompt that is passed again counts again
    running: int
    prompt_tokens: int
    cached_tokens: int  # of those, found in the cache
    evicted_tokens: int
    duplicate_tokens: int  # computed though cached: by another meanwhile, or the last page for its logits
    slots: int
    free: int
    evictable: int
    protected: int
    held: int  # by running requests, not in the tree

    @property
    def hit_rate(self) -> float:
        """The part of all prompt tokens that was cached."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def occupancy(self) -> float:
        """The part of all slots that is in use."""
        return 1 - self.free / self.slots
