"""Measure what the gate of a call costs, and what a lock of the standard library would cost in its place.

python3 -m bench.gate
"""

from __future__ import annotations

import argparse
import threading
import timeit
from collections.abc import Callable
from threading import get_ident

from flatradix.gate import FREE, cut_short, take_gate

CALLS = 1_000_000


class Home:
    """An object with a gate and a lock."""

    def __init__(self) -> None:
        self.busy: int = FREE
        self.lock = threading.Lock()

    def nothing(self) -> None:
        pass

    def with_gate(self) -> None:
        me = get_ident()
        if self.busy:
            take_gate(self, me)
        self.busy = me
        try:
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    def with_lock(self) -> None:
        with self.lock:
            pass


def nanoseconds(call: Callable[[], None]) -> float:
    """Return the time of a call: the least mean of ten series."""
    return min(timeit.repeat(call, number=CALLS, repeat=10)) / CALLS * 1e9


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    home = Home()
    nothing, gate, lock = (nanoseconds(call) for call in (home.nothing, home.with_gate, home.with_lock))
    costs = f"the gate adds {gate - nothing:.1f} ns, a lock {lock - nothing:.1f} ns"
    print(f"a call without a gate: {nothing:.1f} ns; {costs}")


if __name__ == "__main__":
    main()
