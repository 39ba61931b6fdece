"""Reset, and rebuilding what can be derived after a tree has been loaded."""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.children import refill
from flatradix.kernels.cpu.jit import kernel, open_state
from flatradix.kernels.cpu.pool import mark
from flatradix.kernels.cpu.queue import clear, offer
from flatradix.layout import FREE_ROW, SMALLEST_TABLE


@kernel
def reset(table):
    """Drop every node, locked ones too; their handles go stale. The clock goes on."""
    s = open_state(table)
    for row in range(1, s.meta[meta.ROWS]):
        if s.parent[row] != FREE_ROW:
            if s.parent[row] < 0:
                s.namespace_children[~s.parent[row]] = 0
            s.parent[row] = FREE_ROW
            s.queued[row] = 0
            s.generation[row] += 1
            count = s.meta[meta.FREE_ROWS]
            s.free_rows[count] = row
            s.meta[meta.FREE_ROWS] = count + 1
    for word in range((s.meta[meta.POOL_PAGES] + 63) // 64):
        s.used[word] = 0
    for name in (meta.EVICTABLE, meta.PROTECTED, meta.NODES, meta.POOL_CURSOR):
        s.meta[name] = 0
    clear(s)
    refill(s, SMALLEST_TABLE - 1)


@kernel
def rebuild(table):
    """Make the child table, the pool's bitmap and the queue from the rows, of a tree that was just loaded."""
    s = open_state(table)
    places = np.int64(SMALLEST_TABLE)
    while places < 2 * s.meta[meta.NODES]:
        places *= 2
    refill(s, places - 1)
    clear(s)
    for row in range(1, s.meta[meta.ROWS]):
        s.queued[row] = 0
        if s.parent[row] != FREE_ROW:
            mark(s, s.start[row], s.length[row], True)
            if s.children[row] == 0 and s.lock_ref[row] == 0:
                offer(s, row)
