"""Climb from rows to the root, and change the lock count of each row on the way.

A climb that loads one parent after another waits for each load: 8 us more for 64 rows (H100, bench/RESULTS.md). So each
row has hints: the eight rows above it when a climb last looked. A climb loads the parents of eight rows at once and
compares them with the hints. Hints may be wrong after an edge was cut or a row was used again. The climb then loads
row after row and corrects the hints.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.layout import scratch

# Paths that one warp climbs together, and rows of each path at once: a lane for each row. The hints of a row are 32
# bytes, one memory sector.
PATHS = tl.constexpr(4)
LEVELS = tl.constexpr(scratch.ANCESTORS)


@triton.jit
def parent_of(s, row, on):
    """Return the row above each lane's row: 0 if that is the root, and for lanes that are not `on`."""
    return tl.maximum(tl.load(s.parent + row, mask=on & (row > 0), other=0), 0)


@triton.jit
def take_back_locks(s, row, weight):
    """Subtract `weight` from the lock counts of each lane's row and of all rows above.

    Loads row after row, which is slow, and sums no tokens. Only refused calls need this.
    """
    while tl.max(row) > 0:
        tl.atomic_add(s.lock_ref + row, -weight, mask=row > 0, sem="relaxed")
        row = parent_of(s, row, row > 0)


@triton.jit
def _levels(row):
    """Return 0 to LEVELS - 1 for the lanes of each path."""
    return tl.zeros_like(row) + tl.arange(0, LEVELS)[None, :]


@triton.jit
def _hints(w, row):
    """Return (LEVELS rows from each path's row up, the row above the last of them) according to the hints."""
    level = _levels(row)
    place = w.above + LEVELS * row.to(tl.int64)
    above = tl.load(place + level - 1, mask=(row > 0) & (level > 0), other=0)
    return tl.where(level > 0, above, row), tl.load(place + (LEVELS - 1), mask=row > 0, other=0)


@triton.jit
def _look(s, w, row, on):
    """Load from the tree, row after row, what `_hints` returns, for the paths that are `on`; renew their hints."""
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
def hinted_group(w, row):
    """Return (rows, the row after them) of the group that begins with each path's row, as hinted; [N, LEVELS].

    row: int32 [N]. `check_group` must follow.
    """
    return _hints(w, row[:, None] + tl.zeros([1, LEVELS], tl.int32))


@triton.jit
def next_group(w, after, going):
    """Return what `hinted_group` does for the paths that are `going`, from the row after their last group."""
    return _hints(w, tl.where(going[:, None], after, 0))


@triton.jit
def check_group(s, w, rows, after):
    """Return (rows, the row after them, their parents, ends, lengths), true whatever was hinted; [N, LEVELS].

    The first row of each path must be true. Parents are as stored: ~namespace at the top.
    """
    level = tl.zeros_like(rows) + tl.arange(0, LEVELS)[None, :]
    parent = tl.load(s.parent + rows, mask=rows > 0, other=0)
    end = tl.load(s.end + rows, mask=rows > 0, other=0)
    length = tl.load(s.length + rows, mask=rows > 0, other=0)
    above = tl.where(level < LEVELS - 1, tl.gather(rows, tl.minimum(level + 1, LEVELS - 1), axis=1), after)
    wrong = tl.max((tl.maximum(parent, 0) != above).to(tl.int32), axis=1)[:, None] + level * 0 > 0
    if tl.max(wrong.to(tl.int32)) > 0:
        row = tl.max(tl.where(level == 0, rows, 0), axis=1)[:, None] + level * 0
        seen, seen_after = _look(s, w, row, wrong)
        rows = tl.where(wrong, seen, rows)
        after = tl.where(wrong, seen_after, after)
        parent = tl.load(s.parent + rows, mask=rows > 0, other=0)
        end = tl.load(s.end + rows, mask=rows > 0, other=0)
        length = tl.load(s.length + rows, mask=rows > 0, other=0)
    return rows, after, parent, end, length


@triton.jit
def hint_leaf(w, leaf, above, active):
    """Store the hints of new leaves from those of the rows above them; lanes."""
    rows, _after = hinted_group(w, above)
    place = w.above + LEVELS * leaf[:, None] + tl.arange(0, LEVELS)[None, :]
    tl.store(place, rows, mask=active[:, None])


@triton.jit
def _add(s, w, row, rows, after, weight):
    """Add `weight` to the lock counts of LEVELS rows of each path, from `row` up.

    rows, after: these rows and the row above them, according to the hints. Returns (true row above them, its two hints
    as from `_hints`, true rows, their old counts).
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
    """Return the tokens of rows that an addition made protected (old count 0) or evictable (new count 0)."""
    return tl.load(s.length + rows, mask=(rows > 0) & (before + low == 0), other=0)


@triton.jit
def add_locks(s, w, row, weight):
    """Add `weight` to the lock counts of each path's row and of all rows above.

    Returns the tokens that became protected or evictable, a scalar. row, weight: int32 [PATHS, LEVELS], equal on all
    levels; row 0 means no path. The old value of a count takes about 1 us to arrive. So the loop uses it only after it
    has issued the additions to the next group of rows.
    """
    low = tl.minimum(weight, 0)  # of an unlock: minus the old count of a row that becomes evictable
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
