"""Pins: the soft pins of a tree that have an end, and the tokens that all soft pins spare.

The tree counts the pins of each node, and forgets them when the node goes. Their ends in time are kept here: a table in
host memory, replaced as a whole by each call that changes it, so that an interrupted call can be taken back.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from flatradix.errors import CapacityError, QueryError
from flatradix.inspect.content import Paths
from flatradix.layout.handles import ROW_MASK
from flatradix.layout.state import FREE_ROW


class Pins(NamedTuple):
    """The pins with an end: one place and one end each. A pin whose place was evicted has ended, and may still be here.

    handles: int64 [N]. lengths: int32 [N], never 0. ends: float64 [N]. during: the open call that made this table, and
    before: the table before that call, for the case that the call is interrupted and undone.
    """

    handles: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    during: Any = None
    before: Pins | None = None

    @property
    def size(self) -> int:
        return len(self.handles)

    def kept(self, keep: np.ndarray) -> Pins:
        """Return the table without some pins. keep: bool [N]."""
        return Pins(self.handles[keep], self.lengths[keep], self.ends[keep])

    def with_more(self, handles: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> Pins:
        """Return the table with more pins. A pin of the root pins nothing and is left out."""
        new = lengths > 0
        return Pins(
            np.concatenate([self.handles, handles[new]]),
            np.concatenate([self.lengths, lengths[new]]),
            np.concatenate([self.ends, ends[new]]),
        )

    def made_by(self, call: Any, before: Pins) -> Pins:
        """Return the table as a new version that `call` makes of `before`."""
        return self._replace(during=call, before=before._replace(during=None, before=None))

    def undone(self, call: Any) -> Pins:
        """Return the table as it was before `call`, which was interrupted."""
        return self if self.before is None or self.during != call else self.before


NO_PINS = Pins(np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float64))


def read_ends(until: Any, queries: int) -> np.ndarray:
    """Return the ends of pins, float64 [B], from one number for all or one number a place.

    Raises ValueError for what is no number, and for NaN.
    """
    try:
        if isinstance(until, torch.Tensor):
            until = until.numpy(force=True)
        ends = np.asarray(until)
        right = ends.shape in ((), (queries,)) and (ends.dtype.kind in "iuf" or ends.size == 0)
        ends = ends.astype(np.float64)
    except (TypeError, ValueError):
        right = False
    if not right or np.isnan(ends).any():
        raise ValueError(f"until must be a number, or {queries} numbers, one a place, and not NaN; not {until!r}")
    return np.full(queries, ends) if ends.shape == () else ends


def read_now(now: Any) -> float:
    """Return the caller's time, checked. Raises ValueError."""
    try:
        return float(read_ends(now, 1)[0])
    except ValueError:
        raise ValueError(f"now must be a number, and not NaN; not {now!r}") from None


def rows_at(paths: Paths, handles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the row on whose edge each place lies, int64 [B]; 0 for the root. All places must be alive."""
    rows, starts = handles & ROW_MASK, paths.ends - paths.lengths
    while (higher := (rows > 0) & (starts[rows] >= lengths)).any():
        rows[higher] = paths.parents[rows[higher]]
    return np.maximum(rows, 0)


def tokens_spared(paths: Paths, own_wants: np.ndarray, rows: np.ndarray, lengths: np.ndarray) -> int:
    """Return how many tokens are pinned, each once, with those of some places that may lie inside edges.

    own_wants: int32 [R], the pins that end at each row. rows, lengths: the places, int64 [B]; row 0 is the root.
    O(rows + nodes that are pinned).
    """
    pinned = np.zeros(len(paths.parents), np.int64)  # tokens of each edge, from its start
    np.maximum.at(pinned, rows, lengths - (paths.ends - paths.lengths)[rows])
    tips = np.flatnonzero((own_wants > 0) & (paths.parents != FREE_ROW))
    pinned[tips] = paths.lengths[tips]
    seen = np.zeros(len(pinned), np.bool_)
    above = np.concatenate([tips, rows[rows > 0]])
    while len(above):
        above = np.unique(paths.parents[above])
        above = above[above > 0]
        above = above[~seen[above]]
        seen[above] = True
        pinned[above] = paths.lengths[above]
    return int(pinned[1:].sum())


def check_budget(budget: int, paths: Paths, own_wants: np.ndarray, handles: np.ndarray, lengths: np.ndarray) -> None:
    """Raise CapacityError if more tokens than `budget` would be pinned, with some places, which must be alive."""
    nothing = np.empty(0, np.int64)
    after = tokens_spared(paths, own_wants, rows_at(paths, handles, lengths), lengths)
    if after > budget:
        before = tokens_spared(paths, own_wants, nothing, nothing)
        more, left = after - before, budget - before
        raise CapacityError(
            f"want: {more} more tokens would be pinned, but {max(left, 0)} are left of pin_budget={budget}: "
            f"{after - budget} too many; unwant or expire other pins first, or pin shorter prefixes",
            more, left,
        )  # fmt: skip


def _keys(rows: np.ndarray, ends: np.ndarray | float) -> np.ndarray:
    """Return numbers that sort by row, then by end: numpy compares complex numbers in this way."""
    keys = np.empty(len(rows), np.complex128)
    keys.real, keys.imag = rows, ends
    return keys


def _ranks(keys: np.ndarray) -> np.ndarray:
    """Return for each key how many equal keys come before it, int64 [B]."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    ranks = np.empty(len(keys), np.int64)
    ranks[order] = np.arange(len(keys)) - np.searchsorted(ordered, ordered)
    return ranks


def _refuse_end(query: int, length: int, end: float) -> NoReturn:
    raise QueryError(
        f"unwant: query {query}: no pin with the end {end!r} ends at its length {length}: give `until` as to want, and "
        "unwant once for each want",
        query,
    )


def pins_left(
    pins: Pins, live: np.ndarray, own_wants: np.ndarray, rows: np.ndarray, lengths: np.ndarray, ends: np.ndarray | None
) -> Pins:
    """Return the pins with an end that an `unwant` of some places leaves, without those that have ended already.

    live: bool [N], the pins whose places are alive. own_wants: int32 [R]. rows: int64 [B], the row of each place, -1 if
    the place is gone. ends: float64 [B], the ends that the pins were given; None takes a pin without an end if there is
    one at the place, else the pin that ends first.

    Raises QueryError if no pin with such an end is at a place.
    """
    at = np.flatnonzero(live)
    known = _keys(pins.handles[at] & ROW_MASK, pins.ends[at])
    order = np.argsort(known)
    at, known = at[order], known[order]
    low, high = (-np.inf, np.inf) if ends is None else (ends, ends)
    first = np.searchsorted(known, _keys(rows, low), "left")
    count = np.searchsorted(known, _keys(rows, high), "right") - first
    rank = _ranks(_keys(rows, 0 if ends is None else ends))
    if ends is None:
        rank -= own_wants[rows] - count
    there = (rows > 0) & (rank < count)
    if ends is not None:
        missing = np.flatnonzero((rows > 0) & ~there)
        if len(missing):
            query = int(missing[0])
            _refuse_end(query, int(lengths[query]), float(ends[query]))
    taken = there & (rank >= 0)
    keep = live.copy()
    keep[at[(first + rank)[taken]]] = False
    return pins.kept(keep)
