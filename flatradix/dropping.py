"""Dropping: which nodes a drop concerns, planned in numpy from a tree's columns, for both homes of a tree.

A drop is rare, so a few passes over all rows do no harm, and both devices do the same by construction.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from flatradix.inputs import namespaces
from flatradix.inputs.refuse import refuse
from flatradix.layout import reasons
from flatradix.layout.dropped import DETACHED, DROPPED, time_of
from flatradix.layout.handles import GENERATION_MASK, ROW_BITS, ROW_MASK
from flatradix.layout.state import FREE_ROW

COLUMNS = ("parent", "length", "end", "lock_ref", "tick", "created", "generation")


T = TypeVar("T", np.ndarray, torch.Tensor)


def times_of(created: T) -> T:
    """Return the times at which nodes were made, dropped or not."""
    return time_of(created)  # type: ignore[arg-type, return-value]


def are_detached(created: np.ndarray) -> np.ndarray:
    """Return bool [N]: whether each node is the top of a dropped part, which no look-up finds."""
    return created < -DROPPED


class _Everything:
    """The default of `namespace`, as None is the name of a namespace."""

    def __repr__(self) -> str:
        return "..."


NOT_GIVEN: Any = _Everything()


class Plan(NamedTuple):
    """What a drop does. All are int64 arrays.

    kept: the locked rows that it marks. less: DROPPED or DETACHED for each. victims: the rows that it frees, in order.
    tokens: those of the victims.
    """

    kept: np.ndarray
    less: np.ndarray
    victims: np.ndarray
    tokens: int

    @property
    def hidden(self) -> np.ndarray:
        """The rows that are detached."""
        return self.kept[self.less == DETACHED]


def check_arguments(places: Any, namespace: Any) -> None:
    """Raise ValueError unless exactly one of both is given."""
    if (places is None) == (namespace is NOT_GIVEN):
        raise ValueError("drop takes either places, or namespace=, of which None is the nameless one")
    if namespace is not NOT_GIVEN:
        namespaces.check(namespace)


class Settings(NamedTuple):
    """What places depend on, beside the rows. first_generation: what handles add to the generation of a row."""

    first_generation: int
    page_size: int
    by_page: bool


class Rows(NamedTuple):
    """The columns of a tree in host memory, cut down to the rows in use."""

    parent: np.ndarray
    length: np.ndarray
    end: np.ndarray
    lock_ref: np.ndarray
    tick: np.ndarray
    created: np.ndarray
    generation: np.ndarray
    settings: Settings

    def of_places(self, handles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return int64 [B]: the row on whose edge each place lies. Raises the errors of `RadixTree.drop`."""
        found = np.empty(len(handles), np.int64)
        for query, (handle, length) in enumerate(zip(handles.tolist(), lengths.tolist(), strict=True)):
            found[query] = row = self._row_of(handle, length)
            if row == 0:
                row = reasons.WHOLE_TREE
            if row < 0:
                refuse("drop", row, query, length)
        return found

    def _row_of(self, handle: int, length: int) -> int:
        """Return the row of a place, as `resolve` of the kernels does, or the reason why there is none."""
        row, settings = handle & ROW_MASK, self.settings
        if handle < 0 or row >= len(self.parent) or self.parent[row] == FREE_ROW:
            return reasons.STALE
        if handle >> ROW_BITS != (settings.first_generation + int(self.generation[row])) & GENERATION_MASK:
            return reasons.STALE
        end = int(self.end[row])
        if length < 0 or length > end or length % settings.page_size != 0:
            cut = row > 0 and length > end and length % settings.page_size == 0
            return reasons.STALE if cut and settings.by_page else reasons.NOT_THERE
        while row > 0 and self.end[row] - self.length[row] >= length:
            row = int(self.parent[row])
        return max(row, 0)

    def tops_of(self, namespace: int) -> np.ndarray:
        """Return int64: the rows at the top of a namespace, given by its code."""
        return np.flatnonzero(self.parent == ~namespace) if namespace >= 0 else np.empty(0, np.int64)

    def plan(self, tops: np.ndarray) -> Plan:
        """Return what a drop of these rows and all rows below does. O(rows x log of the depth).

        What earlier drops left and is not locked any more goes, too. The order is that in which an eviction would free
        it all: by tick, of equal ticks the deeper first, as those are on one path.
        """
        live = self.parent != FREE_ROW
        live[0] = False
        known = live & (self.created < 0)
        marked = self._with_all_below(tops)
        free = self.lock_ref == 0
        victims = np.flatnonzero((marked | known) & free)
        victims = victims[np.lexsort((-self.end[victims].astype(np.int64), self.tick[victims]))]
        kept = np.flatnonzero(marked & ~known & ~free)
        above = np.maximum(self.parent[kept], 0)
        less = np.where((marked | known)[above], DROPPED, DETACHED)
        return Plan(kept, less, victims, int(self.length[victims].sum(dtype=np.int64)))

    def _with_all_below(self, tops: np.ndarray) -> np.ndarray:
        """Return bool [R]: whether each row is one of `tops`, or below one."""
        marked = np.zeros(len(self.parent), np.bool_)
        marked[tops] = True
        above = np.maximum(self.parent, 0)
        while above.any():  # twice as far up each time
            marked |= marked[above]
            above = above[above]
        return marked
