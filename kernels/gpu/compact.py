"""Compaction: copy every live edge to the other half of the pools.

The child table, which is as large as the pools, is built anew only if it holds many tombstones. Else the entry of each
live row is told where its edge is now.

A compaction is one launch. The host enqueues the launch wherever the half in use may lack space. Only the device knows
whether space is lacking, so most of these launches do nothing. Each program first takes a share of the rows, to compute
where their edges go. Then each program copies a share of the units of the new half, regardless of edges. So a million
edges of 64 units and one edge of 131,072 units both keep all programs equally busy.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from flatradix.kernels.gpu.children import enter, pack_edge
from flatradix.kernels.gpu.finish import arrive, wait_for_all
from flatradix.kernels.gpu.launch import Arrays, Kernel, Variant, cooperative_programs
from flatradix.kernels.gpu.rows import FREE
from flatradix.kernels.gpu.runs import outer_owners, owners, share
from flatradix.layout import numbers, scratch

# Rows, or words of the child table, that a program handles at once.
BLOCK = tl.constexpr(256)
# Units that a program copies at once: 8 a thread, so that registers suffice for 4 programs on a multiprocessor.
UNITS = tl.constexpr(1024)
# The edge of a unit is found by a search, so units of one page share a search: up to 16 units, which are 64 bytes.
# Larger groups gain nothing.
MOST_TOGETHER = 16
# A compaction builds the child table anew if it holds more than one tombstone for so many pages of a pool's half. With
# the entries of live rows, and of all pages until the next compaction, 9/16 of the table are in use then at most.
PAGES_A_TOMBSTONE = tl.constexpr(8)


@triton.jit
def clear_table(s, programs):
    """Clear this program's share of the child table."""
    begin, end = share(2 * (tl.load(s.numbers + numbers.TABLE_MASK) + 1), programs)
    while begin < end:
        j = begin + tl.arange(0, BLOCK)
        tl.store(s.child_table + j, tl.zeros([BLOCK], tl.int64), mask=j < end)
        begin += BLOCK


@triton.jit
def _edges(s, first, end):
    """Return (row, whether it is live, length of its edge) for the rows from `first` on; row and length int64."""
    row = first + tl.arange(0, BLOCK)
    live = (row > 0) & (tl.load(s.parent + row, mask=row < end, other=FREE) != FREE)
    return row, live, tl.load(s.length + row, mask=live, other=0).to(tl.int64)


@triton.jit
def _enter_again(s, w, row, start, length, live):
    tag = tl.load(s.tag + row, mask=live, other=0).to(tl.int64) & 0xFFFFFFFF
    enter(s, w, row, tag, start, length, live)


@triton.jit
def _finish(w, programs):
    """Reset the counters of this launch: the next launch may have another number of programs."""
    last, _bad = arrive(w, programs)
    if last:
        tl.store(w.counters + scratch.ARRIVED, 0)
        tl.store(w.counters + scratch.WAITING, 0)


@triton.jit
def _live_units(s, first, end):
    total = tl.zeros([BLOCK], tl.int64)
    while first < end:
        _row, _live, length = _edges(s, first, end)
        total += length
        first += BLOCK
    return tl.sum(total)


@triton.jit
def _sums(w, programs):
    """Return (units on the edges of the programs before this one, units on all edges)."""
    before = tl.zeros([BLOCK], tl.int64)
    total = tl.zeros([BLOCK], tl.int64)
    first = tl.zeros([], tl.int32)
    while first < programs:
        program = first + tl.arange(0, BLOCK)
        units = tl.load(w.partial + program, mask=program < programs, other=0)
        before += tl.where(program < tl.program_id(0), units, 0)
        total += units
        first += BLOCK
    return tl.sum(before), tl.sum(total)


@triton.jit
def _lay_out(s, w, first, end, before, target, anew):
    """Set the new starts of the edges of rows `first` to `end`, in row order, also in the child table.

    anew: whether the table is empty, and the rows must be entered. Sets `w.old_start` of each row to (units before its
    edge << 32 | its old start).
    """
    while first < end:
        row, live, length = _edges(s, first, end)
        offset = before + tl.cumsum(length) - length
        start = tl.load(s.start + row, mask=live, other=0).to(tl.int64)
        tl.store(w.old_start + row, (offset << 32) | start, mask=row < end)
        tl.debug_barrier()  # every lane has read its old start
        tl.store(s.start + row, (target + offset).to(tl.int32), mask=live)
        if anew:
            _enter_again(s, w, row, target + offset, length, live)
        else:
            place = tl.load(w.entry + row, mask=live, other=0).to(tl.int64)
            tl.store(s.child_table + 2 * place + 1, pack_edge(target + offset, length), mask=live)
        before += tl.sum(length)
        first += BLOCK


@triton.jit
def _copy(s, pool, source, place, inside, BIGRAM: tl.constexpr):
    """Copy units. Both loads, of tokens and slots, are issued before the first store waits for one."""
    tokens = tl.load(s.tokens + source, mask=inside)
    slots = tl.load(pool + source, mask=inside)
    tl.store(s.tokens + place, tokens, mask=inside)
    tl.store(pool + place, slots, mask=inside)
    if BIGRAM:
        tl.store(s.seconds + place, tl.load(s.seconds + source, mask=inside), mask=inside)


