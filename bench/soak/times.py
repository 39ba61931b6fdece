"""Times of calls in memory of a fixed size, and the memory of the process: neither grows with the length of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")

PARTS = 10
_FIRST, _STEP, _BINS = 100, 1.02, 1000  # bins from 100 ns to 40 s, each 2 % wider than the one before


class Times:
    """A histogram of times for each operation and each tenth of a run. part: the tenth that runs now."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.part = 0
        self.counts = np.zeros((len(names), PARTS, _BINS), np.int64)
        self._at = {name: at for at, name in enumerate(names)}

    def timed(self, name: str, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Make a call, and count its time. A call that raises is not counted."""
        begun = time.perf_counter_ns()
        result = call(*arguments, **options)
        taken = time.perf_counter_ns() - begun
        bin = int(math.log(max(taken, _FIRST) / _FIRST) / math.log(_STEP))
        self.counts[self._at[name], self.part, min(bin, _BINS - 1)] += 1
        return result

    def total(self, name: str) -> int:
        return int(self.counts[self._at[name]].sum())

    def quantile(self, name: str, share: float, part: int) -> float | None:
        """Return the microseconds that so large a share of the calls of a tenth did not exceed; None without calls."""
        counts = self.counts[self._at[name], part]
        if counts.sum() == 0:
            return None
        bin = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
        return _FIRST * _STEP ** (bin + 0.5) / 1e3


def resident() -> int:
    """Return the bytes of memory that the process has in RAM. Linux only."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def on_gpu(device: str) -> int:
    """Return the bytes of GPU memory that torch's allocator has reserved; 0 on a CPU."""
    return int(torch.cuda.memory_reserved()) if device.startswith("cuda") and torch.cuda.is_available() else 0
