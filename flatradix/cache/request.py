"""Request: the state of one request of a PrefixCache, from `begin` to `finish` or `abort`."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

RUNNING, REFUSED, ENDED = "running", "refused", "ended"


class Owner(Protocol):
    """What a request needs of its PrefixCache."""

    def loan_of(self, request: Request) -> tuple[Request | None, int]: ...


class Request:
    """A request of a PrefixCache. `PrefixCache.begin` makes it, and only the operations of the cache change it.

    state: "running", "refused" (it did not fit and holds nothing) or "ended".
    refusal: why the request was refused; empty if it was not. missing: slots that were lacking in the last `begin` or
        `extend`; 0 if none.
    row: the request's row of `PrefixCache.table`; -1 unless it is running.
    cached_length: prompt tokens that were cached, or that an earlier prompt of the same `begin` shares. Their KV need
        not be computed. It falls if the request has to compute what an ended request lent.
    length: tokens that have slots, `slots[:length]`.
    committed: tokens that are in the tree, whole pages. Other requests can reuse them.
    counted: tokens for which an insert of this request has counted a hit.
    """

    __slots__ = (
        "_table", "_tokens", "cached_length", "committed", "counted", "length", "missing", "namespace", "num_tokens",
        "owner", "priority", "refusal", "row", "state",
    )  # fmt: skip

    def __init__(self, owner: Owner, table: torch.Tensor, tokens: np.ndarray, namespace: Any, priority: int) -> None:
        """owner: the cache. table: `PrefixCache.table`."""
        self.owner = owner
        self._table = table
        self._tokens = tokens
        self.num_tokens = len(tokens)
        self.namespace = namespace
        self.priority = priority
        self.state = REFUSED
        self.refusal = ""
        self.row = -1
        self.missing = self.cached_length = self.length = self.committed = self.counted = 0

    @property
    def tokens(self) -> np.ndarray:
        """The known tokens, int64 [num_tokens]: the prompt, and what `commit` or `finish` received since. A view."""
        return self._tokens[: self.num_tokens]

    @property
    def slots(self) -> torch.Tensor:
        """The KV slot of each token so far: int32 [length] on the device of the KV cache, a view of the table.

        The first `cached_length` slots hold KV already, or a lender computes it. A `commit` may replace slots by those
        of another request that computed the same tokens. So read `slots` again after a commit of this request, or of
        one that shares slots with it. Raises ValueError unless the request is running.
        """
        if self.row < 0:
            raise ValueError(f"a request that {self.why_not_running()} has no slots")
        return self._table[self.row, : self.length]

    @property
    def borrowed(self) -> int:
        """How many tokens, in whole pages, have slots that the tree or the lender owns; 0 without a lender."""
        return self.owner.loan_of(self)[1]

    @property
    def lender(self) -> Request | None:
        """The running request that owns the slots before `borrowed`, after a `begin` with `share`; None if none does.

        The lender may borrow a shorter prefix in turn. It computes what it lends. When these tokens are committed, by
        whichever of the requests that share them, or when one of the two requests ends, the relation ends.
        """
        return self.owner.loan_of(self)[0]

    def why_not_running(self) -> str:
        return f"was refused ({self.refusal})" if self.state == REFUSED else "has ended"

    def append(self, tokens: np.ndarray) -> None:
        """Append known tokens, int64 [K]. Amortised O(K)."""
        end = self.num_tokens + len(tokens)
        if end > len(self._tokens):
            grown = np.empty(max(end, 2 * len(self._tokens)), np.int64)
            grown[: self.num_tokens] = self.tokens
            self._tokens = grown
        self._tokens[self.num_tokens : end] = tokens
        self.num_tokens = end

    def end(self) -> None:
        """End the request. The tokens that it committed stay cached."""
        self.state, self.length = ENDED, self.committed
        self.row = -1

    def __repr__(self) -> str:
        what = self.why_not_running() if self.row < 0 else f"{self.length} slots, {self.committed} committed"
        return f"Request({self.num_tokens} tokens, {self.cached_length} were cached, {what})"
