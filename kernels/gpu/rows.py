"""Rows and handles on a GPU: find the row on which a place lies, and assign rows to new nodes in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.launch import device_function
from flatradix.layout import handles, numbers, reasons
from flatradix.layout.state import FREE_ROW

_pack_handle = device_function(handles.pack_handle)
next_generation = device_function(handles.next_generation)

FREE = tl.constexpr(FREE_ROW)


@triton.jit
def handle_of(s, row):
    """Return the handle of a row, int64; scalar or lanes. The row must exist (row 0 is the root)."""
    return _pack_handle(row.to(tl.int64), tl.load(s.numbers + numbers.GENERATION) + tl.load(s.generation + row))


@triton.jit
def resolve(s, handle, length, active, PAGE: tl.constexpr):
    """Return (row, reason) of places, lanes of int64. The reason is 0, or says why there is no such place.

    The place lies on the edge of the row: end - edge length < `length` <= end. For length 0 the row is the root. Where
    evictions are by pages, a place beyond the end of a row is stale.
    """
    row = handle & handles.ROW_MASK
    active = active & (handle >= 0) & (row < tl.load(s.numbers + numbers.ROWS))
    generation = tl.load(s.generation + row, mask=active, other=0)
    parent = tl.load(s.parent + row, mask=active, other=FREE).to(tl.int64)
    end = tl.load(s.end + row, mask=active, other=0).to(tl.int64)
    edge = tl.load(s.length + row, mask=active, other=0).to(tl.int64)
    now = (tl.load(s.numbers + numbers.GENERATION) + generation) & handles.GENERATION_MASK
    fresh = active & ((handle >> handles.ROW_BITS) == now) & (parent != FREE)
    there = fresh & (length >= 0) & (length <= end) & (length % PAGE == 0)
    beyond = fresh & (row > 0) & (length > end) & (length % PAGE == 0)
    cut = tl.load(s.numbers + numbers.BY_PAGE + tl.zeros_like(row), mask=beyond, other=0) != 0
    reason = tl.where(there, 0, tl.where(fresh & ~cut, reasons.NOT_THERE, reasons.STALE)).to(tl.int64)
    row = tl.where(there, row, 0)
    above = there & (row > 0) & (end - edge >= length)
    while tl.max(above.to(tl.int32)) > 0:
        row = tl.where(above, tl.maximum(parent, 0), row)
        above = above & (row > 0)
        parent = tl.load(s.parent + row, mask=above, other=0).to(tl.int64)
        end = tl.load(s.end + row, mask=above, other=0).to(tl.int64)
        edge = tl.load(s.length + row, mask=above, other=0).to(tl.int64)
        above = above & (end - edge >= length)
    return row, reason


@triton.jit
def namespace_of(s, row):
    """Return the code of a row's namespace; scalar."""
    parent = row
    while parent >= 0:
        parent = tl.load(s.parent + parent)
    return ~parent


@triton.jit
def row_number(s, number, active):
    """Return the row for the new node `number` of this call, counted from 0; lanes.

    Freed rows come first, the last freed row before the others. Then come rows that were never used.
    """
    free = tl.load(s.numbers + numbers.FREE_ROWS)
    again = tl.load(s.free_rows + (free - 1 - number), mask=active & (number < free), other=0).to(tl.int64)
    return tl.where(number < free, again, tl.load(s.numbers + numbers.ROWS) + number - free)


@triton.jit
def take_rows(s, count):
    """Mark the first `count` rows that `row_number` returns as used, and count their nodes.

    One program calls this, when no program calls `row_number` any more.
    """
    free = tl.load(s.numbers + numbers.FREE_ROWS)
    rows = tl.load(s.numbers + numbers.ROWS)
    nodes = tl.load(s.numbers + numbers.NODES)
    tl.debug_barrier()
    tl.store(s.numbers + numbers.FREE_ROWS, tl.maximum(free - count, 0))
    tl.store(s.numbers + numbers.ROWS, rows + tl.maximum(count - free, 0))
    tl.store(s.numbers + numbers.NODES, nodes + count)
