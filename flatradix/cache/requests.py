"""Requests of a PrefixCache: a batch as columns, and a view of one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, overload

import numpy as np
import torch

from flatradix.cache.columns import Columns

RUNNING, REFUSED, ENDED = "running", "refused", "ended"


class Owner(Protocol):
    """What a view needs of its cache."""

    columns: Columns

    def view(self, row: int, serial: int) -> Request: ...

    def loan_of(self, request: Request) -> tuple[Request | None, int]: ...

    def tokens_of(self, row: int) -> np.ndarray: ...

    def pages_of(self, row: int, length: int) -> torch.Tensor: ...

    def slots_of(self, row: int, length: int) -> torch.Tensor: ...


class Request:
    """One request of a PrefixCache, from `begin` to `finish` or `abort`: a view of the cache's columns.

    A cache makes the view of a request when it is first looked at. Only the operations of the cache change a request.
    When a request ends, its view keeps the numbers, but not the tokens; a request that was never looked at keeps none.
    """

    __slots__ = ("_ended", "_row", "namespace", "owner", "priority", "refusal", "serial")

    def __init__(self, owner: Owner, row: int, serial: int, namespace: Any, priority: int) -> None:
        """row, serial: -1 and 0 for a request that was refused."""
        self.owner = owner
        self.serial = serial
        self.namespace = namespace
        self.priority = priority
        self.refusal = ""
        self._row = row
        self._ended: dict[str, int] = {}  # the numbers of a request that does not run

    @classmethod
    def refused(cls, owner: Owner, num_tokens: int, names: tuple[Any, int], refusal: str, missing: int) -> Request:
        """Return a request that was refused. names: its namespace and its priority."""
        self = cls(owner, -1, 0, *names)
        self.refusal = refusal
        self._ended = {"num_tokens": num_tokens, "missing": missing}
        return self

    @property
    def state(self) -> str:
        """ "running", "refused" (it did not fit and holds nothing) or "ended"."""
        if self.serial == 0:
            return REFUSED
        return RUNNING if self._is_running() else ENDED

    def _is_running(self) -> bool:
        return self._row >= 0 and bool(self.owner.columns.serial[self._row] == self.serial)

    def end(self) -> None:
        """Keep the numbers of a request that has ended. The cache calls this before its row is used again."""
        columns, row = self.owner.columns, self._row
        committed = int(columns.committed[row])
        self._ended = {
            "num_tokens": int(columns.num_tokens[row]),
            "length": committed,
            "committed": committed,
            "counted": int(columns.counted[row]),
            "cached": int(columns.cached[row]),
            "missing": int(columns.missing[row]),
        }
        self._row = -1

    def _number(self, name: str) -> int:
        if self._row >= 0:
            return int(getattr(self.owner.columns, name)[self._row])
        return self._ended.get(name, 0)

    @property
    def row(self) -> int:
        """The request's row of the tables of the cache; -1 unless it is running."""
        return self._row if self._is_running() else -1

    @property
    def missing(self) -> int:
        """Slots that were lacking in the last `begin`, `extend` or `step`; 0 if none."""
        return self._number("missing")

    @property
    def num_tokens(self) -> int:
        """Tokens that are known: the prompt, and what `commit`, `step` and `finish` received since."""
        return self._number("num_tokens")

    @property
    def cached_length(self) -> int:
        """Prompt tokens that were cached. Their KV need not be computed."""
        return self._number("cached")

    @property
    def length(self) -> int:
        """Tokens that have slots, `slots[:length]`."""
        return self._number("length")

    @property
    def committed(self) -> int:
        """Tokens that are in the tree, whole pages. Other requests can reuse them."""
        return self._number("committed")

    @property
    def tokens(self) -> np.ndarray:
        """The known tokens, int64 [num_tokens]: a copy. O(num_tokens); waits for an index on a GPU.

        Raises ValueError unless the request is running.
        """
        return self.owner.tokens_of(self._running_row("tokens"))

    @property
    def pages(self) -> torch.Tensor:
        """The KV page of each `page_size` tokens so far: int32 [pages] on the device of the KV cache, a view.

        A `commit` may replace pages by those of another request that computed the same tokens: read them again then.
        Raises ValueError unless the request is running.
        """
        return self.owner.pages_of(self._running_row("pages"), self.length)

    @property
    def slots(self) -> torch.Tensor:
        """The KV slot of each token so far: int32 [length] on the device of the KV cache.

        The first `cached_length` slots hold KV already. A `commit` may replace slots by those of another request that
        computed the same tokens, so read `slots` again after a commit. Raises ValueError unless the request is running.
        """
        return self.owner.slots_of(self._running_row("slots"), self.length)

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

    def _running_row(self, what: str) -> int:
        if not self._is_running():
            raise ValueError(f"a request that {self.why_not_running()} has no {what}")
        return self._row

    def why_not_running(self) -> str:
        return f"was refused ({self.refusal})" if self.serial == 0 else "has ended"

    def __repr__(self) -> str:
        running = self._is_running()
        what = f"{self.length} slots, {self.committed} committed" if running else self.why_not_running()
        return f"Request({self.num_tokens} tokens, {self.cached_length} were cached, {what})"


