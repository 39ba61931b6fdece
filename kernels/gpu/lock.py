"""Lock and unlock: reference counts on every node from a place to the root.

A lane climbs one path. Lanes of a program that end at the same node climb as one: 1,024 locks of one path of 64 nodes
would otherwise be 65,536 additions on 64 addresses, which take 49 us on an H200. A bad query is found while the others
climb; the program that is done last then takes everything back.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix import meta
from flatradix.kernels.gpu.cut import book_cuts, column, cut_locked
from flatradix.kernels.gpu.finish import first_refusal, is_last, move_protected, publish, refuse_lanes
from flatradix.kernels.gpu.launch import Bound, Kernel, resident
from flatradix.kernels.gpu.rows import handle_of, resolve
from flatradix.refusals import NOT_LOCKED

LANES = tl.constexpr(32)
NO_LOCK = tl.constexpr(NOT_LOCKED)


@triton.jit
def _step(s, row, weight):
    on = row > 0
    parent = tl.load(s.parent + row, mask=on, other=0)
    length = tl.load(s.length + row, mask=on, other=0)
    before = tl.atomic_add(s.lock_ref + row, weight, mask=on, sem="relaxed")
    return tl.maximum(parent, 0), length, before


@triton.jit
def _four_steps(s, row, weight):
    row, size_0, before_0 = _step(s, row, weight)
    row, size_1, before_1 = _step(s, row, weight)
    row, size_2, before_2 = _step(s, row, weight)
    row, size_3, before_3 = _step(s, row, weight)
    return row, size_0, size_1, size_2, size_3, before_0, before_1, before_2, before_3


@triton.jit
def _changed(low, size_0, size_1, size_2, size_3, before_0, before_1, before_2, before_3):
    """Tokens that four additions made protected (the count was 0) or evictable (it is 0 now)."""
    changed = tl.where(before_0 + low == 0, size_0, 0) + tl.where(before_1 + low == 0, size_1, 0)
    return changed + tl.where(before_2 + low == 0, size_2, 0) + tl.where(before_3 + low == 0, size_3, 0)


@triton.jit
def add_locks(s, row, weight):
    """Add `weight` to the counts of each lane's row and all above; returns each lane's tokens that changed sides.

    Lanes of int32. A count's old value takes about 1 us to arrive, as long as eight steps, so it is looked at eight
    steps later: the climb waits for nothing but the parents.
    """
    low = tl.minimum(weight, 0)
    zero = tl.zeros_like(row)
    changed = zero
    a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    c0, c1, c2, c3, d0, d1, d2, d3 = zero, zero, zero, zero, zero, zero, zero, zero
    while tl.max(row) > 0:
        row, e0, e1, e2, e3, f0, f1, f2, f3 = _four_steps(s, row, weight)
        changed += _changed(low, a0, a1, a2, a3, b0, b1, b2, b3)
        row, g0, g1, g2, g3, h0, h1, h2, h3 = _four_steps(s, row, weight)
        changed += _changed(low, c0, c1, c2, c3, d0, d1, d2, d3)
        a0, a1, a2, a3, b0, b1, b2, b3 = e0, e1, e2, e3, f0, f1, f2, f3
        c0, c1, c2, c3, d0, d1, d2, d3 = g0, g1, g2, g3, h0, h1, h2, h3
    changed += _changed(low, a0, a1, a2, a3, b0, b1, b2, b3)
    return changed + _changed(low, c0, c1, c2, c3, d0, d1, d2, d3)


@triton.jit
def unlock_up(s, row, from_above):
    """Take back one lock on each lane's path, from its row (0: none), or its parent where `from_above`."""
    parent = tl.load(s.parent + row, mask=row > 0, other=0)
    add_locks(s, tl.where(from_above, tl.maximum(parent, 0), row), tl.zeros_like(row) - 1)


@triton.jit
def _together(row):
    """(how many lanes have this row, whether this lane is the first of them)."""
    lane = tl.arange(0, LANES)
    equal = row[:, None] == row[None, :]
    count = tl.sum(equal.to(tl.int32), axis=1)
    first = tl.min(tl.where(equal, lane[None, :], LANES), axis=1)
    return count, first == lane


@triton.jit
def _remember(w, batch, query, row, cut, active):
    tl.store(column(w, batch, meta.Q_ROW) + query, row, mask=active)
    tl.store(column(w, batch, meta.Q_CUT) + query, cut, mask=active)


