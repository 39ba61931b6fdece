"""Compaction: slide every live edge to the front of the pools. An insert needs it when no free range is long enough."""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change
from flatradix.kernels.cpu.jit import helper, int32_at, int64_at, kernel, open_state
from flatradix.kernels.cpu.pool import mark
from flatradix.layout import numbers
from flatradix.layout.state import FREE_ROW


@helper
def _ones(word):
    """Return how many bits are set in a word (Hacker's Delight, 5-1)."""
    word = word - ((word >> 1) & 0x5555555555555555)
    word = (word & 0x3333333333333333) + ((word >> 2) & 0x3333333333333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((word * 0x0101010101010101) >> 56) & 0x7F


@helper
def _rows_by_start(s):
    """Return int32 [nodes]: the live rows in the order of their edges in the pools. O(rows + pool pages / 64).

    No two edges begin on the same page, so a bitmap marks the pages where edges begin. The position of an edge in the
    order is the number of bits set below its own. A comparison sort takes seconds for the rotated order in which next
    fit leaves the edges.
    """
    page = s.numbers[numbers.PAGE]
    words = (s.numbers[numbers.POOL_PAGES] + 63) // 64
    order = np.empty(s.numbers[numbers.NODES], np.int32)
    begins = np.zeros(words, np.int64)
    before = np.empty(words, np.int32)
    for row in range(1, s.numbers[numbers.ROWS]):
        if s.parent[row] != FREE_ROW:
            first = np.int64(s.start[row]) // page
            begins[first >> 6] |= np.int64(1) << (first & 63)
    count = np.int32(0)
    for word in range(words):
        before[word] = count
        count += np.int32(_ones(begins[word]))
    for row in range(1, s.numbers[numbers.ROWS]):
        if s.parent[row] != FREE_ROW:
            first = np.int64(s.start[row]) // page
            below = begins[first >> 6] & ((np.int64(1) << (first & 63)) - 1)
            order[before[first >> 6] + _ones(below)] = row
    return order


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


@helper
def plan_moves(addresses, sources, targets, lengths):
    """Do what `plan_compaction` does, for kernels that compact."""
    s = open_state(addresses)
    end = np.int64(0)
    at = 0
    for row in _rows_by_start(s):
        sources[at], targets[at], lengths[at] = s.start[row], end, s.length[row]
        end += s.length[row]
        at += 1


@kernel
def plan_compaction(addresses, sources, targets, lengths):
    """Fill the arrays, int32 [nodes], with all moves in ascending order. No target is above its source."""
    plan_moves(addresses, sources, targets, lengths)


@helper
def slide_all(addresses, call, pool, pool_wide):
    """Do what `compact` does, for kernels that compact."""
    s = open_state(addresses)
    order = _rows_by_start(s)
    for word in range((s.numbers[numbers.POOL_PAGES] + 63) // 64):
        s.used[word] = 0
    end = np.int64(0)
    for row in order:
        start = np.int64(s.start[row])
        count = np.int64(s.length[row])
        if start != end:
            _slide_narrow(s.tokens, start, end, count)
            if s.numbers[numbers.BIGRAM] != 0:
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
    s.numbers[numbers.POOL_CURSOR] = end // s.numbers[numbers.PAGE]
    note_change(s, call, numbers.COMPACTED, 0, 0, 0)


@kernel
def compact(addresses, call, pool, pool_wide):
    """Slide the tokens, and the slots of the pool at the address `pool`. If it is 0, the caller moves the slots.

    O(cached tokens). All memory is allocated before anything changes.
    """
    slide_all(addresses, call, pool, pool_wide)
