"""Lock and unlock: lock counts on every node from a place to the root.

Eight programs resolve the same 32 queries, and each climbs for four of them. For up to 8 queries one program does all
the work; a single query has kernels of its own (`lock_one.py`). Of the 32 queries, those that end at the same node
climb once, together. Otherwise 1,024 locks of one path of 64 nodes would be 65,536 additions to 64 addresses, which
take 49 us on an H200. An invalid query is found while other queries climb already. The second launch, or the only
program, then undoes the whole call.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.climb import LEVELS, PATHS, add_locks, parent_of, take_back_locks
from flatradix.kernels.gpu.cut import column, cut_locked, finish_cuts
from flatradix.kernels.gpu.finish import arrive, first_refusal, move_protected, publish, refuse_lanes
from flatradix.kernels.gpu.launch import Arrays, Kernel, cooperative_programs
from flatradix.kernels.gpu.lock_one import lock_one, unlock_one
from flatradix.kernels.gpu.rows import handle_of, resolve
from flatradix.layout import mail, numbers, reasons, scratch
from flatradix.layout.queries import PlaceAddresses

LANES = tl.constexpr(32)


@triton.jit
def row_or_above(s, row, cut):
    """Return the row from which each lane's query locks upwards: the row above where it cuts `row`; 0 for the root."""
    return tl.where(cut > 0, parent_of(s, row, cut > 0), row)


@triton.jit
def _paths(row, first):
    """Return the rows from which the lanes from `first` on climb, and for how many queries: both [PATHS, 1].

    The first of the lanes with the same row climbs for all of them. The others have row 0 and do not climb.
    """
    lane = tl.arange(0, LANES)[None, :]
    own = (first + tl.arange(0, PATHS))[:, None]
    own_row = tl.sum(tl.where(lane == own, row[None, :], 0), axis=1)[:, None]
    equal = own_row == row[None, :]
    count = tl.sum(equal.to(tl.int32), axis=1)[:, None]
    leads = tl.min(tl.where(equal, lane, LANES), axis=1)[:, None] == own
    return tl.where(leads, own_row, 0), count


@triton.jit
def _each_level(value):
    return tl.broadcast_to(value, [PATHS, LEVELS])


@triton.jit
def _remember(w, batch, query, row, cut, active):
    tl.store(column(w, batch, scratch.Q_ROW) + query, row, mask=active)
    tl.store(column(w, batch, scratch.Q_CUT) + query, cut, mask=active)


@triton.jit
def _take_back(s, w, batch, SIGN: tl.constexpr):
    """Undo what all queries of a refused call did. SIGN: 1 for a lock, -1 for an unlock."""
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, LANES)
        row = tl.load(column(w, batch, scratch.Q_ROW) + query, mask=query < batch, other=0)
        cut = tl.load(column(w, batch, scratch.Q_CUT) + query, mask=query < batch, other=0)
        tl.atomic_add(s.own_locks + row, -SIGN, mask=(row > 0) & (cut == 0), sem="relaxed")
        take_back_locks(s, row_or_above(s, row, cut), tl.zeros_like(row) + SIGN)
        first += LANES
    tl.store(w.counters + scratch.MOVED_TOKENS, 0)


@triton.jit
def _renew(s, w, handles, batch, program, programs):
    """Replace each handle whose lock cuts no edge by the handle of the row on which the lock ends.

    If the edge was cut since the place was found, the place may now lie on a row above the row of the old handle.
    """
    first = program * LANES
    while first < batch:
        query = first + tl.arange(0, LANES)
        row = tl.load(column(w, batch, scratch.Q_ROW) + query, mask=query < batch, other=0)
        cut = tl.load(column(w, batch, scratch.Q_CUT) + query, mask=query < batch, other=1)
        tl.store(handles + query, handle_of(s, row), mask=cut == 0)
        first += programs * LANES


