"""Two checkouts against each other on one core: a process each, called by turns, so that a machine's drift hits both.

  python3 -m bench.compare OTHER                   every row against the checkout in the folder OTHER
  python3 -m bench.compare OTHER --only match      the rows whose names begin so
  python3 -m bench.compare OTHER --rounds 100      more pairs (default: 40)

Prints the median of each side, and the median of the ratios this / other, pair by pair. Below 1: this is faster. The
first run of a checkout compiles its kernels.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Work:
    """What a process repeats. prepare: untimed, before each sample. names: of rows, public calls of RadixTree alone."""

    def __init__(self) -> None:
        import numpy as np

        import flatradix

        self.random = np.random.default_rng(0)
        self.np = np
        self.tree = flatradix.RadixTree
        self.ragged = flatradix.Ragged
        self.rows: dict[str, Callable[[], Any]] = {}
        self.prepare: dict[str, Callable[[], Any]] = {}
        self._match()
        self._lock_and_insert()
        self._evict()

    def add(self, name: str, calls: int, call: Callable[[], Any]) -> None:
        def repeat() -> None:
            for _ in range(calls):
                call()

        self.rows[f"{name} ({calls} calls)"] = repeat

    def _match(self) -> None:
        import torch

        short = self.tree(10_000, device="cpu")
        short.insert(list(range(32)), list(range(32)))
        forms = {"numpy": self.np.arange(32), "array": array("q", range(32)), "list": list(range(32))}
        for form, key in {**forms, "tensor": torch.arange(32)}.items():
            self.add(f"match 32 tokens, {form}", 2000, lambda key=key: short.match(key))
        long = self.tree(400_000, 64, device="cpu")
        key = self.random.integers(0, 128_000, 131_072)
        long.insert(key, self.np.arange(131_072))
        self.add("match 131072 tokens", 50, lambda: long.match(key))
        many = self.tree(2_000_000, 64, device="cpu")
        keys = self.random.integers(0, 128_000, (256, 1024))
        many.insert(list(keys), [self.np.arange(1024)] * 256)
        joined = torch.from_numpy(keys.reshape(-1).astype(self.np.int32))
        ragged, arrays = self.ragged(joined, torch.arange(257) * 1024), list(keys)
        self.add("match 256 x 1024 tokens, a Ragged", 6, lambda: many.match(ragged))
        self.add("match 256 x 1024 tokens, arrays", 6, lambda: many.match(arrays))
        self._long, self._key = long, key

    def _lock_and_insert(self) -> None:
        path = self.tree(10_000, device="cpu")
        for end in range(8, 520, 8):
            path.insert(list(range(end)), list(range(end)))
        for nodes in (1, 64):
            place = path.match(list(range(8 * nodes)))

            def lock(place: Any = place) -> None:
                path.lock(place)
                path.unlock(place)

            self.add(f"lock and unlock a path of {nodes}", 1500, lock)
        self.add("slots of 512 tokens", 1500, lambda: path.slots(place))
        held, tail, slots = self._long.match(self._key, lock=True), self.np.arange(512), self.np.arange(512)

        def insert() -> None:
            self._long.insert(tail, slots, start=held)
            self._long.evict(512)

        self.add("insert 512 tokens behind 131072, evict them", 600, insert)

    def _evict(self) -> None:
        tree, first = self.tree(30_000 * 64, 64, device="cpu"), 0

        def fill(count: int) -> None:
            nonlocal first
            keys = self.random.integers(0, 128_000, (count, 64))
            keys[:, 0], keys[:, 1] = divmod(self.np.arange(first, first + count), 1000)
            tree.insert(list(keys), [self.np.arange(64)] * count)
            first += count

        for _ in range(3):
            fill(9_500)
        self.add("evict one node of 30k", 500, lambda: tree.evict(64))
        self.prepare["evict one node of 30k (500 calls)"] = lambda: fill(500)
        self.add("evict 300 nodes of 30k", 1, lambda: tree.evict(300 * 64))
        self.prepare["evict 300 nodes of 30k (1 calls)"] = lambda: fill(300)


def serve() -> None:
    """Repeat the row that each line of standard input names; print its seconds."""
    import torch

    torch.set_num_threads(1)
    work = Work()
    for name, row in work.rows.items():
        work.prepare.get(name, lambda: None)()
        row()
    gc.collect()
    gc.disable()
    print("|".join(work.rows), flush=True)
    for line in sys.stdin:
        name = line.rstrip("\n")
        work.prepare.get(name, lambda: None)()
        start = time.perf_counter()
        work.rows[name]()
        print(time.perf_counter() - start, flush=True)


class Side:
    """The process of one checkout."""

    def __init__(self, root: Path, core: int) -> None:
        command = f"import os, runpy; os.sched_setaffinity(0, {{{core}}}); runpy.run_path({str(__file__)!r})['serve']()"
        environment = {**os.environ, "PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", command], cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.names = self.process.stdout.readline().rstrip("\n").split("|")

    def seconds(self, name: str) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, help="the folder of the other checkout")
    parser.add_argument("--only", default="", metavar="NAME", help="the rows whose names begin so")
    parser.add_argument("--rounds", type=int, default=40, help="pairs of samples for each row")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core of both processes")
    options = parser.parse_args()
    if not (options.other / "flatradix").is_dir():
        parser.error(f"{options.other} is no checkout: it has no folder flatradix")
    this, other = Side(ROOT, options.core), Side(options.other.resolve(), options.core)
    print(f"{'work':<55} {'this':>10} {'other':>10} {'ratio':>7}")
    for name in this.names:
        if not name.startswith(options.only):
            continue
        pairs = [(this.seconds(name), other.seconds(name)) for _ in range(options.rounds)]
        mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name:<55} {mine * 1e3:7.3f} ms {theirs * 1e3:7.3f} ms {ratio:7.3f}", flush=True)


if __name__ == "__main__":
    main()
