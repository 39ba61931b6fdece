"""Output buffers that are reused when nothing refers to them any more.

A fresh buffer of 100 KB costs 25 page faults, which take longer than gathering 12,000 slots into it. On the
conversation trace an eviction takes 5 us with reused buffers, and 14 us with fresh ones (bench/RESULTS.md).
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from flatradix.inputs.sequences import address_of

# In elements. Below SMALLEST, malloc has memory at hand. Above LARGEST, numpy asks for huge pages: faults are few.
SMALLEST = 1 << 12
LARGEST = 1 << 19
KEPT = 4


def _references(buffers: list[np.ndarray], index: int) -> int:
    return sys.getrefcount(buffers[index])


# `_references` of a buffer to which only its list refers. Interpreters differ by one.
_IDLE = _references([np.empty(0, np.int64)], 0)
# Without the GIL, a reference count is split between threads, so one number does not show that a buffer is free.
_COUNTS = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()


class Outputs:
    """Gives out uninitialised arrays of slots, of any length.

    Every view of an array, in numpy or torch, holds a reference to the buffer under it. A buffer is free if only this
    list refers to it. At most KEPT buffers of up to LARGEST elements are kept.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = np.int64 if dtype == torch.int64 else np.int32
        self._buffers: list[np.ndarray] = []
        self._oldest = 0

    def take(self, count: int) -> tuple[np.ndarray, int]:
        """Return an array [count] and its address."""
        if not (SMALLEST <= count <= LARGEST and _COUNTS):
            out = np.empty(count, self._dtype)
            return out, address_of(out)
        buffers = self._buffers
        for index in range(len(buffers)):
            if len(buffers[index]) >= count and _references(buffers, index) == _IDLE:
                out = buffers[index]
                return out[:count], address_of(out)
        step = 1 << (count.bit_length() - 3)
        fresh = np.empty(-(-count // step) * step, self._dtype)
        if len(buffers) < KEPT:
            buffers.append(fresh)
        else:
            buffers[self._oldest] = fresh
            self._oldest = (self._oldest + 1) % KEPT
        return fresh[:count], address_of(fresh)
