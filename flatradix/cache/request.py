"""Request: what PrefixCache knows of one request, from `begin` to `finish` or `abort`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

RUNNING, REFUSED, ENDED = "running", "refused", "ended"


class Request:
    """A request of a PrefixCache; made by `PrefixCache.begin`, and changed by its other operations only.

    state: "running", "refused" (it did not fit: nothing is held for it) or "ended".
    refusal: why it was refused; empty if it was not. missing: slots that were lacking in its last call, 0 if none.
    row: its row of `PrefixCache.table`; -1 unless it is running.
    cached_length: tokens of the prompt that were cached: their KV need not be computed.
    length: tokens that have slots; `slots[:length]`.
    committed: tokens that are in the tree by now, whole pages; others can reuse them.
    counted: tokens on which an insert of this request counted its hit.
    """

    __slots__ = (
        "_table", "_tokens", "cached_length", "committed", "counted", "length", "missing", "namespace", "num_tokens",
        "owner", "priority", "refusal", "row", "state",
    )  # fmt: skip

    def __init__(self, owner: object, table: torch.Tensor, tokens: np.ndarray, namespace: Any, priority: int) -> None:
        """owner: the cache. table: its table."""
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
        """The known tokens, int64 [num_tokens]: the prompt and what was told since. A view."""
        return self._tokens[: self.num_tokens]

    @property
    def slots(self) -> torch.Tensor:
        """The KV slot of each token so far, int32 [length] on the device of the KV cache: a view of the table.

        The first `cached_length` of them hold KV already. A `commit` may exchange slots for those of another request
        that computed the same; so read it anew after one.
        """
        if self.row < 0:
            raise ValueError(f"a request that {self.why_not_running()} has no slots")
        return self._table[self.row, : self.length]

    def why_not_running(self) -> str:
        return f"was refused ({self.refusal})" if self.state == REFUSED else "has ended"

    def append(self, tokens: np.ndarray) -> None:
        """Know more tokens, int64 [K]. Amortised O(K)."""
        end = self.num_tokens + len(tokens)
        if end > len(self._tokens):
            grown = np.empty(max(end, 2 * len(self._tokens)), np.int64)
            grown[: self.num_tokens] = self.tokens
            self._tokens = grown
        self._tokens[self.num_tokens : end] = tokens
        self.num_tokens = end

    def end(self) -> None:
        """No longer running; what it committed stays cached."""
        self.state, self.length = ENDED, self.committed
        self.row = -1

    def __repr__(self) -> str:
        what = self.why_not_running() if self.row < 0 else f"{self.length} slots, {self.committed} committed"
        return f"Request({self.num_tokens} tokens, {self.cached_length} were cached, {what})"