@triton.jit
def _copy_units(s, w, pool, target, total, rows, programs, TOGETHER: tl.constexpr, BIGRAM: tl.constexpr):
    """Copy this program's share of all units from their old edges to the new half. Positions are int32."""
    first, last = share(total // TOGETHER, programs)
    begin = first.to(tl.int32)
    end = last.to(tl.int32)
    if begin < end:
        # A free row has as many units before it as the next live row, so `owners` never returns a free row.
        low, high = outer_owners(w.old_start, begin * TOGETHER, end * TOGETHER, rows, 32)
        inner = tl.arange(0, TOGETHER)[None, :]
        while begin < end:
            group = begin + tl.arange(0, UNITS // TOGETHER)
            unit = tl.minimum(group, end - 1) * TOGETHER
            owner = owners(w.old_start, unit, low, high, 32)
            key = tl.load(w.old_start + owner)
            source = tl.multiple_of((key & 0xFFFFFFFF).to(tl.int32) + unit - (key >> 32).to(tl.int32), TOGETHER)
            place = tl.multiple_of(target + unit, TOGETHER)
            _copy(s, pool, source[:, None] + inner, place[:, None] + inner, (group < end)[:, None], BIGRAM)
            low = tl.max(owner)
            begin += UNITS // TOGETHER


@triton.jit(do_not_specialize=["pool", "programs", "forced"])
def compact_kernel(s, w, pool, programs: tl.int32, forced: tl.int32, TOGETHER: tl.constexpr, BIGRAM: tl.constexpr):
    if (forced != 0) | (tl.load(w.counters + scratch.COMPACT) != 0):
        rows = tl.load(s.numbers + numbers.ROWS)
        pages = tl.load(s.numbers + numbers.POOL_PAGES)
        half = pages * tl.load(s.numbers + numbers.PAGE)
        anew = (forced != 0) | (tl.load(s.numbers + numbers.TOMBSTONES) > pages // PAGES_A_TOMBSTONE)
        target = 2 * half - tl.load(s.numbers + numbers.POOL_END)
        first, end = share(rows, programs)
        tl.store(w.partial + tl.program_id(0), _live_units(s, first, end))
        if anew:
            clear_table(s, programs)
        wait_for_all(w, programs)
        before, total = _sums(w, programs)
        _lay_out(s, w, first, end, before, target, anew)
        wait_for_all(w, programs)
        _copy_units(s, w, pool, target.to(tl.int32), total, rows.to(tl.int32), programs, TOGETHER, BIGRAM)
        if tl.program_id(0) == 0:
            tl.store(s.numbers + numbers.POOL_CURSOR, target + total)
            tl.store(s.numbers + numbers.POOL_END, target + half)
            tl.store(w.counters + scratch.COMPACT, 0)
            if anew:
                tl.store(s.numbers + numbers.TOMBSTONES, 0)
        _finish(w, programs)


_compact = Kernel(compact_kernel, ["*w", "i32", "i32"], cooperative=True)


@functools.cache
def compact_variant(page: int, bigram: bool, wide: bool) -> Variant:
    """Return the variant of `compact_kernel`. wide: whether slots have 64 bits."""
    return _compact.variant((min(page & -page, MOST_TOGETHER), bigram), (wide,))


def compact_programs(arrays: Arrays) -> int:
    return cooperative_programs(arrays, -(-arrays.state.tokens.shape[0] // (2 * UNITS.value)))


def compact(arrays: Arrays, forced: bool) -> None:
    """Compact the pools if `forced`, or if an insert found too little space in them (counters[COMPACT]).

    Overwrites `scratch.old_start` and `scratch.partial`.
    """
    variant, programs = compact_variant(arrays.page, arrays.bigram, arrays.pool_wide), compact_programs(arrays)
    _compact(arrays, programs, (arrays.pool, programs, int(forced)), variant.constants, variant.wide)


@triton.jit(do_not_specialize=["programs"])
def rebuild_kernel(s, w, programs: tl.int32):
    clear_table(s, programs)
    wait_for_all(w, programs)
    first, end = share(tl.load(s.numbers + numbers.ROWS), programs)
    while first < end:
        row, live, length = _edges(s, first, end)
        start = tl.load(s.start + row, mask=live, other=0).to(tl.int64)
        _enter_again(s, w, row, start, length, live)
        first += BLOCK
    if tl.program_id(0) == 0:
        tl.store(s.numbers + numbers.TOMBSTONES, 0)
    _finish(w, programs)


_rebuild = Kernel(rebuild_kernel, ["i32"], cooperative=True)


def rebuild(arrays: Arrays) -> None:
    """Build the child table and `scratch.entry` of a loaded tree from its rows."""
    programs = cooperative_programs(arrays, -(-arrays.state.child_table.shape[0] // BLOCK.value))
    _rebuild(arrays, programs, (programs,))
