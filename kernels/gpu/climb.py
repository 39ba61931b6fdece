"""Climbing from rows to the root, with a count to change on each row of the way.

A climb that asks row after row for its parent waits for each: over 64 rows, 8 us more (H100, bench/RESULTS.md). So each
row has hints, the eight rows above it as they were when somebody last looked. A climb asks for the parents of eight
rows at once; where they are not what the hints say, as edges were cut or rows given out anew, it looks row after row
and corrects them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.layout import scratch

# Paths that climb together, and how many rows of each at once: a lane of a warp for each row. A row's hints are 32
# bytes, what the memory of a GPU brings at a time.
PATHS = tl.constexpr(4)
LEVELS = tl.constexpr(scratch.HINTS)


@triton.jit
def parent_of(s, row, on):
    """The rows above lanes, 0 for the root and for lanes that are not `on`."""
    return tl.maximum(tl.load(s.parent + row, mask=on & (row > 0), other=0), 0)


@triton.jit
def take_back_locks(s, row, weight):
    """Take `weight` from the counts of each lane's row and all above, where no sums are wanted. Slow, and rare."""
    while tl.max(row) > 0:
        tl.atomic_add(s.lock_ref + row, -weight, mask=row > 0, sem="relaxed")
        row = parent_of(s, row, row > 0)


@triton.jit
def _levels(row):
    """0 to LEVELS - 1 for the lanes of each path."""
    return tl.zeros_like(row) + tl.arange(0, LEVELS)[None, :]


@triton.jit
def _hints(w, row):
    """(the rows from each path's row up, one a level; the row after them), as the hints have it."""
    level = _levels(row)
    place = w.above + LEVELS * row.to(tl.int64)
    above = tl.load(place + level - 1, mask=(row > 0) & (level > 0), other=0)
    return tl.where(level > 0, above, row), tl.load(place + (LEVELS - 1), mask=row > 0, other=0)


@triton.jit
def _look(s, w, row, on):
    """The same from the tree, row after row, for the paths that are `on`; renews their hints."""
    level = _levels(row)
    rows = row
    above = row
    after = row
    for i in tl.static_range(LEVELS):
        rows = tl.where(level == i, after, rows)
        after = parent_of(s, after, on)
        above = tl.where(level == i, after, above)
    tl.store(w.above + LEVELS * row.to(tl.int64) + level, above, mask=on & (row > 0))
    return rows, after


@triton.jit
def _add(s, w, row, rows, after, weight):
    """Add to the counts of LEVELS rows of each path, from its `row` up, of which hints say that they are `rows`.

    Returns (the row after them, the hints there, the rows that they really are, and their old counts).
    """
    level = _levels(row)
    parent = parent_of(s, rows, rows > 0)
    next_rows, next_after = _hints(w, after)
    above = tl.where(level < LEVELS - 1, tl.gather(rows, tl.minimum(level + 1, LEVELS - 1), axis=1), after)
    wrong = tl.max((parent != above).to(tl.int32), axis=1)[:, None] + tl.zeros_like(row) > 0
    if tl.max(wrong.to(tl.int32)) > 0:
        seen_rows, seen_after = _look(s, w, row, wrong)
        rows = tl.where(wrong, seen_rows, rows)
        after = tl.where(wrong, seen_after, after)
        next_rows, next_after = _hints(w, after)
    before = tl.atomic_add(s.lock_ref + rows, weight, mask=rows > 0, sem="relaxed")
    return after, next_rows, next_after, rows, before


@triton.jit
def _moved(s, rows, before, low):
    """Tokens of rows that an addition made protected (the count was 0) or evictable (it is 0 now)."""
    return tl.load(s.length + rows, mask=(rows > 0) & (before + low == 0), other=0)


@triton.jit
def add_locks(s, w, row, weight):
    """Add `weight` to the counts of each path's row and all above; returns the tokens that changed sides, scalar.

    row, weight: int32 [PATHS, LEVELS], the same on all levels; row 0 for no path. A count's old value takes about 1 us
    to arrive, and is looked at when another group of rows is on its way.
    """
    low = tl.minimum(weight, 0)  # of an unlock: what the old count of a row is that becomes evictable, negated
    zero = tl.zeros_like(row)
    moved = zero
    a, b, old_a, old_b = zero, zero, zero, zero
    rows, after = _hints(w, row)
    while tl.max(row) > 0:
        moved += _moved(s, a, old_a, low)
        row, rows, after, a, old_a = _add(s, w, row, rows, after, weight)
        moved += _moved(s, b, old_b, low)
        row, rows, after, b, old_b = _add(s, w, row, rows, after, weight)
    moved += _moved(s, a, old_a, low) + _moved(s, b, old_b, low)
    return tl.sum(moved.to(tl.int64))
