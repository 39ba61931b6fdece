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
    multi_processors,
    raise_driver,
)
from flatradix.kernels.gpu.rows import resolve
from flatradix.layout import mail, reasons, scratch
from flatradix.layout.queries import PlaceAddresses, SlotTable

BLOCK = tl.constexpr(1024)
# Programs that copy one path at most: a block waits 1 us for its slots (H200).
MOST_PARTS = 64


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
def _copy_path(s, row, length, pool, target, part, parts, STEP: tl.constexpr):
    """Copy the slots of one path, from its last edge up. The next edge is looked up while an edge is copied.

    part, parts: this program copies each `parts`-th block. STEP: 1, or the size of a page: then the page of each first
    slot is copied.
    """
    begin = tl.load(s.end + row) - tl.load(s.length + row)
    start = tl.load(s.start + row)
    parent = tl.load(s.parent + row)
    while row > 0:
        above = tl.maximum(parent, 0)
        next_begin = tl.load(s.end + above) - tl.load(s.length + above)
        next_start = tl.load(s.start + above)
        next_parent = tl.load(s.parent + above)
        first = begin // STEP
        end = length // STEP
        at = first + (part + parts - first // BLOCK % parts) % parts * BLOCK
        while at < end:
            j = at + tl.arange(0, BLOCK)
            inside = j < end
            slot = tl.load(pool + start + (j * STEP - begin), mask=inside, other=0) // STEP
            tl.store(target + j, slot.to(target.dtype.element_ty), mask=inside)
            at += parts * BLOCK
        length = begin
        row = above
        begin = next_begin
        start = next_start
        parent = next_parent


@triton.jit(
    do_not_specialize=[
        "handles", "lengths", "rows", "pool", "target", "stride", "height", "width", "batch", "call", "parts",
    ]
)  # fmt: skip
def slots_kernel(
    s, w, handles, lengths, rows, pool, target, stride: tl.int64, height: tl.int64, width: tl.int64, batch: tl.int32,
    call: tl.int64, parts: tl.int32, PAGE: tl.constexpr, TABLE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Copy the slots of each place to `target`, or with STEP its pages, all or nothing.

    parts: how many programs share a path.
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
        task = program
        while task < batch * parts:
            query = task // parts
            row = tl.load(column(w, batch, scratch.Q_ROW) + query)
            place = tl.load(rows + query).to(tl.int64)
            if TABLE:
                place = place * stride
            _copy_path(s, row, tl.load(lengths + query), pool, target + place, task % parts, parts, STEP)
            task += programs
    last, _bad = arrive(w, programs)
    if last:
        if TABLE:
            publish(s, w, call.to(tl.int64), error, mail.WRITE_SLOTS)
        else:
            publish(s, w, call.to(tl.int64), error, mail.SLOTS)


_slots = Kernel(
    slots_kernel,
    ["*i64", "*i32", "*i64", "*w", "*w", "i64", "i64", "i64", "i32", "i64", "i32"],
    warps=4,
    cooperative=True,
)


@functools.cache
def _variant(page: int, table: bool, step: int, wide: tuple[bool, bool]) -> Variant:
    return _slots.variant((page, table, step), wide)


def _parts(arrays: Arrays, batch: int, longest: int) -> int:
    """Return how many programs share a path of at most `longest` slots: few paths must keep a GPU busy too."""
    blocks = -(-longest // BLOCK.value)
    return max(1, min(2 * multi_processors(arrays.device) // batch, blocks, MOST_PARTS))


def _start(arrays: Arrays, variant: Variant, batch: int, longest: int, arguments: tuple[int, ...]) -> None:
    parts = _parts(arrays, batch, longest)
    programs = cooperative_programs(arrays, batch * parts, 8)
    direct = arrays.direct.get(variant)
    if direct is None or (stream := direct_stream(arrays.device)) < 0:
        _slots(arrays, programs, (*arguments, parts), variant.constants, variant.wide)
    elif code := native.start_slots.call(direct.record, programs, stream, *arguments, parts):
        raise_driver(code)


def gather(
    arrays: Arrays, places: PlaceAddresses, pool: torch.Tensor, offsets: int, out: int, total: int, call: int
) -> None:
    """Write what a pool has for place i to `out`, from `offsets[i]` on, all or nothing, in one launch.

    pool: slots or tokens of the tree. offsets: address of int64 [B]. out: address of `total` values of the pool's
    dtype.
    """
    wide, batch = pool.dtype == torch.int64, places.batch
    arguments = (places.handles, places.lengths, offsets, pool.data_ptr(), out, 0, 0, 0, batch, call)
    _start(arrays, _variant(arrays.page, False, 1, (wide, wide)), batch, total, arguments)


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
    variant = _variant(arrays.page, True, step, (arrays.pool_wide, table.wide))
    _start(arrays, variant, places.batch, table.width // step, arguments)
