"""The waiting queue: what a scheduler's step costs, on either device.

2,000 conversations are cached in pages of 16; 10,000 prompts of 8,192 tokens wait for them. A step inserts 32 paths,
and evicts as much. Then the queue tells all cached lengths, and the order "lpm" as ids in host memory.

  python3 -m bench.queue                          about two minutes, 4 GB of memory
  python3 -m bench.queue --device cuda            the same beside a tree on a GPU
  python3 -m bench.queue --growth                 also against the number of waiting prompts, and of changes a step
  python3 -m bench.queue --growth --plot FILE     and draw that
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

import flatradix
from flatradix.queue.orders import NAMES

PAGE, LENGTH, CONVERSATIONS, WAITING, CHANGED, MORE = 16, 8192, 2000, 10_000, 32, 256


def microseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e6


class Bench:
    """A tree of cached conversations, and prompts that wait for them."""

    def __init__(self, device: str, waiting: int, keep: bool) -> None:
        self.random = np.random.default_rng(0)
        self.tokens = self.random.integers(0, 100_000, (CONVERSATIONS, LENGTH), dtype=np.int32)
        self.cached = self.random.integers(4, 375, CONVERSATIONS) * PAGE
        self.slots = np.arange(LENGTH, dtype=np.int32)
        self.tree = flatradix.RadixTree(CONVERSATIONS * 6400, PAGE, device)
        self.queue = flatradix.WaitingQueue(self.tree, keep)
        self.insert(range(CONVERSATIONS))
        self.of = self.random.integers(0, CONVERSATIONS, waiting)
        for part in np.array_split(self.of, max(1, waiting // 1000)):
            self.queue.add([self.tokens[one] for one in part])
        self.queue.cached_lengths()

    def insert(self, conversations: range | np.ndarray) -> None:
        keys = [self.tokens[one, : self.cached[one]] for one in conversations]
        self.tree.insert(keys, [self.slots[: len(key)] for key in keys])
        self.tree.raise_pending()

    def change(self, paths: int) -> None:
        """Let some conversations grow, and evict as many tokens."""
        chosen = self.random.choice(CONVERSATIONS, paths, replace=False)
        self.cached[chosen] = np.minimum(self.cached[chosen] + MORE, LENGTH)
        self.insert(chosen)
        self.tree.evict(paths * MORE)
        self.tree.raise_pending()

    def look_and_order(self) -> None:
        self.queue.cached_lengths()
        self.queue.order("lpm").numpy()

    def afresh(self) -> None:
        self.tree.match([self.tokens[one] for one in self.of], touch=False).lengths.cpu()

    def step(self, paths: int, rounds: int = 31) -> float:
        """Return the median of a look and an order behind `paths` changes, in microseconds."""
        found = []
        for _ in range(rounds):
            self.change(paths)
            found.append(microseconds(self.look_and_order))
        return statistics.median(found)


def add_one(device: str) -> float:
    tree = flatradix.RadixTree(1 << 20, PAGE, device)
    queue = flatradix.WaitingQueue(tree)
    prompts = np.random.default_rng(1).integers(0, 100_000, (300, LENGTH))
    found = []
    for _ in range(3):  # the pool has grown after the first round
        found = [microseconds(lambda prompt=prompt: queue.add(prompt)) for prompt in prompts]
        queue.remove(queue.ids())
    return statistics.median(found)


def evict_one(device: str, keep: bool) -> float:
    """Return the median of an eviction of one of a million nodes, with 10,000 kept, in microseconds."""
    leaves, tokens = 1_000_000, 16
    keys = np.random.default_rng(2).integers(0, 1 << 30, (leaves, tokens), dtype=np.int32)
    tree = flatradix.RadixTree(leaves * tokens, tokens, device)
    slots = np.arange(leaves * tokens, dtype=np.int32).reshape(leaves, tokens)
    for part in np.array_split(np.arange(leaves), 100):
        tree.insert(list(keys[part]), list(slots[part]))
    queue = flatradix.WaitingQueue(tree, keep)
    queue.add(list(keys[::100]))
    queue.cached_lengths()
    tree.evict(tokens * 5000)
    return statistics.median(microseconds(lambda: tree.evict(1)) for _ in range(301))


def growth(device: str) -> dict[str, dict[int, float]]:
    """Return microseconds a step by the number of waiting prompts, and of paths that a step inserts and evicts."""
    found: dict[str, dict[int, float]] = {"waiting prompts": {}, "paths changed in a step": {}}
    for waiting in (100, 1000, 10_000, 100_000):
        taken = found["waiting prompts"][waiting] = Bench(device, waiting, False).step(CHANGED)
        print(f"{waiting} waiting: a step {taken:,.0f} us", flush=True)
    bench = Bench(device, WAITING, False)
    for paths in (1, 8, 32, 128, 512):
        taken = found["paths changed in a step"][paths] = bench.step(paths)
        print(f"{paths} changes: a step {taken:,.0f} us", flush=True)
    return found


def plot(found: dict[str, dict[int, float]], file: str, device: str) -> None:
    """Draw the growth, one panel each."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(9, 3.4), sharey=True, layout="constrained")
    beside = (f"{CHANGED} paths changed in a step", f"{WAITING:,} waiting prompts")
    for panel, (name, points), other in zip(panels, found.items(), beside, strict=True):
        panel.loglog(list(points), list(points.values()), marker="o")
        panel.set(xlabel=name, title=other)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(f"us a step (tree on {device})")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.queue", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="of the tree: cpu or cuda (default: %(default)s)")
    parser.add_argument("--growth", action="store_true", help="also the growth of a step's cost")
    parser.add_argument("--plot", metavar="FILE", help="draw the growth to this file, a png or svg")
    options = parser.parse_args()
    device = options.device
    for keep in (False, True):
        bench = Bench(device, WAITING, keep)
        afresh = statistics.median(microseconds(bench.afresh) for _ in range(5))
        print(f"keep={keep}: all afresh {afresh:,.0f} us; a step {bench.step(CHANGED):,.0f} us", flush=True)
        queue = bench.queue
        calls = {f"order {policy}": partial(queue.order, policy) for policy in NAMES}
        calls["shared_lengths"] = queue.shared_lengths
        calls["plan of 64 by lpm"] = partial(queue.plan, "lpm", max_requests=64)
        for name, call in calls.items():
            print(f"  {name}: {statistics.median(microseconds(call) for _ in range(15)):,.0f} us", flush=True)
    print(f"add one prompt of {LENGTH} tokens: {add_one(device):.1f} us", flush=True)
    for keep in (False, True):
        print(f"evict one of 1M nodes, 10,000 waiting, keep={keep}: {evict_one(device, keep):.1f} us", flush=True)
    if options.growth or options.plot:
        found = growth(device)
        if options.plot:
            plot(found, options.plot, device)


if __name__ == "__main__":
    main()