@triton.jit
def _take_back(s, w, batch, SIGN: tl.constexpr):
    """Undo what all queries of a refused call did: SIGN 1 a lock, -1 an unlock."""
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, LANES)
        row = tl.load(column(w, batch, meta.Q_ROW) + query, mask=query < batch, other=0)
        cut = tl.load(column(w, batch, meta.Q_CUT) + query, mask=query < batch, other=0)
        tl.atomic_add(s.own_locks + row, -SIGN, mask=(row > 0) & (cut == 0), sem="relaxed")
        above = tl.load(s.parent + row, mask=row > 0, other=0)
        add_locks(s, tl.where(cut > 0, tl.maximum(above, 0), row), tl.zeros([LANES], tl.int32) - SIGN)
        first += LANES
    tl.store(w.number + meta.NEWLY, 0)


@triton.jit
def _renew(s, w, handles, batch, program, programs):
    """Name the row on which each lock ends, where it cuts none: the place may have moved up since it was found."""
    first = program * LANES
    while first < batch:
        query = first + tl.arange(0, LANES)
        row = tl.load(column(w, batch, meta.Q_ROW) + query, mask=query < batch, other=0)
        cut = tl.load(column(w, batch, meta.Q_CUT) + query, mask=query < batch, other=1)
        tl.store(handles + query, handle_of(s, row), mask=cut == 0)
        first += programs * LANES


@triton.jit
def _finish_lock(
    s, w, handles, batch, rows, call, program, programs, PAGE: tl.constexpr, BIGRAM: tl.constexpr, ALONE: tl.constexpr
):
    """What remains once all have climbed: to undo it all, or to cut edges, and the sums.

    All programs of the launch find the same numbers here, as these are changed by the last of them only.
    """
    error = first_refusal(w)
    good = error == meta.NO_ERROR
    cuts = good & (tl.load(w.number + meta.CUTS, volatile=True) > 0)
    if good:
        _renew(s, w, handles, batch, program, programs)
    if cuts:
        clock = tl.load(s.meta + meta.CLOCK)
        cut_locked(s, w, handles, batch, rows, clock, program, programs, PAGE, BIGRAM, 0)
    last = program == 0
    if not ALONE:
        if cuts | (error != meta.NO_ERROR):
            last, _bad = is_last(w, programs)
    if last:
        tl.debug_barrier()
        if cuts:
            book_cuts(s, w)
        if not good:
            _take_back(s, w, batch, 1)
            tl.store(w.number + meta.CUTS, 0)
        move_protected(s, w, 1)
        publish(s, w, call, error, meta.LOCK)


@triton.jit(do_not_specialize=["handles", "lengths", "batch", "rows", "call"])
def lock_kernel(
    s, w, handles, lengths, batch: tl.int32, rows: tl.int32, call: tl.int64,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0) * LANES + tl.arange(0, LANES)
    active = query < batch
    handle = tl.load(handles + query, mask=active, other=0)
    length = tl.load(lengths + query, mask=active, other=0)
    row, reason = resolve(s, handle, length.to(tl.int64), active, PAGE)
    refuse_lanes(w, query, tl.where(active, reason, 0), length.to(tl.int64))
    row = row.to(tl.int32)
    end = tl.load(s.end + row, mask=row > 0, other=0)
    cut = tl.where((row > 0) & (length < end), length, 0)
    _remember(w, batch, query, row, cut, active)
    tl.atomic_add(s.own_locks + row, 1, mask=(row > 0) & (cut == 0), sem="relaxed")
    above = tl.load(s.parent + row, mask=cut > 0, other=0)
    from_row = tl.where(cut > 0, tl.maximum(above, 0), row)
    count, is_first = _together(from_row)
    newly = tl.sum(add_locks(s, tl.where(is_first, from_row, 0), count).to(tl.int64))
    if newly > 0:
        tl.atomic_add(w.number + meta.NEWLY, newly, sem="relaxed")
    if tl.max(cut) > 0:
        tl.atomic_add(w.number + meta.CUTS, 1, sem="relaxed")
    if ALONE:
        tl.debug_barrier()
        _finish_lock(s, w, handles, batch, rows, call, 0, 1, PAGE, BIGRAM, True)


