"""Measure what surrounds each call of a tree: its gate, beside a lock of the standard library, and `watch_ranks`.

python3 -m bench.overhead
"""

from __future__ import annotations

import argparse
import threading
import timeit
from collections.abc import Callable
from threading import get_ident

import numpy as np

from flatradix import RadixTree, watch_ranks
from flatradix.gate import FREE, cut_short, take_gate

CALLS, SERIES = 20_000, 100


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


def lock_and_unlock(watched: bool) -> Callable[[], None]:
    """Return a call that locks a path of one node, and unlocks it."""
    tree = RadixTree(1024, device="cpu")
    key = np.arange(128)
    tree.insert(key, key)
    if watched:
        watch_ranks(tree)
    place = tree.match(key)

    def call() -> None:
        tree.lock(place)
        tree.unlock(place)

    return call


def nanoseconds(calls: list[Callable[[], None]]) -> list[float]:
    """Return the time of each call: the least mean of many series, in which the calls take turns."""
    least = [float("inf")] * len(calls)
    for _ in range(SERIES):
        for number, call in enumerate(calls):
            least[number] = min(least[number], timeit.timeit(call, number=CALLS) / CALLS * 1e9)
    return least


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    home = Home()
    nothing, gate, lock, plain, watched = nanoseconds(
        [home.nothing, home.with_gate, home.with_lock, lock_and_unlock(False), lock_and_unlock(True)]
    )
    print(f"a call of nothing: {nothing:.1f} ns; a gate adds {gate - nothing:.1f} ns, a lock {lock - nothing:.1f} ns")
    print(f"lock and unlock a path: {plain:.0f} ns; watch_ranks adds {(watched - plain) / 2:.0f} ns to each of both")


if __name__ == "__main__":
    main()
