"""Index: the operations that every index of a tree implements, and the detection of interrupted calls.

A signal handler, a timer or a lack of memory may end a call between any two steps of its Python. So a call that changes
a tree first records that it has begun, then changes the tree, and last records that it has ended. If the next call
finds a call that has begun and not ended, it undoes that call. An eviction cannot be undone: the next eviction returns
its slots. A reset is not undone. Any other call that raises leaves at most new times of use, hit counts, priorities and
splits of edges.
"""

from __future__ import annotations

import sys
import threading
import weakref
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch

from flatradix.inputs.options import Options
from flatradix.inputs.ragged import Ragged
from flatradix.inspect.content import Content, Paths, Saved
from flatradix.results import EvictIntoResult, EvictResult, InsertResult, MatchResult

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_calls: set[CodeType] = set()


def public_call(method: F) -> F:
    """Mark a method as a call that may be under way. The mark adds no cost to the call."""
    _calls.add(method.__code__)
    return method


def _is_under_way(home: object, frame: FrameType | None, besides: int) -> bool:
    """Return whether more than `besides` calls of `home` are on the stack, from `frame` outwards."""
    while frame is not None:
        if frame.f_code in _calls and frame.f_locals.get("self") is home:
            besides -= 1
            if besides < 0:
                return True
        frame = frame.f_back
    return False


def refuse_reentry(home: object) -> None:
    """Raise RuntimeError if a call of `home` other than the caller's is under way.

    Inspects the stacks of all threads. It runs only when a recorded call has not ended. Nothing else can tell whether
    that call was interrupted for good, or is paused while a signal handler runs.
    """
    if _is_under_way(home, sys._getframe(1), besides=1):
        raise RuntimeError("called from within another call of the same object, as by a signal handler: call it later")
    me = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        if thread != me and _is_under_way(home, frame, besides=0):
            raise RuntimeError("called while another thread is in a call of the same object: one thread at a time")


class Index(ABC):
    """The operations of a tree on one kind of device. `RadixTree` defines what they mean."""

    options: Options
    device: torch.device
    _keeper: weakref.ref[Any] | None = None
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
    def settle(self) -> None:
        """Undo an interrupted call, if there is one. Raises RuntimeError if a call is under way."""

    @abstractmethod
    def paths(self) -> Paths:
        """Return the columns of the tree that lead from a row to the root. Do not write to them."""

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

    @abstractmethod
    def compact(self) -> None:
        """Move all edges to the front of the pools, without gaps. O(cached tokens)."""

    @abstractmethod
    def digest(self) -> str: ...

    @abstractmethod
    def reset(self) -> None: ...

    @abstractmethod
    def raise_pending(self) -> None: ...

    @abstractmethod
    def content(self, slots: bool = True) -> Content:
        """Return everything the tree holds, read-only; without `slots`, all but the slots. Waits for the device."""

    @abstractmethod
    def restore(self, saved: Saved) -> None:
        """Fill an empty tree with the arrays of a saved tree, and rebuild the arrays that follow from them."""
