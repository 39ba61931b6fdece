"""Lock and unlock: reference counts on every node from the place of a handle to the root.

`*_one` take and return scalars, for a look-up from Python that must stay cheap; the others take a batch.
"""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.children import make_room
from flatradix.kernels.cpu.jit import helper, kernel, open_state
from flatradix.kernels.cpu.queue import offer
from flatradix.kernels.cpu.rows import handle_of, resolve, split
from flatradix.kernels.cpu.walk import refuse
from flatradix.refusals import NOT_LOCKED


@helper
def lock_place(s, row, length):
    """Lock the path that ends at path length `length` on the edge of `row`, split there; returns the end's row."""
    if row == 0:
        return row
    if length < s.end[row]:
        make_room(s, 1)
        row = split(s, row, length, s.meta[meta.CLOCK] + 1)
    s.own_locks[row] += 1
    newly = np.int64(0)
    place = row
    while place > 0:
        if s.lock_ref[place] == 0:
            newly += s.length[place]
        s.lock_ref[place] += 1
        place = np.int64(s.parent[place])
    s.meta[meta.PROTECTED] += newly
    s.meta[meta.EVICTABLE] -= newly
    return row


@helper
def _unlock_row(s, row):
    s.own_locks[row] -= 1
    freed = np.int64(0)
    place = row
    while place > 0:
        s.lock_ref[place] -= 1
        if s.lock_ref[place] == 0:
            freed += s.length[place]
            if s.children[place] == 0:
                offer(s, place)
        place = np.int64(s.parent[place])
    s.meta[meta.PROTECTED] -= freed
    s.meta[meta.EVICTABLE] += freed


@helper
def _relock_row(s, row):
    """Undo `_unlock_row`; an entry that it made in the queue is dropped there when its turn comes."""
    lock_place(s, row, np.int64(s.end[row]))


@helper
def _locked_row(s, handle, length):
    """The row whose end a lock holds, 0 for the root, or why there is none."""
    row = resolve(s, handle, length)
    if row > 0 and (s.end[row] != length or s.own_locks[row] == 0):
        return np.int64(NOT_LOCKED)
    return row


@kernel
def lock_one(table, handle, length):
    """Lock one path; returns the handle of its end, changed if an edge was split, or the reason for refusal."""
    s = open_state(table)
    row = resolve(s, handle, length)
    if row < 0:
        refuse(s, 0, length)
        return row
    return handle_of(s, lock_place(s, row, length))


@kernel
def unlock_one(table, handle, length):
    s = open_state(table)
    row = _locked_row(s, handle, length)
    if row < 0:
        refuse(s, 0, length)
        return row
    if row > 0:
        _unlock_row(s, row)
    return np.int64(0)


@kernel
def lock(table, handles, lengths):
    """Lock a batch in order; `handles` int64 [B] is updated where an edge was split. Returns 0, or the reason."""
    s = open_state(table)
    for query in range(len(handles)):
        row = resolve(s, handles[query], np.int64(lengths[query]))
        if row < 0:
            refuse(s, query, lengths[query])
            return row
    for query in range(len(handles)):
        length = np.int64(lengths[query])
        row = resolve(s, handles[query], length)
        handles[query] = handle_of(s, lock_place(s, row, length))
    return np.int64(0)


@kernel
def unlock(table, handles, lengths):
    """Unlock a batch in order, all of it or, with the reason returned, nothing."""
    s = open_state(table)
    for query in range(len(handles)):
        row = _locked_row(s, handles[query], np.int64(lengths[query]))
        if row < 0:
            for done in range(query):
                again = resolve(s, handles[done], np.int64(lengths[done]))
                if again > 0:
                    _relock_row(s, again)
            refuse(s, query, lengths[query])
            return row
        if row > 0:
            _unlock_row(s, row)
    return np.int64(0)
