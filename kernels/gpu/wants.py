"""Wants: soft pins, counted on every node from a place to the root."""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.climb import parent_of
from flatradix.kernels.gpu.finish import first_refusal, publish, refuse_lanes
from flatradix.kernels.gpu.free import found_victims
from flatradix.kernels.gpu.launch import Arrays, Kernel
from flatradix.kernels.gpu.rows import resolve
from flatradix.layout import mail, reasons, scratch
from flatradix.layout.queries import PlaceAddresses

LANES = tl.constexpr(128)


@triton.jit
def _row_of(s, handles, lengths, query, batch, PAGE: tl.constexpr, SKIP: tl.constexpr):
    """Return (row that ends at each lane's place, 0 where there is none; length; reason to refuse, 0 if none).

    SKIP: stale places are no error. Dropped places are none: nobody wants what no look-up finds.
    """
    active = query < batch
    handle = tl.load(handles + query, mask=active, other=0)
    length = tl.load(lengths + query, mask=active, other=0).to(tl.int64)
    row, reason = resolve(s, handle, length, active, PAGE)
    reason = tl.where(active, reason, 0)
    if SKIP:
        reason = tl.where(reason == reasons.STALE, 0, reason)
    row = tl.where(tl.load(s.created + row, mask=row > 0, other=0) < 0, 0, row)
    end = tl.load(s.end + row, mask=row > 0, other=0).to(tl.int64)
    reason = tl.where((row > 0) & (end != length), reasons.NOT_WANTED, reason)
    return tl.where(reason == 0, row, 0), length, reason


@triton.jit
def _add_wants(s, row, count):
    """Add `count` to the wants of each lane's row and of all rows above."""
    while tl.max(row) > 0:
        tl.atomic_add(s.wanted + row, count, mask=row > 0, sem="relaxed")
        row = parent_of(s, row, row > 0).to(tl.int64)


@triton.jit
def _add_own(s, handles, lengths, batch, count, PAGE: tl.constexpr, SKIP: tl.constexpr):
    """Add `count` to the soft pins that end at the first `batch` places."""
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, LANES)
        row, _length, _reason = _row_of(s, handles, lengths, query, batch, PAGE, SKIP)
        tl.atomic_add(s.own_wants + row, count, mask=row > 0, sem="relaxed")
        first += LANES
    tl.debug_barrier()


@triton.jit
def _lacks(s, handles, lengths, batch, PAGE: tl.constexpr):
    """Return whether a place has had more pins removed than there were."""
    lowest = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, LANES)
        row, _length, _reason = _row_of(s, handles, lengths, query, batch, PAGE, True)
        lowest = tl.minimum(lowest, tl.min(tl.load(s.own_wants + row, mask=row > 0, other=0, volatile=True)))
        first += LANES
    return lowest < 0


@triton.jit
def _refuse_surplus(s, w, handles, lengths, batch, PAGE: tl.constexpr):
    """Refuse the first place whose pin is not there, given that one is not. Goes one by one, as only errors need it."""
    query = tl.zeros([], tl.int32)
    searching = query < batch
    while searching:
        one = query + tl.arange(0, 1)
        row, length, _reason = _row_of(s, handles, lengths, one, batch, PAGE, True)
        left = tl.atomic_add(s.own_wants + row, -1, mask=row > 0, sem="relaxed") - 1
        surplus = tl.min(tl.where(row > 0, left, 0)) < 0
        if surplus:
            refuse_lanes(w, one, tl.zeros([1], tl.int64) + reasons.NOT_WANTED, length)
        query += 1
        searching = (query < batch) & (not surplus)
    tl.debug_barrier()
    _add_own(s, handles, lengths, query, 1, PAGE, True)


