"""Compaction: slide every live edge to the front of the pool, when no free range is long enough."""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.jit import helper, int32_at, int64_at, kernel, open_state
from flatradix.kernels.cpu.pool import mark
from flatradix.layout import FREE_ROW


@helper
def _rows_by_start(s):
    count = s.meta[meta.NODES]
    keys = np.empty(count, np.int64)
    at = 0
    for row in range(1, s.meta[meta.ROWS]):
        if s.parent[row] != FREE_ROW:
            keys[at] = (np.int64(s.start[row]) << 28) | row
            at += 1
    keys.sort()
    return keys & ((1 << 28) - 1)


@helper
def _slide_narrow(values, source, target, count):
    array = int32_at(values)
    for j in range(count):
        array[target + j] = array[source + j]


@helper
def _slide_wide(values, source, target, count):
    array = int64_at(values)
    for j in range(count):
        array[target + j] = array[source + j]


@kernel
def plan_compaction(table, sources, targets, lengths):
    """Fill what will move where, int32 [nodes] each, in ascending order; no target is above its source."""
    s = open_state(table)
    end = np.int64(0)
    at = 0
    for row in _rows_by_start(s):
        sources[at], targets[at], lengths[at] = s.start[row], end, s.length[row]
        end += s.length[row]
        at += 1


@kernel
def compact(table, pool, pool_wide):
    """Slide the tokens, and the slots at the address `pool` unless it is 0: somebody else has moved those."""
    s = open_state(table)
    order = _rows_by_start(s)
    for word in range((s.meta[meta.POOL_PAGES] + 63) // 64):
        s.used[word] = 0
    end = np.int64(0)
    for row in order:
        start = np.int64(s.start[row])
        count = np.int64(s.length[row])
        _slide_narrow(s.tokens, start, end, count)
        if s.meta[meta.BIGRAM] != 0:
            _slide_narrow(s.seconds, start, end, count)
        if pool != 0:
            if pool_wide:
                _slide_wide(pool, start, end, count)
            else:
                _slide_narrow(pool, start, end, count)
        s.start[row] = end
        end += count
    if end > 0:
        mark(s, np.int64(0), end, True)
    s.meta[meta.POOL_CURSOR] = end // s.meta[meta.PAGE]
