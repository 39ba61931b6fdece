"""The token pool's free space: one bit a page, taken by next fit.

Least-recently-used eviction frees roughly in the order of allocation, so the cursor mostly finds what was just freed
ahead of it, and the compaction that a bump allocator needs once a lap (copying every live token) does not happen.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper
from flatradix.layout import numbers


@helper
def _range_mask(begin, end):
    """Bits [begin, end) of a word, 0 <= begin < end <= 64."""
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
    """First page of the first run of `count` free pages inside [begin, end), or -1."""
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
    """Start of `units` contiguous free pool units, whole pages, or -1. Nothing is marked, the cursor stays."""
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
