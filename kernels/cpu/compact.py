"""Compaction: slide every live edge to the front of the pool, when no free range is long enough."""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.jit import helper, int32_at, kernel, open_state
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
def _slide(tokens, source, target, count):
    values = int32_at(tokens)
    for j in range(count):
        values[target + j] = values[source + j]


@kernel
def compact(table, sources, targets, lengths):
    """Slide the tokens, and fill what moved where, int32 [nodes] each, ascending, for the slot pool to follow."""
    s = open_state(table)
    pages = s.meta[meta.POOL_PAGES]
    for word in range((pages + 63) // 64):
        s.used[word] = 0
    bigram = s.meta[meta.BIGRAM] != 0
    end = np.int64(0)
    at = 0
    for row in _rows_by_start(s):
        start = np.int64(s.start[row])
        count = np.int64(s.length[row])
        _slide(s.tokens, start, end, count)
        if bigram:
            _slide(s.seconds, start, end, count)
        sources[at], targets[at], lengths[at] = start, end, count
        s.start[row] = end
        end += count
        at += 1
    if end > 0:
        mark(s, np.int64(0), end, True)
    s.meta[meta.POOL_CURSOR] = end // s.meta[meta.PAGE]
