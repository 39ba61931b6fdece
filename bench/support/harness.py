"""The parts of the CPU benchmark's rows, and the timing of two trees against each other."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.support import sglang_trees
from flatradix import RadixTree


class Setup(NamedTuple):
    """The settings that all rows of a run share. trace: None if there is none. peer: whether SGLang runs here."""

    quick: bool
    trace: Path | None
    peer: bool

    def tree(self, max_tokens: int, page_size: int) -> RadixTree:
        return RadixTree(max_tokens, page_size, device="cpu")

    def rust(self, page_size: int) -> sglang_trees.RustTree | None:
        if not self.peer:
            return None
        tree = sglang_trees.RustTree(page_size)
        tree.allocator.keep = False
        return tree


class Measured(NamedTuple):
    """The results of both sides, in seconds, or in bytes if the row counts bytes. theirs: None without SGLang."""

    ours: float
    theirs: float | None
    note: str = ""


class Row(NamedTuple):
    """One line of the table.

    unit: "us", "ms", "s" (all three measured in seconds) or "bytes".
    target: the highest accepted ours / theirs, or, with `absolute`, the highest accepted value of ours, in `unit`.
    """

    name: str
    work: str
    unit: str
    target: float
    measure: Callable[[Setup], Measured]
    absolute: bool = False
    slow: bool = False
    needs_trace: bool = False


class Side(NamedTuple):
    """The call of one side. restore: brings back the state that `call` expects, outside the measured time."""

    call: Callable[[], Any]
    restore: Callable[[], Any] | None = None


def _seconds(side: Side, loops: int) -> float:
    """Return the mean seconds of one call."""
    if side.restore is None:
        start = time.perf_counter()
        for _ in range(loops):
            side.call()
        return (time.perf_counter() - start) / loops
    total = 0.0
    for _ in range(loops):
        start = time.perf_counter()
        side.call()
        total += time.perf_counter() - start
        side.restore()
    return total / loops


def _loops(side: Side) -> int:
    """Warm up; return how many calls take about a millisecond, from 1 to 1000."""
    for _ in range(3):
        once = _seconds(side, 1)
    return max(1, min(1000, round(1e-3 / max(once, 1e-7))))


def compare(setup: Setup, ours: Side, theirs: Side | None) -> Measured:
    """Measure both sides alternately, each time for about a millisecond or one call; return the medians."""
    sides = [side for side in (ours, theirs) if side is not None]
    loops = [_loops(side) for side in sides]
    samples: list[list[float]] = [[] for _ in sides]
    budget = 0.4 if setup.quick else 2.0
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        while len(samples[0]) < 7 or (time.perf_counter() < end and len(samples[0]) < 1000):
            for side, count, found in zip(sides, loops, samples, strict=True):
                found.append(_seconds(side, count))
    finally:
        gc.enable()
    medians = [statistics.median(found) for found in samples]
    return Measured(medians[0], medians[1] if theirs is not None else None)


def start_afresh() -> None:
    """Return the memory that earlier rows freed to the system, as memory left in the process makes inserts faster."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def slot_range(count: int, first: int = 0) -> torch.Tensor:
    """Return int64 [count]: first, first + 1, ..."""
    return torch.arange(first, first + count, dtype=torch.int64)
