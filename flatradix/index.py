"""Index: the operations that every index of a tree implements, and the detection of interrupted calls.

A signal handler, a timer or a lack of memory may end a call between any two steps of its Python. So a call that changes
a tree first records that it has begun, then changes the tree, and last records that it has ended. If the next call
finds a call that has begun and not ended, it undoes that call. An eviction cannot be undone: the next eviction returns
its slots. A reset is not undone. Any other call that raises leaves at most new times of use, hit counts, priorities and
splits of edges.

Each call is also a gate. It begins with `busy, self.busy = self.busy, True`, and sets `busy` to False as it returns. If
`busy` was set, then a call has raised, or another call is under way, of this thread or another: `take_gate` looks at
the stacks, and raises RuntimeError in the second case. The first line is atomic: between its two halves CPython neither
switches threads nor runs a signal handler, as the line jumps nowhere and calls nothing (tests/tree/test_threads.py).
"""

from __future__ import annotations

import inspect
import random
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Collection
from types import CodeType, FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from flatradix.dropping import NOT_GIVEN
from flatradix.inputs.options import Options
from flatradix.inputs.ragged import Ragged
from flatradix.inspect.content import Content, Paths, Saved
from flatradix.pins import NO_PINS, Pins, check_budget, pins_left, read_ends, read_now, rows_at
from flatradix.results import EvictIntoResult, EvictResult, InsertResult, MatchResult

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")
T = TypeVar("T")
_YIELDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_WALKS = 1000  # far more than it takes to look at a thread while none of its generators yields
_ATTEMPTS = 12
_FIRST_WAIT = 50e-6  # seconds; each wait may be twice as long as the one before
_NONE, _INSPECTS, _UNDER_WAY = range(3)
_OF_ANOTHER_THREAD = (
    "another thread is in a call of the same object: hold a lock of your own around each call, or make all calls in "
    "one thread"
)
_calls: set[CodeType] = set()


def public_call(method: F) -> F:
    """Mark a method as a call that may be under way. The mark adds no cost to the call."""
    _calls.add(method.__code__)
    return method


def take_gate(home: Any) -> None:
    """Let a call pass whose gate was busy: the last call has raised, or a call is under way.

    Inspects the stacks of all threads: nothing else can tell whether that call was interrupted for good, is paused
    while a signal handler runs, or is of another thread. Raises RuntimeError if a call of `home` is under way. A call
    that ends meanwhile opens the gate, and one more may pass. So `busy` gets a value of its own before the inspection.
    If it still has this value afterwards, nobody has passed.

    Of threads that inspect at once, each waits for a random time and inspects again. There is no lock: an interruption
    could leave a lock locked for ever.
    """
    rivals = False
    for attempt in range(_ATTEMPTS):
        if rivals:
            time.sleep(random.random() * _FIRST_WAIT * 2**attempt)
        competes = True
        token = home.busy = object()
        rivals = _other_threads_at_the_gate(home)
        if not rivals and home.busy is token:
            return
        competes = False  # noqa: F841 - other threads read it in this frame
    raise RuntimeError(_OF_ANOTHER_THREAD)


def _use_of(home: Any, frame: FrameType | None) -> int | None:
    """Return what the calls of `home` are doing on a stack, from `frame` outwards: nothing, inspecting, or more.

    Returns None if the walk was cut short: a generator that has yielded meanwhile does not lead outwards any more.
    """
    use = _NONE
    at_gate = competes = False
    code = None
    while frame is not None:
        code = frame.f_code
        if code is take_gate.__code__:
            if frame.f_locals.get("home") is home:
                at_gate, competes = True, frame.f_locals.get("competes", True)
        elif code in _calls:
            of = frame.f_locals.get("self")
            if of is home or getattr(of, "gate", None) is home:
                if not at_gate:
                    return _UNDER_WAY
                at_gate = False
                if competes:
                    use = _INSPECTS
        frame = frame.f_back
    return None if code is not None and code.co_flags & _YIELDS else use


def _use_by(home: Any, thread: int) -> int:
    """Return what the calls of `home` in a thread are doing, or may be doing."""
    for _ in range(_WALKS):
        use = _use_of(home, sys._current_frames().get(thread))
        if use is not None:
            return use
    return _UNDER_WAY


def _other_threads_at_the_gate(home: Any) -> bool:
    """Return whether a call of another thread inspects, too. Raises RuntimeError if a call of `home` is under way."""
    if _use_of(home, sys._getframe(1)) == _UNDER_WAY:
        raise RuntimeError("called from within another call of the same object, as by a signal handler: call it later")
    found = False
    own = threading.get_ident()
    for thread in list(sys._current_frames()):  # no frames: one that holds itself keeps alive what its callers hold
        use = _NONE if thread == own else _use_by(home, thread)
        if use == _UNDER_WAY:
            raise RuntimeError(_OF_ANOTHER_THREAD)
        found |= use == _INSPECTS
    return found


class Index(ABC):
    """The operations of a tree on one kind of device. `RadixTree` defines what they mean."""

    options: Options
    device: torch.device
    _keeper: weakref.ref[Any] | None = None
    _pins: Pins = NO_PINS  # soft pins with an end
    busy: object = False  # whether a call has begun and not returned: it runs, or has raised
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

    @abstractmethod
    def recover(self) -> None:
        """Undo an interrupted call, if there is one. Raises RuntimeError if a call is under way."""

    def _settle(self) -> None:
        """Do what `recover` does, for a call that only reads."""
        self.recover()
        self.busy = False

    @public_call
    def settle(self) -> None:
        """Undo an interrupted call, if there is one. Raises RuntimeError if a call is under way."""
        if self.busy:
            self._settle()

    @public_call
    def paths(self) -> Paths:
        """Return the columns of the tree that lead from a row to the root. Do not write to them."""
        busy, self.busy = self.busy, True
        if busy:
            self.recover()
        found = self.read_paths()
        self.busy = False
        return found

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
        busy, self.busy = self.busy, True
        if busy:
            self.recover()
        self.pack()
        self.busy = False

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
        busy, self.busy = self.busy, True
        if busy:
            self.recover()
        if compacted:
            self.pack()
        result = work(self.read_content(slots, only))
        self.busy = False
        return result

    @abstractmethod
    def read_content(self, slots: bool, only: Collection[str] | None = None) -> Content:
        """Do what `content` does, for a call that is under way already."""

    @abstractmethod
    def restore(self, saved: Saved) -> None:
        """Fill an empty tree with the arrays of a saved tree, and rebuild the arrays that follow from them."""
