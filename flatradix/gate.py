"""Gate: one call of an object at a time, and after a call that raised, the next call repairs what it left.

The object, `home` below, has a field `busy`: FREE; or the number of a thread (`get_ident`) whose call has begun and not
returned; or CUT_SHORT, if that call has raised. Objects can share a gate: the field `gate` of a waiting queue is the
index of its tree. A call takes the gate, and opens it by `home.busy = FREE` as it returns:

    me = get_ident()
    home.busy = me if not home.busy else take_gate(home, me)
    try:
        ...
    except BaseException:
        if home.busy == me:
            home.busy = CUT_SHORT
        raise

The records of an object tell what a call has left. A call of such an object uses `take_over` in place of `take_gate`.

From the look at `busy` to its store, CPython 3.10 to 3.13 neither switches threads nor runs a signal handler or a
tracer of lines: where the gate is free, the line calls nothing and takes no jump but forwards and without a condition
(tests/tree/test_threads.py). A tracer of bytecodes, branches or jumps could switch there. There is no lock, because
taking one takes three times as long (bench/RESULTS.md). No call looks at the stack of another thread: CPython 3.11 may
collect garbage while it does so, which lets the other thread go on and leave the frames that are being read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from threading import get_ident
from types import CodeType, FrameType
from typing import Any, TypeVar
from weakref import WeakSet

F = TypeVar("F", bound=Callable[..., Any])
FREE, CUT_SHORT = 0, -1
_OF_ANOTHER_THREAD = (
    "another thread is in a call of the same object: hold a lock of your own around each call, or make all calls in "
    "one thread"
)
_calls: set[CodeType] = set()
_homes: WeakSet[Any] = WeakSet()


def public_call(method: F) -> F:
    """Mark a method as a call of its `self`: of the frames of each call, exactly one runs such a method."""
    _calls.add(method.__code__)
    return method


def add_gate(home: Any) -> None:
    """Give an object a gate, which is free."""
    home.busy = FREE
    _homes.add(home)


def take_gate(home: Any, me: int) -> int:
    """Take a gate that is not free for a call of this thread, `me`, and return `me`.

    Raises RuntimeError if another thread is in a call, or this thread: as in a signal handler. If a signal cuts the
    caller short between this call and the `try` behind it, `busy` stays `me`, and other threads are refused until this
    thread makes a call again.
    """
    if home.busy == me and _is_under_way(home, sys._getframe(1)):
        raise RuntimeError("called from within another call of the same object, as by a signal handler: call it later")
    allowed = FREE, CUT_SHORT, me
    home.busy = me if home.busy in allowed else home.busy  # one line, for the reason above
    if home.busy != me:
        raise RuntimeError(_OF_ANOTHER_THREAD)
    return me


def take_over(home: Any, me: int, repair: Callable[[], None]) -> int:
    """Take a gate as `take_gate` does, and repair what the last call has left. Return `me`."""
    take_gate(home, me)
    try:
        repair()
    except BaseException:
        if home.busy == me:
            home.busy = CUT_SHORT
        raise
    return me


def _after_fork() -> None:
    """In the child of a fork, end the calls of the threads that only its parent has."""
    me = get_ident()
    for home in tuple(_homes):
        if home.busy not in (FREE, me):
            home.busy = CUT_SHORT


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _is_under_way(home: Any, frame: FrameType | None) -> bool:
    """Return whether a call of `home` has passed the gate, of those on this thread's stack from `frame` outwards.

    frame: of the caller of `take_gate`. The calls of `home` that are about to take the gate do not count.
    """
    at_gate = True
    while frame is not None:
        if frame.f_code is take_gate.__code__:
            at_gate |= frame.f_locals.get("home") is home
        elif frame.f_code in _calls:
            of = frame.f_locals.get("self")
            if of is home or getattr(of, "gate", None) is home:
                if not at_gate:
                    return True
                at_gate = False
        frame = frame.f_back
    return False