@triton.jit
def _finish_lock(
    s, w, handles, batch, rows, call, program, programs, PAGE: tl.constexpr, BIGRAM: tl.constexpr, ALONE: tl.constexpr
):
    """Finish a lock after all climbs: undo a refused call, or cut edges; then update the tree's counters.

    All programs of the launch read the same refusal and the same CUTS: these change only after all have read them.
    """
    error = first_refusal(w)
    good = error == scratch.NO_ERROR
    cuts = good & (tl.load(w.counters + scratch.CUTS, volatile=True) > 0)
    if good:
        _renew(s, w, handles, batch, program, programs)
    if cuts:
        clock = tl.load(s.numbers + numbers.CLOCK)
        cut_locked(s, w, handles, batch, rows, clock, program, programs, PAGE, BIGRAM, 0, True)
    last = program == 0
    if not ALONE:
        if cuts | (error != scratch.NO_ERROR):
            last, _bad = arrive(w, programs)
    if last:
        tl.debug_barrier()
        if cuts:
            finish_cuts(s, w)
        if not good:
            _take_back(s, w, batch, 1)
            tl.store(w.counters + scratch.CUTS, 0)
        move_protected(s, w, 1)
        publish(s, w, call, error, mail.LOCK)


@triton.jit
def _part(ALONE: tl.constexpr):
    """Return (which part of the paths of LANES queries this program climbs, number of parts)."""
    parts: tl.constexpr = 1 if ALONE else LANES // PATHS
    return tl.program_id(0) % parts, parts


