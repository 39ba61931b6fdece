"""Reset of a tree, and rebuilding of the derived arrays of a tree that was just loaded."""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change
from flatradix.kernels.cpu.children import refill
from flatradix.kernels.cpu.counts import largest
from flatradix.kernels.cpu.jit import helper, kernel, open_state
from flatradix.kernels.cpu.pool import mark
from flatradix.kernels.cpu.queue import clear, refill_queue
from flatradix.kernels.cpu.rows import next_generation, note_event
from flatradix.layout import numbers
from flatradix.layout.state import FREE_ROW, SMALLEST_TABLE


@kernel
def reset(addresses, call):
    """Drop every node, also locked ones. Their handles go stale. The clock goes on."""
    s = open_state(addresses)
    for row in range(1, s.numbers[numbers.ROWS]):
        if s.parent[row] != FREE_ROW:
            if s.parent[row] < 0:
                s.namespace_children[~s.parent[row]] = 0
            s.parent[row] = FREE_ROW
            s.queued[row] = 0
            s.generation[row] = next_generation(s.generation[row])
            count = s.numbers[numbers.FREE_ROWS]
            s.free_rows[count] = row
            s.numbers[numbers.FREE_ROWS] = count + 1
    for word in range((s.numbers[numbers.POOL_PAGES] + 63) // 64):
        s.used[word] = 0
    for name in (numbers.EVICTABLE, numbers.PROTECTED, numbers.NODES, numbers.POOL_CURSOR):
        s.numbers[name] = 0
    clear(s)
    refill(s, SMALLEST_TABLE - 1)
    note_event(s, numbers.ALL_FREED, np.int64(0), np.int64(0))
    note_change(s, call, numbers.RESET, 0, 0, 0)


@helper
def fill_derived(s):
    """Fill the child table, the pool's empty bitmap, the queue, and the bounds in `numbers` from the rows."""
    entries = np.int64(SMALLEST_TABLE)
    while entries < 2 * s.numbers[numbers.NODES]:
        entries *= 2
    refill(s, entries - 1)
    longest = np.int64(0)
    for row in range(1, s.numbers[numbers.ROWS]):
        if s.parent[row] != FREE_ROW:
            mark(s, s.start[row], s.length[row], True)
            longest = max(longest, np.int64(s.length[row]))
    s.numbers[numbers.LONGEST] = longest
    s.numbers[numbers.MOST_LOCKS] = largest(s, s.lock_ref)
    s.numbers[numbers.MOST_WANTS] = largest(s, s.wanted)
    refill_queue(s)


@kernel
def rebuild(addresses):
    """Build what follows from the rows of a tree that was just loaded."""
    fill_derived(open_state(addresses))
