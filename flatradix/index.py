"""Index: the operations that every index of a tree implements, and the detection of interrupted calls.

A signal handler, a timer or a lack of memory may end a call between any two steps of its Python. So a call that changes
a tree first records that it has begun, then changes the tree, and last records that it has ended. If the next call
finds a call that has begun and not ended, it undoes that call. An eviction cannot be undone: the next eviction returns
its slots. A reset is not undone. Any other call that raises leaves at most new times of use, hit counts, priorities and
splits of edges.

Each call also takes the gate of its index: see `flatradix.gate`.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Collection
from threading import get_ident
from typing import Any, TypeVar

import numpy as np
import torch

from flatradix.dropping import NOT_GIVEN
from flatradix.gate import CUT_SHORT, FREE, public_call, take_over
from flatradix.inputs.options import Options
from flatradix.inputs.ragged import Ragged
from flatradix.inspect.content import Content, Paths, Saved
from flatradix.pins import NO_PINS, Pins, check_budget, pins_left, read_ends, read_now, rows_at
from flatradix.results import EvictIntoResult, EvictResult, InsertResult, MatchResult

R = TypeVar("R")
T = TypeVar("T")


class Index(ABC):
    """The operations of a tree on one kind of device. `RadixTree` defines what they mean."""

    options: Options
    device: torch.device
    _keeper: weakref.ref[Any] | None = None
    _pins: Pins = NO_PINS  # soft pins with an end
    busy: int  # see `flatradix.gate`
    last_result: MatchResult | InsertResult | EvictResult | EvictIntoResult | None = None

    @abstractmethod
    def __init__(self, options: Options, device: torch.device, generation: int) -> None:
        """Make an empty tree. generation: the first generation of its handles."""

    @abstractmethod
    def match(
        self,
        q: Any,
        namespace: Any = None,
        touch: bool = True,
        lock: bool = False,
        start: Any = None,
        split: bool = False,
    ) -> MatchResult: ...

    @abstractmethod
    def match_array(
        self, tokens: array[int], limit: int | None = None, namespace: Any = None, split: bool = False
    ) -> MatchResult: ...

    @abstractmethod
    def slots(self, places: Any) -> Ragged: ...

    @abstractmethod
    def tokens(self, places: Any) -> Ragged: ...

    @abstractmethod
    def path_slots(self, place: Any) -> torch.Tensor: ...

    @abstractmethod
    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None: ...

    @abstractmethod
    def lock(self, places: Any) -> None: ...

    @abstractmethod
    def unlock(self, places: Any) -> None: ...

    @abstractmethod
    def split(self, places: Any) -> None: ...

    @abstractmethod
    def rematch(self, q: Any, places: Any, namespace: Any = None) -> MatchResult: ...

    @abstractmethod
    def alive(self, places: Any) -> torch.Tensor: ...

    @abstractmethod
    def want(self, places: Any, until: Any = None) -> None: ...

    @abstractmethod
    def unwant(self, places: Any, until: Any = None) -> None: ...

    @abstractmethod
    def expire(self, now: Any) -> int: ...

    @abstractmethod
    def are_alive(self, handles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return whether each of some places in host memory is in the tree: bool [B]. For a call under way."""

    @abstractmethod
    def read_own_wants(self) -> np.ndarray:
        """Return the number of soft pins that end at each row of `read_paths`, int32 [R]. For a call under way."""

    def _check_budget(self, handles: np.ndarray, lengths: np.ndarray) -> None:
        """Raise CapacityError if `want` of these places would exceed the pin budget.

        Stale places are left to `want`, which refuses them. Dropped ones pin nothing.
        """
        budget = self.options.pin_budget
        if budget is not None:
            alive = self.are_alive(handles, lengths)
            check_budget(budget, self.read_paths(), self.read_own_wants(), handles[alive], lengths[alive])

    def _pins_left(self, handles: np.ndarray, lengths: np.ndarray, until: Any) -> Pins:
        """Return what `unwant` of these places leaves of the pins with an end."""
        ends = None if until is None else read_ends(until, len(handles))
        pins, alive = self._pins, self.are_alive(handles, lengths)
        rows = np.full(len(handles), -1, np.int64)
        rows[alive] = rows_at(self.read_paths(), handles[alive], lengths[alive])
        return pins_left(pins, self.are_alive(pins.handles, pins.lengths), self.read_own_wants(), rows, lengths, ends)

    def _pins_at(self, now: Any) -> tuple[Pins, Pins]:
        """Return the pins that end at a time of the caller's clock, and those that go on. Others have ended before."""
        time, pins = read_now(now), self._pins
        alive, over = self.are_alive(pins.handles, pins.lengths), pins.ends <= time
        return pins.kept(alive & over), pins.kept(alive & ~over)

    def _replace_pins(self, pins: Pins, during: Any) -> None:
        """Replace the pins with an end, as a part of a call that `recover` undoes if it is interrupted."""
        self._pins = pins.made_by(during, self._pins)

    def recover(self, me: int) -> int:
        """Take the gate for a call of this thread, `me`, and undo an interrupted call, if there is one. Return `me`.

        Raises RuntimeError if a call is under way.
        """
        return take_over(self, me, self._repair)

    @abstractmethod
    def _repair(self) -> None:
        """Undo or finish an interrupted call. Depends only on the tree, so this method may itself be interrupted."""

    def _settle(self) -> None:
        """Do what `recover` does, for a call that only reads."""
        self.recover(get_ident())
        self.busy = FREE

    @public_call
    def settle(self) -> None:
        """Undo an interrupted call, if there is one. Raises RuntimeError if a call is under way."""
        if self.busy:
            self._settle()

    @public_call
    def paths(self) -> Paths:
        """Return the columns of the tree that lead from a row to the root. Do not write to them."""
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            found = self.read_paths()
            self.busy = FREE
            return found
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @abstractmethod
    def read_paths(self) -> Paths:
        """Do what `paths` does, for a call that is under way already."""

    def capture(self, function: Callable[[], T]) -> Callable[[], T]:
        """Return `function`, or what runs it as a CUDA graph."""
        return function

    def keep_for(self, keeper: Any) -> None:
        """Let every later eviction spare what a waiting queue wants, as long as the queue lives.

        keeper: the part of the queue that watches this index. Raises ValueError if another queue keeps already.
        """
        if self._keeper is not None and self._keeper() is not None:
            raise ValueError("another waiting queue keeps what it wants in this tree; a tree takes one with keep=True")
        self._keeper = weakref.ref(keeper)

    def keep_no_longer(self, keeper: Any) -> None:
        """Undo `keep_for`. Does nothing if another queue keeps, or none."""
        if self._keeper is not None and self._keeper() in (None, keeper):
            self._keeper = None

    @abstractmethod
    def insert(
        self,
        q: Any,
        slots: Any,
        namespace: Any = None,
        priority: Any = 0,
        start: Any = None,
        inserted_lengths: Any = 0,
    ) -> InsertResult: ...

    @abstractmethod
    def evict(self, num_tokens: Any, out: torch.Tensor | None = None) -> EvictResult | EvictIntoResult: ...

    @abstractmethod
    def drop(self, places: Any = None, namespace: Any = NOT_GIVEN) -> EvictResult: ...

    @property
    @abstractmethod
    def evictable_tokens(self) -> int: ...

    @property
    @abstractmethod
    def protected_tokens(self) -> int: ...

    @property
    @abstractmethod
    def total_tokens(self) -> int: ...

    @property
    @abstractmethod
    def num_nodes(self) -> int: ...

    @property
    @abstractmethod
    def nbytes(self) -> int: ...

    @abstractmethod
    def changes(self) -> int: ...

    @public_call
    def compact(self) -> None:
        """Move all edges to the front of the pools, without gaps. O(cached tokens)."""
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self.pack()
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @abstractmethod
    def pack(self) -> None:
        """Do what `compact` does, for a call that is under way already."""

    @abstractmethod
    def digest(self) -> str: ...

    @abstractmethod
    def reset(self) -> None: ...

    @abstractmethod
    def raise_pending(self) -> None: ...

    def content(self, slots: bool = True) -> Content:
        """Return everything the tree holds, read-only; without `slots`, all but the slots. Waits for the device."""
        return self.look_at(lambda content: content, slots)

    @public_call
    def look_at(
        self,
        work: Callable[[Content], R],
        slots: bool = True,
        compacted: bool = False,
        only: Collection[str] | None = None,
    ) -> R:
        """Return what `work` makes of the content, in one call: nobody changes the tree meanwhile.

        compacted: compact the pools first. only: the fields of `TreeState` that `work` reads, so that no others are
        copied from a GPU; None is all.
        """
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            if compacted:
                self.pack()
            result = work(self.read_content(slots, only))
            self.busy = FREE
            return result
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @abstractmethod
    def read_content(self, slots: bool, only: Collection[str] | None = None) -> Content:
        """Do what `content` does, for a call that is under way already."""

    @abstractmethod
    def restore(self, saved: Saved) -> None:
        """Fill an empty tree with the arrays of a saved tree, and rebuild the arrays that follow from them."""
