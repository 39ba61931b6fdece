"""Drop: free what is not locked of a part of the tree, and hide the rest from all look-ups (layout/dropped.py).

The host has planned which nodes that are, and in which order they go (`flatradix/dropping.py`).
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change
from flatradix.kernels.cpu.children import add_child, remove_child
from flatradix.kernels.cpu.evict import free_victim, gather_victims
from flatradix.kernels.cpu.jit import helper, kernel, open_state
from flatradix.kernels.cpu.queue import refill_queue
from flatradix.kernels.cpu.rows import note_event
from flatradix.kernels.cpu.wants import end_wants
from flatradix.layout import numbers
from flatradix.layout.dropped import DETACHED
from flatradix.layout.handles import LOW32


@helper
def _end_own_wants(s, row):
    """End the soft pins of a node that stays. The wants of a waiting queue end when the queue looks next."""
    count = s.own_wants[row]
    s.own_wants[row] = 0
    while row > 0 and count > 0:
        s.wanted[row] -= count
        row = np.int64(s.parent[row])


@helper
def _hide(s, row, less):
    """Mark a node as dropped. less: DROPPED, or DETACHED for the top of a dropped subtree."""
    _end_own_wants(s, row)
    s.created[row] -= less
    if less == DETACHED:
        remove_child(s, row)
        add_child(s, row, ~np.int64(s.tag[row]) & LOW32)


@kernel
def drop(addresses, call, kept, less, victims, pool, pool_wide, starts, lengths, slots):
    """Mark the rows `kept` as dropped, free the rows `victims` in order, and return (tokens, pool ranges).

    kept, less: int64 [K]: the rows, and what to subtract from `created` of each. victims: int64 [N], each behind those
    below it. pool and the others: as for `evict`.
    """
    s = open_state(addresses)
    for at in range(len(kept)):
        _hide(s, kept[at], less[at])
    tokens = np.int64(0)
    for row in victims:
        if s.wanted[row] > 0:
            end_wants(s, row)
        tokens += s.length[row]
        free_victim(s, row)
    s.numbers[numbers.EVICTABLE] -= tokens
    refill_queue(s)
    if len(kept) > 0:  # no event of one row tells a waiting queue that the row is not to be found
        note_event(s, numbers.ALL_FREED, np.int64(0), np.int64(0))
    ranges = gather_victims(s, tokens, np.int64(len(victims)), np.int64(0), pool, pool_wide, starts, lengths, slots)
    note_change(s, call, numbers.EVICTED, np.int64(0), tokens, np.int64(ranges))
    return tokens, np.int64(ranges)
