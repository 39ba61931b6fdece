"""Lock and unlock one place: one program, which works alone on the tree.

So plain loads and stores take the place of atomic additions, and sums stay in registers. Unless an edge is cut, the
program waits for three loads, one after the other: the handle; the row and its hints; the rows above. A path of more
than eight nodes takes one load more for each eight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels import native
from flatradix.kernels.gpu.climb import LEVELS, parent_of
from flatradix.kernels.gpu.cut import cut_locked, finish_cuts, put
from flatradix.kernels.gpu.finish import move_protected, publish, read_sizes, tell_sizes
from flatradix.kernels.gpu.launch import Arrays, Kernel, raise_driver
from flatradix.kernels.gpu.rows import handle_of, resolve
from flatradix.layout import handles as packing
from flatradix.layout import mail, numbers, reasons, scratch
from flatradix.layout.queries import PlaceAddresses


@triton.jit
def _hints(w, row):
    """Return (LEVELS rows from a row up, the row above each of them, the row above the last) according to the hints."""
    level = tl.arange(0, LEVELS)
    on = tl.zeros([LEVELS], tl.int32) + row > 0
    place = w.above + LEVELS * row.to(tl.int64)
    below = tl.load(place + level - 1, mask=on & (level > 0), other=0)
    above = tl.load(place + level, mask=on, other=0)
    return tl.where(level > 0, below, row), above, tl.load(place + (LEVELS - 1), mask=row > 0, other=0)


@triton.jit
def _look(s, w, row):
    """Load from the tree, row after row, what `_hints` returns first and last; renew the hints."""
    level = tl.arange(0, LEVELS)
    rows = tl.zeros([LEVELS], tl.int32)
    above = rows
    after = row
    for i in tl.static_range(LEVELS):
        rows = tl.where(level == i, after, rows)
        after = parent_of(s, after, after > 0)
        above = tl.where(level == i, after, above)
    tl.store(w.above + LEVELS * row.to(tl.int64) + level, above)
    return rows, after


@triton.jit
def _locks_and_lengths(s, rows):
    return tl.load(s.lock_ref + rows, mask=rows > 0, other=0), tl.load(s.length + rows, mask=rows > 0, other=0)


@triton.jit
def _climb(s, w, row, rows, above, after, SIGN: tl.constexpr):
    """Add SIGN to the lock counts of a row and of all rows above. rows, above, after: as from `_hints`.

    Returns the tokens that became protected (SIGN 1) or evictable (-1), int64.
    """
    moved = tl.zeros([LEVELS], tl.int64)
    while row > 0:
        parents = parent_of(s, rows, rows > 0)
        locks, lengths = _locks_and_lengths(s, rows)
        next_rows, next_above, next_after = _hints(w, after)
        if tl.max((parents != above).to(tl.int32)) > 0:
            rows, after = _look(s, w, row)
            locks, lengths = _locks_and_lengths(s, rows)
            next_rows, next_above, next_after = _hints(w, after)
        tl.store(s.lock_ref + rows, locks + SIGN, mask=rows > 0)
        moved += tl.where(tl.minimum(locks, locks + SIGN) == 0, lengths, 0)
        row = after
        rows = next_rows
        above = next_above
        after = next_after
    return tl.sum(moved)


@triton.jit
def _find(s, w, handles, lengths, PAGE: tl.constexpr):
    """Return (handle, length, row, reason, own locks of the row, and what `_hints` returns of it) of the place.

    The hints and own locks of the handle's row are loaded with that row. A place on a row above, as after a cut, needs
    those of the other row.
    """
    one = tl.arange(0, 1)
    handle = tl.load(handles + one)
    length = tl.load(lengths + one).to(tl.int64)
    known = (handle >= 0) & ((handle & packing.ROW_MASK) < tl.load(s.numbers + numbers.ROWS))
    guess = tl.max(tl.where(known, handle & packing.ROW_MASK, 0)).to(tl.int32)
    rows, above, after = _hints(w, guess)
    own = tl.load(s.own_locks + guess)
    row, reason = resolve(s, handle, length, one == 0, PAGE)
    row = tl.max(row).to(tl.int32)
    if row != guess:
        rows, above, after = _hints(w, row)
        own = tl.load(s.own_locks + row)
    return tl.max(handle), tl.max(length), row, tl.min(reason), own, rows, above, after


@triton.jit
def _finish(s, w, sizes, call, moved):
    """Move tokens from evictable to protected, and tell the host the tree's sizes."""
    evictable, protected, nodes, free, errors = sizes
    evictable -= moved
    protected += moved
    tl.store(s.numbers + numbers.EVICTABLE, evictable)
    tl.store(s.numbers + numbers.PROTECTED, protected)
    tell_sizes(w, call, evictable, protected, nodes, free, errors)


