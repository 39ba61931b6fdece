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
import os
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch

from flatradix.dropping import NOT_GIVEN
from flatradix.inputs.options import Options
from flatradix.inputs.ragged import Ragged
from flatradix.inspect.content import Content, Paths, Saved
from flatradix.results import EvictIntoResult, EvictResult, InsertResult, MatchResult

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")
T = TypeVar("T")
_YIELDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_WALKS = 1000  # far more than it takes to look at a thread while none of its generators yields
_calls: set[CodeType] = set()


def public_call(method: F) -> F:
    """Mark a method as a call that may be under way. The mark adds no cost to the call."""
    _calls.add(method.__code__)
    return method


_looking = threading.RLock()  # held by the thread that looks for calls under way


def _renew_lock() -> None:
    """In a forked child, forget a thread of the parent that held the lock."""
    global _looking
    _looking = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def take_gate(home: Any) -> None:
    """Let a call pass whose gate was busy: the last call has raised, or a call is under way.

    Inspects the stacks of all threads: nothing else can tell whether that call was interrupted for good, is paused
    while a signal handler runs, or is of another thread. Raises RuntimeError if a call of `home` is under way. A call
    that ends meanwhile opens the gate, and one more may pass. So `busy` gets a value of its own before the inspection.
    If it still has this value afterwards, nobody has passed.
    """
    waiting = True
    with _looking:
        while waiting:
            token = home.busy = object()
            _refuse_calls_under_way(home)
            waiting = home.busy is not token


def _is_under_way(home: Any, frame: FrameType | None) -> bool | None:
    """Return whether a call of `home` is on a stack, from `frame` outwards. One that waits in `take_gate` is not.

    Returns None if the walk was cut short: a generator that has yielded meanwhile does not lead outwards any more.
    """
    waits = False
    code = None
    while frame is not None:
        code = frame.f_code
        if code is take_gate.__code__:
            waits |= frame.f_locals["home"] is home and frame.f_locals.get("waiting", True)
        elif code in _calls:
            of = frame.f_locals.get("self")
            if of is home or getattr(of, "gate", None) is home:
                if not waits:
                    return True
                waits = False
        frame = frame.f_back
    return None if code is not None and code.co_flags & _YIELDS else False


def _is_in_thread(home: Any, thread: int) -> bool:
    """Return whether a call of `home` is under way in a thread, or may be."""
    for _ in range(_WALKS):
        found = _is_under_way(home, sys._current_frames().get(thread))
        if found is not None:
            return found
    return True


def _refuse_calls_under_way(home: Any) -> None:
    if _is_under_way(home, sys._getframe(1)):
        raise RuntimeError("called from within another call of the same object, as by a signal handler: call it later")
    own = threading.get_ident()
    for thread in list(sys._current_frames()):  # no frames: one that holds itself keeps alive what its callers hold
        if thread != own and _is_in_thread(home, thread):
            raise RuntimeError(
                "another thread is in a call of the same object: hold a lock of your own around each call, or make all "
                "calls in one thread"
            )


class Index(ABC):
    """The operations of a tree on one kind of device. `RadixTree` defines what they mean."""

    options: Options
    device: torch.device
    _keeper: weakref.ref[Any] | None = None
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
    def want(self, places: Any) -> None: ...

    @abstractmethod
    def unwant(self, places: Any) -> None: ...

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
    def look_at(self, work: Callable[[Content], R], slots: bool = True, compacted: bool = False) -> R:
        """Return what `work` makes of the content, in one call: nobody changes the tree meanwhile.

        compacted: compact the pools first.
        """
        busy, self.busy = self.busy, True
        if busy:
            self.recover()
        if compacted:
            self.pack()
        result = work(self.read_content(slots))
        self.busy = False
        return result

    @abstractmethod
    def read_content(self, slots: bool) -> Content:
        """Do what `content` does, for a call that is under way already."""

    @abstractmethod
    def restore(self, saved: Saved) -> None:
        """Fill an empty tree with the arrays of a saved tree, and rebuild the arrays that follow from them."""
