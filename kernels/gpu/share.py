"""Units that lie without a gap in runs, one run after another: which of them are a program's, and whose each is."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def share(count, programs):
    """The part [begin, end) of `count` things, int64, that is this program's."""
    each = (count + programs - 1) // programs
    begin = tl.minimum(tl.program_id(0).to(tl.int64) * each, count)
    return begin, tl.minimum(begin + each, count)


@triton.jit
def owners(offsets, unit, low, high, SHIFT: tl.constexpr):
    """The run of each unit, which is known to be one of `low` to `high`; lanes of int32, a search by halves.

    It is the last that begins at the unit or before: an empty run begins where the next one does. Where each begins is
    in `offsets`, above SHIFT bits of something else.
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
    """The runs, of `count`, of the first and the last of the units from `begin` up to `end`."""
    ends = owners(offsets, tl.where(tl.arange(0, 2) == 0, begin, end - 1), 0, count - 1, SHIFT)
    return tl.min(ends), tl.max(ends)
