"""Gate: one call of an object at a time, and a call that was cut short is found by the next one.

An object with a gate, its `home`, has a field `busy`: FREE, the thread whose call has begun and not returned, or
CUT_SHORT. A call takes the gate, and opens it by `home.busy = FREE` as it returns:

    me = get_ident()
    if home.busy:
        take_gate(home, me)
    home.busy = me
    try:
        ...
    except BaseException:
        cut_short(home, me)
        raise

Between the look at `busy` and the store, CPython neither switches threads nor runs a signal handler: where the gate is
free, nothing is called in between, and no jump leads backwards (tests/tree/test_threads.py). There is no lock, because
taking one takes three times as long (bench/RESULTS.md). No call looks at the stack of another thread: CPython 3.11 may
collect garbage while it does so, which lets the other thread go on and leave the frames that are being read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
FREE, CUT_SHORT = 0, -1
_OF_ANOTHER_THREAD = (
    "another thread is in a call of the same object: hold a lock of your own around each call, or make all calls in "
    "one thread"
)
_calls: set[CodeType] = set()


def public_call(method: F) -> F:
    """Mark a method as a call that takes a gate. The mark adds no cost to the call."""
    _calls.add(method.__code__)
    return method


def take_gate(home: Any, me: int) -> None:
    """Take a gate that is not free for a call of this thread, `me`.

    Raises RuntimeError if another thread is in a call, or this thread: as in a signal handler. If a signal handler cuts
    a call short and another signal cuts short how it ends, then `busy` stays as it is, and only the thread of that call
    can take the gate.
    """
    if home.busy == me and _is_under_way(home, sys._getframe(1)):
        raise RuntimeError("called from within another call of the same object, as by a signal handler: call it later")
    if home.busy == FREE or home.busy == CUT_SHORT or home.busy == me:
        home.busy = me
        return
    raise RuntimeError(_OF_ANOTHER_THREAD)


def cut_short(home: Any, me: int) -> None:
    """Note that the call of the thread `me` has raised. Does nothing if the call has opened the gate before."""
    if home.busy == me:
        home.busy = CUT_SHORT


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