@triton.jit(do_not_specialize=["handles", "batch", "rows", "call"])
def finish_lock_kernel(
    s, w, handles, batch: tl.int32, rows: tl.int32, call: tl.int64, PAGE: tl.constexpr, BIGRAM: tl.constexpr
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    _finish_lock(s, w, handles, batch, rows, call, program, programs, PAGE, BIGRAM, False)


@triton.jit
def _refuse_surplus(s, w, batch):
    """An unlock too many: which query is the first, of those that the rows' own locks do not cover. Slow, and rare.

    The counts were already taken down, so a row lacks as many locks as its count is below zero, and the last so many of
    its queries are those too many.
    """
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, LANES)
        row = tl.load(column(w, batch, meta.Q_ROW) + query, mask=query < batch, other=0)
        lacking = -tl.load(s.own_locks + row, mask=(query < batch) & (row > 0), other=0)
        later = tl.zeros([LANES], tl.int32)
        other = tl.zeros([], tl.int32)
        while other < batch:
            k = other + tl.arange(0, LANES)
            theirs = tl.load(column(w, batch, meta.Q_ROW) + k, mask=k < batch, other=-1)
            after = (theirs[None, :] == row[:, None]) & (k[None, :] > query[:, None])
            later += tl.sum(after.to(tl.int32), axis=1)
            other += LANES
        surplus = (query < batch) & (row > 0) & (later < lacking)
        length = tl.load(s.end + row, mask=surplus, other=0).to(tl.int64)
        refuse_lanes(w, query, tl.where(surplus, NO_LOCK, 0).to(tl.int64), length)
        first += LANES
    tl.debug_barrier()


@triton.jit
def _finish_unlock(s, w, batch, call):
    if tl.load(w.number + meta.COUNT, volatile=True) > 0:
        _refuse_surplus(s, w, batch)
        tl.store(w.number + meta.COUNT, 0)
    error = first_refusal(w)
    if error != meta.NO_ERROR:
        _take_back(s, w, batch, -1)
    move_protected(s, w, -1)
    publish(s, w, call, error, meta.UNLOCK)


@triton.jit(do_not_specialize=["handles", "lengths", "batch", "call"])
def unlock_kernel(s, w, handles, lengths, batch: tl.int32, call: tl.int64, PAGE: tl.constexpr, ALONE: tl.constexpr):
    query = tl.program_id(0) * LANES + tl.arange(0, LANES)
    active = query < batch
    handle = tl.load(handles + query, mask=active, other=0)
    length = tl.load(lengths + query, mask=active, other=0)
    row, reason = resolve(s, handle, length.to(tl.int64), active, PAGE)
    row = row.to(tl.int32)
    end = tl.load(s.end + row, mask=row > 0, other=0)
    reason = tl.where((row > 0) & (length < end), NO_LOCK, reason)
    refuse_lanes(w, query, tl.where(active, reason, 0), length.to(tl.int64))
    row = tl.where(reason < 0, 0, row)
    _remember(w, batch, query, row, tl.zeros_like(row), active)
    count, is_first = _together(row)
    leads = is_first & (row > 0)
    locks = tl.atomic_add(s.own_locks + row, -count, mask=leads, sem="relaxed")
    freed = tl.sum(add_locks(s, tl.where(leads, row, 0), -count).to(tl.int64))
    if freed > 0:
        tl.atomic_add(w.number + meta.NEWLY, freed, sem="relaxed")
    if tl.max(tl.where(leads & (locks < count), 1, 0)) > 0:
        tl.atomic_add(w.number + meta.COUNT, 1, sem="relaxed")
    if ALONE:
        tl.debug_barrier()
        _finish_unlock(s, w, batch, call)


@triton.jit(do_not_specialize=["batch", "call"])
def finish_unlock_kernel(s, w, batch: tl.int32, call: tl.int64):
    _finish_unlock(s, w, batch, call)


_lock = Kernel(lock_kernel, ["*i64", "*i32", "i32", "i32", "i64"], warps=1)
_finish_locks = Kernel(finish_lock_kernel, ["*i64", "i32", "i32", "i64"], cooperative=True)
_unlock = Kernel(unlock_kernel, ["*i64", "*i32", "i32", "i64"], warps=1)
_finish_unlocks = Kernel(finish_unlock_kernel, ["i32", "i64"], warps=1)


def _programs(batch: int) -> int:
    return -(-batch // LANES.value)


def lock(bound: Bound, handles: int, lengths: int, batch: int, call: int, page: int, bigram: bool) -> None:
    """Lock a batch of places; `handles` int64 [B] and `lengths` int32 [B] are addresses, handles of cut edges renewed.

    One launch for up to 32 places, else two.
    """
    programs = _programs(batch)
    _lock(bound, programs, (handles, lengths, batch, bound.rows, call), (page, bigram, programs == 1))
    if programs > 1:
        _finish_locks(bound, resident(bound, programs, 1), (handles, batch, bound.rows, call), (page, bigram))


def unlock(bound: Bound, handles: int, lengths: int, batch: int, call: int, page: int) -> None:
    """Unlock a batch of places, all or nothing; launches as for `lock`."""
    programs = _programs(batch)
    _unlock(bound, programs, (handles, lengths, batch, call), (page, programs == 1))
    if programs > 1:
        _finish_unlocks(bound, 1, (batch, call))
