"""Match: the longest cached prefix of each key."""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.jit import helper, kernel, open_state
from flatradix.kernels.cpu.lock import lock_place
from flatradix.kernels.cpu.rows import handle_of
from flatradix.kernels.cpu.units import first_bad
from flatradix.kernels.cpu.walk import begin, refuse, touch_path, walk, whole_pages
from flatradix.layout import MAX_UNITS
from flatradix.refusals import BAD_TOKEN


@helper
def _bad_token(s, key, wide, units, done):
    """Where the page that ended the walk holds an invalid id, or -1. A cached page holds none."""
    if done >= units:
        return -1
    return first_bad(key, wide, done, done + s.meta[meta.PAGE] + s.meta[meta.BIGRAM], MAX_UNITS)


@helper
def _finish(s, row, length, touch, lock):
    if touch:
        s.meta[meta.CLOCK] += 2
        touch_path(s, row, s.meta[meta.CLOCK])
    if lock:
        row = lock_place(s, row, length)
    return handle_of(s, row)


@kernel
def match_one(table, key, wide, tokens, namespace, touch, lock):
    """Match one key from the root; returns (length, handle), or (the reason, the position of the bad token)."""
    s = open_state(table)
    units = whole_pages(s, tokens)
    row, length = walk(s, key, wide, units, namespace, np.int64(0), np.int64(0))
    bad = _bad_token(s, key, wide, units, length)
    if bad >= 0:
        refuse(s, 0, bad)
        return np.int64(BAD_TOKEN), np.int64(bad)
    return length, _finish(s, row, length, touch, lock)


@helper
def _look(s, query, keys, wide, counts, namespaces, named, start_handles, start_lengths):
    """Walk one query of a batch from its start; returns the row, negative if refused, and the length."""
    key = keys[query]
    start = np.int64(0)
    if start_handles[query] != meta.NO_HANDLE:
        start = np.int64(start_lengths[query])
    row = begin(s, start_handles[query], start, namespaces[query], named[query], key, wide, counts[query])
    if row < 0:
        refuse(s, query, start)
        return row, start
    units = whole_pages(s, counts[query])
    row, length = walk(s, key, wide, units, namespaces[query], row, start)
    bad = _bad_token(s, key, wide, units, length - start)
    if bad >= 0:
        refuse(s, query, bad)
        return np.int64(BAD_TOKEN), length
    return row, length


@kernel
def match(table, keys, wide, counts, namespaces, named, start_handles, start_lengths, touch, lock, lengths, handles):
    """Match a batch in order.

    `keys` int64 [B] are addresses, `counts` tokens, `namespaces` codes, `named` whether the caller gave one. Fills
    `lengths` int32 [B] and `handles` int64 [B]. Returns 0, or the reason why nothing was touched or locked. A match
    does not change what another finds, so all walks come first; a lock may split an edge that a later query ended on,
    which then resolves its place again.
    """
    s = open_state(table)
    for query in range(len(keys)):
        row, length = _look(s, query, keys, wide, counts, namespaces, named, start_handles, start_lengths)
        if row < 0:
            return row
        lengths[query] = np.int32(length)
        handles[query] = row
    for query in range(len(keys)):
        row = handles[query]
        length = np.int64(lengths[query])
        while row > 0 and s.end[row] - s.length[row] >= length:
            row = np.int64(s.parent[row])
        handles[query] = _finish(s, row, length, touch, lock)
    return np.int64(0)
