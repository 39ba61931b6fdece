"""Gather the KV slots of places into one array, or write them into the rows of an engine's slot table."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from flatradix.kernels import native
from flatradix.kernels.gpu.cut import column
from flatradix.kernels.gpu.finish import arrive, first_refusal, publish, refuse_lanes, wait_for_all
from flatradix.kernels.gpu.launch import (
    Arrays,
    Kernel,
    Variant,
    cooperative_programs,
    direct_stream,
    raise_driver,
)
from flatradix.kernels.gpu.rows import resolve
from flatradix.layout import mail, reasons, scratch
from flatradix.layout.queries import PlaceAddresses, SlotTable

BLOCK = tl.constexpr(512)
_BATCH = 8  # the place of the batch among the arguments of `slots_kernel`


@triton.jit
def _check(s, w, handles, lengths, rows, height, width, query, batch, PAGE: tl.constexpr, TABLE: tl.constexpr):
    """Resolve and check one place. No slot is written before all places are known to be valid."""
    one = query + tl.arange(0, 1)
    length = tl.load(lengths + one).to(tl.int64)
    row, reason = resolve(s, tl.load(handles + one), length, one >= 0, PAGE)
    value = length
    if TABLE:
        number = tl.load(rows + one)
        outside = (number < 0) | (number >= height)
        value = tl.where((reason == 0) & outside, number, value)
        reason = tl.where(
            (reason == 0) & outside,
            reasons.BAD_ROW,
            tl.where((reason == 0) & (length > width), reasons.TOO_LONG, reason),
        )
    refuse_lanes(w, one.to(tl.int64), reason, value)
    tl.store(column(w, batch, scratch.Q_ROW) + one, row.to(tl.int32))


@triton.jit
def _copy_path(s, row, length, pool, target, STEP: tl.constexpr):
    """Copy the slots of one path, from its last edge up. The next edge is looked up while an edge is copied.

    STEP: 1, or the size of a page: then the page of each first slot is copied.
    """
    begin = tl.load(s.end + row) - tl.load(s.length + row)
    start = tl.load(s.start + row)
    parent = tl.load(s.parent + row)
    while row > 0:
        above = tl.maximum(parent, 0)
        next_begin = tl.load(s.end + above) - tl.load(s.length + above)
        next_start = tl.load(s.start + above)
        next_parent = tl.load(s.parent + above)
        at = begin // STEP
        while at < length // STEP:
            j = at + tl.arange(0, BLOCK)
            inside = j < length // STEP
            slot = tl.load(pool + start + (j * STEP - begin), mask=inside, other=0) // STEP
            tl.store(target + j, slot.to(target.dtype.element_ty), mask=inside)
            at += BLOCK
        length = begin
        row = above
        begin = next_begin
        start = next_start
        parent = next_parent


@triton.jit(
    do_not_specialize=[
        "handles", "lengths", "rows", "pool", "target", "stride", "height", "width", "batch", "call",
    ]
)  # fmt: skip
def slots_kernel(
    s, w, handles, lengths, rows, pool, target, stride: tl.int64, height: tl.int64, width: tl.int64, batch: tl.int32,
    call: tl.int64, PAGE: tl.constexpr, TABLE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Copy the slots of each place to `target`, or with STEP its pages, all or nothing.

    rows: int64 [B]. TABLE: the row of the slot table for each place; else the offset in `target` for each place.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    query = program
    while query < batch:
        _check(s, w, handles, lengths, rows, height, width, query, batch, PAGE, TABLE)
        query += programs
    wait_for_all(w, programs)
    error = first_refusal(w)
    if error == scratch.NO_ERROR:
        query = program
        while query < batch:
            row = tl.load(column(w, batch, scratch.Q_ROW) + query)
            place = tl.load(rows + query).to(tl.int64)
            if TABLE:
                place = place * stride
            _copy_path(s, row, tl.load(lengths + query), pool, target + place, STEP)
            query += programs
    last, _bad = arrive(w, programs)
    if last:
        if TABLE:
            publish(s, w, call.to(tl.int64), error, mail.WRITE_SLOTS)
        else:
            publish(s, w, call.to(tl.int64), error, mail.SLOTS)


_slots = Kernel(
    slots_kernel,
    ["*i64", "*i32", "*i64", "*w", "*w", "i64", "i64", "i64", "i32", "i64"],
    warps=4,
    cooperative=True,
)


@functools.cache
def _variant(page: int, table: bool, step: int, wide: tuple[bool, bool]) -> Variant:
    return _slots.variant((page, table, step), wide)


def _start(arrays: Arrays, variant: Variant, arguments: tuple[int, ...]) -> None:
    programs = cooperative_programs(arrays, arguments[_BATCH], 8)
    direct = arrays.direct.get(variant)
    if direct is None or (stream := direct_stream(arrays.device)) < 0:
        _slots(arrays, programs, arguments, variant.constants, variant.wide)
    elif code := native.start_slots.call(direct.record, programs, stream, *arguments):
        raise_driver(code)


def gather(arrays: Arrays, places: PlaceAddresses, pool: torch.Tensor, offsets: int, out: int, call: int) -> None:
    """Write what a pool has for place i to `out`, from `offsets[i]` on, all or nothing, in one launch.

    pool: slots or tokens of the tree. offsets: address of int64 [B]. out: address of values of the pool's dtype.
    """
    wide = pool.dtype == torch.int64
    arguments = (places.handles, places.lengths, offsets, pool.data_ptr(), out, 0, 0, 0, places.batch, call)
    _start(arrays, _variant(arrays.page, False, 1, (wide, wide)), arguments)


def write_slots(
    arrays: Arrays, places: PlaceAddresses, rows: int, table: SlotTable, call: int, pages: bool = False
) -> None:
    """Write the slots of place i into row `rows[i]` of an engine's slot table, all or nothing, in one launch.

    rows: address of int64 [B]. pages: write the page of each `page` slots instead; the table's width counts tokens.
    """
    arguments = (
        places.handles, places.lengths, rows, arrays.pool, table.address, table.stride, table.height, table.width,
        places.batch, call,
    )  # fmt: skip
    step = arrays.page if pages else 1
    _start(arrays, _variant(arrays.page, True, step, (arrays.pool_wide, table.wide)), arguments)
