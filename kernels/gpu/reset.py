"""Reset: drop every node at once. The program that is done last sets the tree's numbers, which the others read."""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix import meta
from flatradix.kernels.gpu.compact import clear_table
from flatradix.kernels.gpu.finish import is_last, publish
from flatradix.kernels.gpu.launch import Bound, Kernel, resident
from flatradix.kernels.gpu.rows import FREE
from flatradix.kernels.gpu.share import share

BLOCK = tl.constexpr(256)


@triton.jit
def _free_all(s, first, end):
    """Free the live ones of these rows, and make all of them but the root the stack of free rows."""
    while first < end:
        row = first + tl.arange(0, BLOCK)
        inside = (row > 0) & (row < end)
        parent = tl.load(s.parent + row, mask=inside, other=FREE).to(tl.int64)
        live = parent != FREE
        top = live & (parent < 0)
        tl.store(s.namespace_children + tl.where(top, ~parent, 0), tl.zeros([BLOCK], tl.int32), mask=top)
        generation = tl.load(s.generation + row, mask=live, other=0)
        tl.debug_barrier()  # every lane has what it frees
        tl.store(s.generation + row, generation + 1, mask=live)
        tl.store(s.parent + row, tl.zeros([BLOCK], tl.int32) + FREE, mask=live)
        tl.store(s.free_rows + row - 1, row.to(tl.int32), mask=inside)
        first += BLOCK


@triton.jit
def _set_numbers(s):
    cursor = tl.load(s.meta + meta.POOL_END) - tl.load(s.meta + meta.POOL_PAGES) * tl.load(s.meta + meta.PAGE)
    tl.store(s.meta + meta.POOL_CURSOR, cursor)
    tl.store(s.meta + meta.FREE_ROWS, tl.load(s.meta + meta.ROWS) - 1)
    tl.store(s.meta + meta.EVICTABLE, 0)
    tl.store(s.meta + meta.PROTECTED, 0)
    tl.store(s.meta + meta.NODES, 0)


@triton.jit(do_not_specialize=["call", "programs"])
def reset_kernel(s, w, call: tl.int64, programs: tl.int32):
    first, end = share(tl.load(s.meta + meta.ROWS), programs)
    _free_all(s, first, end)
    clear_table(s, programs)
    last, _bad = is_last(w, programs)
    if last:
        _set_numbers(s)
        publish(s, w, call.to(tl.int64), meta.NO_ERROR, meta.EVICT)


_reset = Kernel(reset_kernel, ["i64", "i32"])


def reset(bound: Bound, call: int) -> None:
    """Drop every node, locked ones too; their handles go stale. The clock goes on. The sizes are published."""
    programs = resident(bound, -(-bound.state.table.shape[0] // BLOCK.value))
    _reset(bound, programs, (call, programs))
