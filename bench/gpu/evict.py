"""Rows: eviction from a million leaves of one page of 64 tokens. An eviction waits for the GPU between launches."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.support.gpu_harness import (
    LONGEST_SLEEP,
    Measured,
    Row,
    Setup,
    Unhidden,
    floor_of,
    number,
    ragged,
    random_keys,
    slots_for,
    timed,
    wall_seconds,
)
from flatradix.kernels import gpu

LEAVES, TOKENS, CHUNK = 1_000_000, 64, 100_000
CANDIDATE = 16  # bytes of a node that the selection reads: tick, length and lock count


class Leaves:
    """A tree of leaves under the root. first: the index of the oldest key."""

    def __init__(self, setup: Setup) -> None:
        self.count = 40 if setup.tiny else LEAVES
        self.keys = random_keys(setup.device, self.count, TOKENS)
        self.slots = slots_for(self.keys)
        self.tree = setup.tree(self.keys.numel(), page=TOKENS)
        for first in range(0, self.count, CHUNK):
            part = slice(first, first + CHUNK)
            self.tree.insert(ragged(self.keys[part]), ragged(self.slots[part]))
        assert self.tree.num_nodes == self.count
        self.first = 0

    def evict(self, leaves: int) -> None:
        found = self.tree.evict(leaves * TOKENS)
        assert found.num_tokens == leaves * TOKENS
        self.freed = found.slots

    def refill(self, leaves: int) -> None:
        """Assert that the oldest leaves were evicted in order; insert them again as the newest."""
        rows = (torch.arange(leaves, device=self.keys.device) + self.first) % self.count
        assert torch.equal(self.freed, self.slots[rows].reshape(-1))
        self.tree.insert(ragged(self.keys[rows]), ragged(self.slots[rows]))
        assert self.tree.num_nodes == self.count
        self.first = (self.first + leaves) % self.count


class Clock:
    """Measures the GPU time of each launcher that an eviction calls, in a `with` block."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.sleep = 2e-3
        self.taken: dict[str, float] = {}
        self.late = False
        self.launchers = {name: getattr(gpu, name) for name in ("effective_keys", "evict", "order_victims", "free")}

    def __enter__(self) -> None:
        self.taken, self.late = {}, False
        for name, launcher in self.launchers.items():
            setattr(gpu, name, self._timed(name, launcher))

    def __exit__(self, *_: object) -> None:
        for name, launcher in self.launchers.items():
            setattr(gpu, name, launcher)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def launch(*arguments: Any) -> Any:
            returned = []
            try:
                seconds = timed(self.setup, lambda: returned.append(function(*arguments)), self.sleep)
                self.taken[name] = self.taken.get(name, 0.0) + seconds
            except Unhidden:
                self.late = True
            return returned[0]

        return launch


def _evict(hundredths: int, setup: Setup) -> Measured:
    """Measure the eviction of `hundredths` per cent of the leaves, or of one leaf if that is 0."""
    leaves = Leaves(setup)
    some = max(1, leaves.count * hundredths // 100)
    clock = Clock(setup)
    samples: dict[str, list[float]] = defaultdict(list)
    rounds = setup.rounds
    while len(samples["total"]) < rounds + 2:
        with clock:
            leaves.evict(some)
        leaves.refill(some)
        if clock.late:
            clock.sleep *= 2
            assert clock.sleep < LONGEST_SLEEP
            continue
        for name, seconds in {**clock.taken, "total": sum(clock.taken.values())}.items():
            samples[name].append(seconds)
    median = {name: statistics.median(found[-rounds:]) for name, found in samples.items()}
    total = median.pop("total")
    parts = ", ".join(f"{name} {number(seconds * 1e6)}" for name, seconds in median.items())
    moved = CANDIDATE * leaves.count + 3 * 4 * some * TOKENS
    return Measured(total, floor_of(setup, moved), parts)


def _evict_wall(hundredths: int, setup: Setup) -> Measured:
    leaves = Leaves(setup)
    some = max(1, leaves.count * hundredths // 100)
    for _ in range(3):
        leaves.evict(some)
        leaves.refill(some)
    return Measured(wall_seconds(setup, [partial(leaves.evict, some)], partial(leaves.refill, some)), None)


ROWS = [
    Row("evict-one", "evict one of 1M nodes", 40, partial(_evict, 0)),
    Row("evict-1-percent", "evict 1 % of 1M nodes", 80, partial(_evict, 1)),
    Row("wall-evict-one", "evict one of 1M nodes", 30, partial(_evict_wall, 0), "wall"),
    Row("wall-evict-1-percent", "evict 1 % of 1M nodes", None, partial(_evict_wall, 1), "wall"),
]