@triton.jit(do_not_specialize=["handles", "lengths", "batch", "rows", "call"])
def lock_kernel(
    s, w, handles, lengths, batch: tl.int32, rows: tl.int32, call: tl.int64,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    part, parts = _part(ALONE)
    if not ALONE:
        tl.store(w.counters + scratch.STARTED, call.to(tl.int64))
    query = tl.program_id(0) // parts * LANES + tl.arange(0, LANES)
    active = query < batch
    handle = tl.load(handles + query, mask=active, other=0)
    length = tl.load(lengths + query, mask=active, other=0)
    row, reason = resolve(s, handle, length.to(tl.int64), active, PAGE)
    refuse_lanes(w, query, tl.where(active, reason, 0), length.to(tl.int64))
    row = row.to(tl.int32)
    end = tl.load(s.end + row, mask=row > 0, other=0)
    cut = tl.where((row > 0) & (length < end), length, 0)
    _remember(w, batch, query, row, cut, active)
    if part == 0:
        tl.atomic_add(s.own_locks + row, 1, mask=(row > 0) & (cut == 0), sem="relaxed")
        if tl.max(cut) > 0:
            tl.atomic_add(w.counters + scratch.CUTS, 1, sem="relaxed")
    from_row = row_or_above(s, row, cut)
    newly = tl.zeros([], tl.int64)
    first = part * PATHS
    while first < tl.minimum(batch - tl.program_id(0) // parts * LANES, LANES):
        path, count = _paths(from_row, first)
        newly += add_locks(s, w, _each_level(path), _each_level(count))
        first += parts * PATHS
    if newly > 0:
        tl.atomic_add(w.counters + scratch.MOVED_TOKENS, newly, sem="relaxed")
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
    """Refuse the unlocks that exceed the own locks of their rows. Slow, and rare.

    The counts are already reduced. If the count of a row is -n, the row lacked n locks, and the last n of its queries
    are refused.
    """
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, LANES)
        row = tl.load(column(w, batch, scratch.Q_ROW) + query, mask=query < batch, other=0)
        lacking = -tl.load(s.own_locks + row, mask=(query < batch) & (row > 0), other=0)
        later = tl.zeros([LANES], tl.int32)
        other = tl.zeros([], tl.int32)
        while other < batch:
            k = other + tl.arange(0, LANES)
            theirs = tl.load(column(w, batch, scratch.Q_ROW) + k, mask=k < batch, other=-1)
            after = (theirs[None, :] == row[:, None]) & (k[None, :] > query[:, None])
            later += tl.sum(after.to(tl.int32), axis=1)
            other += LANES
        surplus = (query < batch) & (row > 0) & (later < lacking)
        length = tl.load(s.end + row, mask=surplus, other=0).to(tl.int64)
        refuse_lanes(w, query, tl.where(surplus, reasons.NOT_LOCKED, 0).to(tl.int64), length)
        first += LANES
    tl.debug_barrier()


@triton.jit
def _finish_unlock(s, w, batch, call):
    if tl.load(w.counters + scratch.CUT_COUNT, volatile=True) > 0:
        _refuse_surplus(s, w, batch)
        tl.store(w.counters + scratch.CUT_COUNT, 0)
    error = first_refusal(w)
    if error != scratch.NO_ERROR:
        _take_back(s, w, batch, -1)
    move_protected(s, w, -1)
    publish(s, w, call, error, mail.UNLOCK)


@triton.jit(do_not_specialize=["handles", "lengths", "batch", "call"])
def unlock_kernel(s, w, handles, lengths, batch: tl.int32, call: tl.int64, PAGE: tl.constexpr, ALONE: tl.constexpr):
    part, parts = _part(ALONE)
    if not ALONE:
        tl.store(w.counters + scratch.STARTED, -call.to(tl.int64))
    query = tl.program_id(0) // parts * LANES + tl.arange(0, LANES)
    active = query < batch
    handle = tl.load(handles + query, mask=active, other=0)
    length = tl.load(lengths + query, mask=active, other=0)
    row, reason = resolve(s, handle, length.to(tl.int64), active, PAGE)
    row = row.to(tl.int32)
    end = tl.load(s.end + row, mask=row > 0, other=0)
    reason = tl.where((row > 0) & (length < end), reasons.NOT_LOCKED, reason)
    refuse_lanes(w, query, tl.where(active, reason, 0), length.to(tl.int64))
    row = tl.where(reason < 0, 0, row)
    _remember(w, batch, query, row, tl.zeros_like(row), active)
    freed = tl.zeros([], tl.int64)
    first = part * PATHS
    while first < tl.minimum(batch - tl.program_id(0) // parts * LANES, LANES):
        path, count = _paths(row, first)
        path, count = _each_level(path), _each_level(count)
        once = (path > 0) & (tl.arange(0, LEVELS)[None, :] == 0)
        locks = tl.atomic_add(s.own_locks + path, -count, mask=once, sem="relaxed")
        freed += add_locks(s, w, path, -count)
        if tl.max((once & (locks < count)).to(tl.int32)) > 0:
            tl.atomic_add(w.counters + scratch.CUT_COUNT, 1, sem="relaxed")
        first += parts * PATHS
    if freed > 0:
        tl.atomic_add(w.counters + scratch.MOVED_TOKENS, freed, sem="relaxed")
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


def _programs(batch: int) -> tuple[int, bool]:
    """Return (number of programs that climb, whether one program does all the work).

    One program makes up to two climbs in a row, which replaces the second launch.
    """
    alone = batch <= 2 * PATHS.value
    return 1 if alone else -(-batch // LANES.value) * (LANES.value // PATHS.value), alone


def lock(arrays: Arrays, places: PlaceAddresses, call: int) -> None:
    """Lock a batch of places and renew their handles, all or nothing. One launch for up to 8 places, else two."""
    handles, lengths, batch, _owner = places
    if batch == 1:
        lock_one(arrays, places, call, -1)
        return
    programs, alone = _programs(batch)
    _lock(
        arrays, programs, (handles, lengths, batch, arrays.rows, call),
        (arrays.page, arrays.bigram, alone),
    )  # fmt: skip
    if not alone:
        finish_lock(arrays, places, call)


def finish_lock(arrays: Arrays, places: PlaceAddresses, call: int) -> None:
    """Enqueue the second launch of a lock."""
    programs = cooperative_programs(arrays, -(-places.batch // LANES.value), 1)
    _finish_locks(arrays, programs, (places.handles, places.batch, arrays.rows, call), (arrays.page, arrays.bigram))


def unlock(arrays: Arrays, places: PlaceAddresses, call: int) -> None:
    """Unlock a batch of places, all or nothing. One launch for up to 8 places, else two."""
    handles, lengths, batch, _owner = places
    if batch == 1:
        unlock_one(arrays, places, call, -1)
        return
    programs, alone = _programs(batch)
    _unlock(arrays, programs, (handles, lengths, batch, call), (arrays.page, alone))
    if not alone:
        finish_unlock(arrays, places, call)


def finish_unlock(arrays: Arrays, places: PlaceAddresses, call: int) -> None:
    """Enqueue the second launch of an unlock."""
    _finish_unlocks(arrays, 1, (places.batch, call))
