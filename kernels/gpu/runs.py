"""Runs of units without a gap between them: each program's share of the units, and the run to which a unit belongs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def share(count, programs):
    """Return this program's share [begin, end) of `count` items, int64."""
    each = (count + programs - 1) // programs
    begin = tl.minimum(tl.program_id(0).to(tl.int64) * each, count)
    return begin, tl.minimum(begin + each, count)


@triton.jit
def owners(offsets, unit, low, high, SHIFT: tl.constexpr):
    """Return the run of each unit by binary search among runs `low` to `high`; lanes of int32.

    The run is the last that begins at the unit or before. So an empty run is never found: the next run begins at the
    same unit. `offsets` holds the beginning of each run, shifted left by SHIFT; the lower bits hold another number.
    """
    span = high - low
    lowest = tl.zeros_like(unit) + low
    highest = tl.zeros_like(unit) + high
    while span > 0:
        middle = (lowest + highest + 1) >> 1
        here = (tl.load(offsets + middle) >> SHIFT).to(tl.int32) <= unit
        lowest = tl.where(here, middle, lowest)
        highest = tl.where(here, highest, middle - 1)
        span = span >> 1
    return lowest


@triton.jit
def outer_owners(offsets, begin, end, count, SHIFT: tl.constexpr):
    """Return the runs, of `count`, to which the first and the last unit of [begin, end) belong."""
    ends = owners(offsets, tl.where(tl.arange(0, 2) == 0, begin, end - 1), 0, count - 1, SHIFT)
    return tl.min(ends), tl.max(ends)
