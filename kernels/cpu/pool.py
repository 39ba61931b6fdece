"""The free pages of the pools: one bit for each page, allocated by next fit.

Least-recently-used eviction frees pages roughly in the order of their allocation, so the cursor mostly finds freed
pages right ahead. A bump allocator would instead need a compaction in each lap, which copies every live token.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper
from flatradix.layout import numbers


@helper
def _range_mask(begin, end):
    """Return a word in which bits [begin, end) are set, 0 <= begin < end <= 64."""
    width = end - begin
    if width == 64:
        return np.int64(-1)
    return ((np.int64(1) << width) - 1) << begin


@helper
def mark(s, start, length, taken):
    """Mark a range of pool units, whole pages, as taken or free."""
    page = s.numbers[numbers.PAGE]
    begin = np.int64(start) // page
    end = begin + np.int64(length) // page
    while begin < end:
        word = begin >> 6
        stop = min(end, (word + 1) << 6)
        bits = _range_mask(begin & 63, stop - (word << 6))
        if taken:
            s.used[word] |= bits
        else:
            s.used[word] &= ~bits
        begin = stop


@helper
def _search(used, begin, end, count):
    """Return the first page of the first run of `count` free pages inside [begin, end), or -1."""
    run = np.int64(0)
    at = begin
    while at < end:
        word = used[at >> 6]
        if (at & 63) == 0 and at + 64 <= end and word == -1:
            run = 0
            at += 64
        elif (at & 63) == 0 and at + 64 <= end and word == 0 and run + 64 < count:
            run += 64
            at += 64
        else:
            if (word >> (at & 63)) & 1:
                run = 0
            else:
                run += 1
                if run == count:
                    return at + 1 - count
            at += 1
    return np.int64(-1)


@helper
def find_free(s, units):
    """Return the start of `units` contiguous free pool units, whole pages, or -1. Marks nothing, keeps the cursor."""
    page = s.numbers[numbers.PAGE]
    pages = s.numbers[numbers.POOL_PAGES]
    cursor = s.numbers[numbers.POOL_CURSOR]
    count = units // page
    found = _search(s.used, cursor, pages, count)
    if found < 0:
        found = _search(s.used, np.int64(0), min(pages, cursor + count), count)
    if found < 0:
        return np.int64(-1)
    return found * page
