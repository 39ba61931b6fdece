"""Measure what surrounds the calls of a tree: a gate, beside a lock of the standard library, watch_ranks, BlockEvents.

python3 -m bench.overhead
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import timeit
from collections.abc import Callable
from threading import get_ident

import numpy as np

from flatradix import BlockEvents, RadixTree, watch_ranks
from flatradix.gate import CUT_SHORT, FREE, take_gate

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
        self.busy = me if not self.busy else take_gate(self, me)
        try:
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
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


def update_events(nodes: int) -> float:
    """Return the median time, in us, of an update behind a step that evicts 16 nodes and inserts 4 of 4 blocks each."""
    draw, times = np.random.default_rng(0), []
    tree = RadixTree(40 * nodes, page_size=16, device="cpu")
    events = BlockEvents(tree, on_stored=lambda blocks: None, on_removed=lambda hashes: None)
    slots = np.arange(32_000).reshape(1000, 32)
    for _ in range(0, nodes, 1000):
        tree.insert(list(draw.integers(0, 50_000, (1000, 32))), list(slots))
    events.update()
    for _ in range(500):
        tree.evict(16 * 32)
        tree.insert(list(draw.integers(0, 50_000, (4, 64))), list(slots.reshape(-1)[:256].reshape(4, 64)))
        start = time.perf_counter()
        events.update()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


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
    for nodes in (10_000, 300_000):
        print(f"BlockEvents.update of {nodes:,} nodes, 20 of them changed: {update_events(nodes):.0f} us")


if __name__ == "__main__":
    main()