class Requests(Sequence[Request]):
    """A batch of requests of one cache: a sequence of `Request` views, and their numbers as arrays.

    rows: int64 [B], the row of each request in the cache's tables, -1 for a refused request. serials: int64 [B], 0 for
    a refused one. The arrays are not to be changed.
    """

    __slots__ = ("_views", "owner", "rows", "serials")

    def __init__(
        self, owner: Owner, rows: np.ndarray, serials: np.ndarray, refused: dict[int, Request] | None = None
    ) -> None:
        self.owner = owner
        self.rows = rows
        self.serials = serials
        self._views = refused or {}  # by position: the requests that were looked at, and those that were refused

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Request: ...

    @overload
    def __getitem__(self, index: slice | np.ndarray | Sequence[int]) -> Requests: ...

    def __getitem__(self, index: Any) -> Any:
        """Return the view of one request, or the batch of some: a slice, positions, or bool [B]."""
        if isinstance(index, int | np.integer):
            at = range(len(self.rows))[index]
            if at not in self._views:
                self._views[at] = self.owner.view(int(self.rows[at]), int(self.serials[at]))
            return self._views[at]
        chosen = index if isinstance(index, slice) else np.asarray(index, None if len(index) else np.int64)
        positions = np.arange(len(self.rows))[chosen]
        views = {new: self._views[old] for new, old in enumerate(positions.tolist()) if old in self._views}
        return Requests(self.owner, self.rows[positions], self.serials[positions], views)

    def __iter__(self) -> Iterator[Request]:
        return (self[at] for at in range(len(self.rows)))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[Request]) -> list[Request]:
        return [*self, *other]

    @property
    def running(self) -> np.ndarray:
        """Whether each request is running: bool [B]."""
        found: np.ndarray = (self.rows >= 0) & (self.owner.columns.serial[self.rows] == self.serials)
        return found

    def only_running(self) -> Requests:
        """Return those that are running."""
        return self[self.running]

    def _numbers(self, name: str) -> np.ndarray:
        found: np.ndarray = np.where(self.running, getattr(self.owner.columns, name)[self.rows], 0)
        return found

    @property
    def cached_lengths(self) -> np.ndarray:
        """`cached_length` of each running request, else 0: int64 [B]."""
        return self._numbers("cached")

    @property
    def lengths(self) -> np.ndarray:
        """`length` of each running request, else 0: int64 [B]."""
        return self._numbers("length")

    @property
    def num_tokens(self) -> np.ndarray:
        """`num_tokens` of each running request, else 0: int64 [B]."""
        return self._numbers("num_tokens")

    @property
    def committed(self) -> np.ndarray:
        """`committed` of each running request, else 0: int64 [B]."""
        return self._numbers("committed")

    def __repr__(self) -> str:
        return f"Requests({len(self)}, of which {int(self.running.sum())} are running)"
