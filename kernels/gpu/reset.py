"""Reset: drop every node at once.

The last program to finish sets the tree's counters, because the other programs read them before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.compact import clear_table
from flatradix.kernels.gpu.finish import arrive, publish
from flatradix.kernels.gpu.launch import Arrays, Kernel, cooperative_programs
from flatradix.kernels.gpu.rows import FREE, next_generation
from flatradix.kernels.gpu.runs import share
from flatradix.layout import mail, numbers, scratch

BLOCK = tl.constexpr(256)


@triton.jit
def _free_all(s, first, end):
    """Free the live rows of `first` to `end`, and write all of these rows but the root to the stack of free rows."""
    while first < end:
        row = first + tl.arange(0, BLOCK)
        inside = (row > 0) & (row < end)
        parent = tl.load(s.parent + row, mask=inside, other=FREE).to(tl.int64)
        live = parent != FREE
        top = live & (parent < 0)
        tl.store(s.namespace_children + tl.where(top, ~parent, 0), tl.zeros([BLOCK], tl.int32), mask=top)
        generation = tl.load(s.generation + row, mask=live, other=0)
        tl.debug_barrier()  # every lane has read what it is about to overwrite
        tl.store(s.generation + row, next_generation(generation), mask=live)
        tl.store(s.parent + row, tl.zeros([BLOCK], tl.int32) + FREE, mask=live)
        tl.store(s.free_rows + row - 1, row.to(tl.int32), mask=inside)
        first += BLOCK


@triton.jit
def _set_numbers(s):
    cursor = tl.load(s.numbers + numbers.POOL_END) - tl.load(s.numbers + numbers.POOL_PAGES) * tl.load(
        s.numbers + numbers.PAGE
    )
    tl.store(s.numbers + numbers.POOL_CURSOR, cursor)
    tl.store(s.numbers + numbers.FREE_ROWS, tl.load(s.numbers + numbers.ROWS) - 1)
    tl.store(s.numbers + numbers.EVICTABLE, 0)
    tl.store(s.numbers + numbers.PROTECTED, 0)
    tl.store(s.numbers + numbers.NODES, 0)
    tl.store(s.numbers + numbers.TOMBSTONES, 0)


@triton.jit(do_not_specialize=["call", "programs"])
def reset_kernel(s, w, call: tl.int64, programs: tl.int32):
    first, end = share(tl.load(s.numbers + numbers.ROWS), programs)
    _free_all(s, first, end)
    clear_table(s, programs)
    last, _bad = arrive(w, programs)
    if last:
        _set_numbers(s)
        publish(s, w, call.to(tl.int64), scratch.NO_ERROR, mail.EVICT)


_reset = Kernel(reset_kernel, ["i64", "i32"])


def reset(arrays: Arrays, call: int) -> None:
    """Drop every node, also locked nodes; their handles become stale. The clock continues. Publishes the sizes."""
    programs = cooperative_programs(arrays, -(-arrays.state.child_table.shape[0] // BLOCK.value))
    _reset(arrays, programs, (call, programs))