@triton.jit
def _refuse(s, w, call, reason, length, OPERATION: tl.constexpr):
    tl.store(w.value, length)
    publish(s, w, call, -reason, OPERATION)


@triton.jit
def _lock_and_cut(s, w, handles, call, row, length, PAGE: tl.constexpr, BIGRAM: tl.constexpr):
    """Lock the rows above a row, cut its edge, and lock the piece above the cut."""
    put(w, 1, 0, row, scratch.Q_ROW)
    put(w, 1, 0, length, scratch.Q_CUT)
    above = parent_of(s, row, row > 0)
    rows, hints, after = _hints(w, above)
    moved = _climb(s, w, above, rows, hints, after, 1)
    tl.store(w.counters + scratch.MOVED_TOKENS, moved)
    tl.debug_barrier()
    capacity = tl.load(s.numbers + numbers.ROW_CAPACITY).to(tl.int32)
    cut_locked(s, w, handles, 1, capacity, tl.load(s.numbers + numbers.CLOCK), 0, 1, PAGE, BIGRAM, 0, True)
    tl.debug_barrier()
    finish_cuts(s, w)
    move_protected(s, w, 1)
    publish(s, w, call, tl.zeros([], tl.int64) + scratch.NO_ERROR, mail.LOCK)


@triton.jit(do_not_specialize=["handles", "lengths", "call"])
def lock_one_kernel(s, w, handles, lengths, call: tl.int64, PAGE: tl.constexpr, BIGRAM: tl.constexpr):
    call = call.to(tl.int64)
    sizes = read_sizes(s)
    handle, length, row, reason, own, rows, above, after = _find(s, w, handles, lengths, PAGE)
    if reason < 0:
        _refuse(s, w, call, reason, length, mail.LOCK)
    elif length < tl.load(s.end + row).to(tl.int64):
        _lock_and_cut(s, w, handles, call, row, length, PAGE, BIGRAM)
    else:
        renewed = handle_of(s, row)
        moved = _climb(s, w, row, rows, above, after, 1)
        tl.store(s.own_locks + row, own + 1, mask=row > 0)
        tl.store(handles, renewed, mask=renewed != handle)
        _finish(s, w, sizes, call, moved)


@triton.jit(do_not_specialize=["handles", "lengths", "call"])
def unlock_one_kernel(s, w, handles, lengths, call: tl.int64, PAGE: tl.constexpr):
    call = call.to(tl.int64)
    sizes = read_sizes(s)
    _handle, length, row, reason, own, rows, above, after = _find(s, w, handles, lengths, PAGE)
    if (row > 0) & ((length < tl.load(s.end + row).to(tl.int64)) | (own < 1)):
        reason = reason * 0 + reasons.NOT_LOCKED
    if reason < 0:
        _refuse(s, w, call, reason, length, mail.UNLOCK)
    else:
        moved = _climb(s, w, row, rows, above, after, -1)
        tl.store(s.own_locks + row, own - 1, mask=row > 0)
        _finish(s, w, sizes, call, -moved)


_lock = Kernel(lock_one_kernel, ["*i64", "*i32", "i64"], warps=1)
_unlock = Kernel(unlock_one_kernel, ["*i64", "*i32", "i64"], warps=1)


def lock_one(arrays: Arrays, places: PlaceAddresses, call: int, stream: int) -> None:
    """Lock one place and renew its handle, in one launch.

    stream: torch's current stream if the tree's device is torch's current device; else, or where unknown, -1.
    """
    handles, lengths, _batch, _owner = places
    direct = arrays.direct.get(_lock)
    if direct is None or stream < 0:
        _lock.only(arrays, 1, (handles, lengths, call), (arrays.page, arrays.bigram))
    elif code := native.start_lock.call(direct.record, stream, handles, lengths, call):
        raise_driver(code)


def unlock_one(arrays: Arrays, places: PlaceAddresses, call: int, stream: int) -> None:
    """Unlock one place, in one launch. stream: as for `lock_one`."""
    handles, lengths, _batch, _owner = places
    direct = arrays.direct.get(_unlock)
    if direct is None or stream < 0:
        _unlock.only(arrays, 1, (handles, lengths, call), (arrays.page,))
    elif code := native.start_lock.call(direct.record, stream, handles, lengths, call):
        raise_driver(code)