@triton.jit(do_not_specialize=["handles", "lengths", "batch", "call"])
def wants_kernel(
    s, w, handles, lengths, batch: tl.int32, call: tl.int64, PAGE: tl.constexpr, SIGN: tl.constexpr,
    SKIP: tl.constexpr,
):  # fmt: skip
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, LANES)
        _row, length, reason = _row_of(s, handles, lengths, query, batch, PAGE, SKIP)
        refuse_lanes(w, query, reason, length)
        first += LANES
    tl.debug_barrier()
    _add_own(s, handles, lengths, batch, SIGN, PAGE, SKIP)
    if SIGN < 0:
        if _lacks(s, handles, lengths, batch, PAGE):
            _add_own(s, handles, lengths, batch, 1, PAGE, SKIP)
            _refuse_surplus(s, w, handles, lengths, batch, PAGE)
            _add_own(s, handles, lengths, batch, -1, PAGE, SKIP)
    error = first_refusal(w)
    if error != scratch.NO_ERROR:
        _add_own(s, handles, lengths, batch, -SIGN, PAGE, SKIP)
    else:
        first = tl.zeros([], tl.int32)
        while first < batch:
            query = first + tl.arange(0, LANES)
            row, _length, _reason = _row_of(s, handles, lengths, query, batch, PAGE, SKIP)
            _add_wants(s, row, SIGN)
            first += LANES
    publish(s, w, call.to(tl.int64), error, mail.WANT if SIGN > 0 else mail.UNWANT)


_wants = Kernel(wants_kernel, ["*i64", "*i32", "i32", "i64"])


def want(arrays: Arrays, places: PlaceAddresses, call: int) -> None:
    """Add one want to each path. Each place must be the end of a node: `lock` and `unlock` split edges before."""
    _wants(arrays, 1, (places.handles, places.lengths, places.batch, call), (arrays.page, 1, False))


def unwant(arrays: Arrays, places: PlaceAddresses, call: int) -> None:
    """Remove one want from each path. Stale places are skipped."""
    _wants(arrays, 1, (places.handles, places.lengths, places.batch, call), (arrays.page, -1, True))


def want_again(arrays: Arrays, places: PlaceAddresses, call: int) -> None:
    """Undo `unwant`, which has skipped stale places."""
    _wants(arrays, 1, (places.handles, places.lengths, places.batch, call), (arrays.page, 1, True))


@triton.jit(do_not_specialize=["count", "space"])
def end_wants_kernel(s, w, count: tl.int64, space: tl.int64):
    zero = tl.zeros([], tl.int64)
    count, _tokens, _kept, good = found_victims(s, w, count.to(tl.int64), zero, zero, space.to(tl.int64))
    count = tl.where(good, count, 0)
    victim = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    row = tl.load(w.victims + victim, mask=victim < count, other=0).to(tl.int64)
    own = tl.load(s.own_wants + row, mask=row > 0, other=0)
    row = tl.where(own > 0, row, 0)
    tl.store(s.own_wants + row, 0, mask=row > 0)
    _add_wants(s, row, -own)


_end_wants = Kernel(end_wants_kernel, ["i64", "i64"])


def end_wants(arrays: Arrays, count: int) -> None:
    """End the wants of the `count` victims of `select`, before `free`: the nodes above lose them too.

    That of a victim that is only shortened ends too, as its place goes.
    """
    _end_wants(arrays, -(-count // LANES.value), (count, 0))


def end_wants_selected(arrays: Arrays, space: int) -> None:
    """Do what `end_wants` does, before `free_selected`, unless that frees nothing. space: of its output."""
    victims = min(space // arrays.page, arrays.rows)
    _end_wants(arrays, max(1, -(-victims // LANES.value)), (-1, space))


@triton.jit(do_not_specialize=["handles", "lengths", "out", "batch"])
def alive_kernel(s, w, handles, lengths, out, batch: tl.int32, PAGE: tl.constexpr):
    query = tl.program_id(0) * LANES + tl.arange(0, LANES)
    active = query < batch
    handle = tl.load(handles + query, mask=active, other=0)
    length = tl.load(lengths + query, mask=active, other=0).to(tl.int64)
    row, reason = resolve(s, handle, length, active, PAGE)
    there = (reason == 0) & (tl.load(s.created + row, mask=row > 0, other=0) >= 0)
    tl.store(out + query, there.to(tl.int32), mask=active)


_alive = Kernel(alive_kernel, ["*i64", "*i32", "*i32", "i32"])


def alive(arrays: Arrays, places: PlaceAddresses, out: int) -> None:
    """Fill `out`, the address of int32 [B], with 1 for each place that is in the tree and not dropped, else 0."""
    batch = places.batch
    _alive(arrays, -(-batch // LANES.value), (places.handles, places.lengths, out, batch), (arrays.page,))
