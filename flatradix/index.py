"""Index: what any home of a tree must do, and how a call that was cut short is told from one that is under way.

A signal handler, a timer or a lack of memory may end a call between any two steps of its Python. So a call that changes
a tree says that it begins, changes the tree, and says that it has ended as the last thing it does. Where the next call
finds one that has begun and not ended, it takes back what that one did. An eviction cannot be taken back: its slots
come with the next one; a reset stays done. So any other call that raises has changed nothing but times of use and cuts.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch

from flatradix.inputs.options import Options
from flatradix.inputs.ragged import Ragged
from flatradix.inspect.content import Content, Saved
from flatradix.results import EvictResult, InsertResult, MatchResult

F = TypeVar("F", bound=Callable[..., Any])
_calls: set[CodeType] = set()


def public_call(method: F) -> F:
    """Mark a method as a call that may be under way; costs nothing."""
    _calls.add(method.__code__)
    return method


def _is_under_way(home: object, frame: FrameType | None, besides: int) -> bool:
    """Whether a call of `home`, more than `besides` of them, is among a frame and those that called it."""
    while frame is not None:
        if frame.f_code in _calls and frame.f_locals.get("self") is home:
            besides -= 1
            if besides < 0:
                return True
        frame = frame.f_back
    return False


def refuse_reentry(home: object) -> None:
    """Raise RuntimeError if another call of `home` is under way than the one that asks.

    Looks at the stacks of all threads: it is asked for only where a call has not ended. Nothing else could tell a call
    that was cut short from one that a signal handler has interrupted.
    """
    if _is_under_way(home, sys._getframe(1), besides=1):
        raise RuntimeError("called from within another call of the same object, as by a signal handler: call it later")
    me = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        if thread != me and _is_under_way(home, frame, besides=0):
            raise RuntimeError("called while another thread is in a call of the same object: one thread at a time")


class Index(ABC):
    """The operations of a tree in one place, as `RadixTree` says what they mean."""

    options: Options
    device: torch.device
    last_result: MatchResult | InsertResult | EvictResult | None = None

    @abstractmethod
    def __init__(self, options: Options, device: torch.device, generation: int) -> None:
        """An empty tree. generation: where those of its handles begin."""

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
    def evict(self, num_tokens: int) -> EvictResult: ...

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
        """Bring all edges to the front of the pools, without gaps. O(cached tokens)."""

    @abstractmethod
    def digest(self) -> str: ...

    @abstractmethod
    def reset(self) -> None: ...

    @abstractmethod
    def raise_pending(self) -> None: ...

    @abstractmethod
    def content(self) -> Content:
        """Everything the tree holds, to be read only. Waits for the device."""

    @abstractmethod
    def restore(self, saved: Saved) -> None:
        """Fill an empty tree with what another was saved as; what follows from it is made anew."""
