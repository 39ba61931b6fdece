"""The gate alone, with threads that meet there as often as they can: never are two within calls at once."""

from __future__ import annotations

import sys
import threading
import time
from threading import get_ident
from types import FrameType
from typing import Any

import pytest

from flatradix.gate import CUT_SHORT, FREE, add_gate, public_call, take_gate

THREADS = 6


class Home:
    """An object whose calls count the threads that are inside."""

    busy: int

    def __init__(self, cuts: bool) -> None:
        """cuts: whether each call ends as one that was cut short."""
        add_gate(self)
        self.cuts = cuts
        self.inside = self.together = self.done = self.refused = 0

    @public_call
    def call(self) -> None:
        me = get_ident()
        self.busy = me if not self.busy else take_gate(self, me)
        try:
            self.inside += 1
            self.together += self.inside > 1
            for _ in range(3):
                self.together += self.busy != me
            self.inside -= 1
            self.done += 1
            self.busy = CUT_SHORT if self.cuts else FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise


def trace(_frame: FrameType, _event: str, _argument: Any) -> Any:
    """Trace each line of Python in Python, as a debugger does."""
    return trace


@pytest.mark.parametrize("traced", [False, True], ids=["plain", "traced"])
@pytest.mark.parametrize("cuts", [False, True], ids=["free", "cut short"])
def test_one_thread_at_a_time(cuts: bool, traced: bool) -> None:
    home, end = Home(cuts), time.monotonic() + 1.5

    def work() -> None:
        if traced:
            sys.settrace(trace)
        while time.monotonic() < end:
            for _ in range(100):
                try:
                    home.call()
                except RuntimeError as error:
                    home.refused += "another thread is in a call" in str(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert home.done > 100
    assert home.refused > 0, "the threads never met"
    assert home.together == 0
