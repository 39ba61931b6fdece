"""What a PrefixCache notes of a commit whose result is not known yet, and of requests that are about to begin."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flatradix.cache.share import Loan
from flatradix.results import InsertResult


class Pending(NamedTuple):
    """A commit for which the host does not know yet how many of its tokens were cached before."""

    result: InsertResult
    begins: list[int]
    slots: list[torch.Tensor]  # the slots of its own that each request brought: for its tokens from `begins` on

    def duplicates(self, prefixes: list[int]) -> list[torch.Tensor]:
        """Return the slots that requests brought for tokens that the tree had. prefixes: what it had of each."""
        parts = zip(prefixes, self.begins, self.slots, strict=True)
        return [slots[: prefix - begin] for prefix, begin, slots in parts if prefix > begin]


class Grant(NamedTuple):
    """What requests get that begin: a row each, and slots for all tokens but the first `begins`.

    Of these, `cached` are cached; the others are borrowed as `loans` say.
    """

    rows: list[int]
    cached: list[int]
    begins: list[int]
    needed: list[int]
    loans: dict[int, Loan]
