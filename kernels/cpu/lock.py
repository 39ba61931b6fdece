"""Lock and unlock: reference counts on every node from a place to the root. Split: cut the edges on which places lie.

`*_one` take and return scalars, to keep a single call from Python cheap. The others take a batch. `call` is the number
under which the change is stored, 0 if the change undoes the last call.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change, note_refusal
from flatradix.kernels.cpu.children import grow_table
from flatradix.kernels.cpu.counts import near_limit, refuse_above_limit, refuse_one, rows_of
from flatradix.kernels.cpu.jit import fixed_types, helper, kernel, open_state
from flatradix.kernels.cpu.queue import offer
from flatradix.kernels.cpu.rows import handle_of, resolve, split_edge
from flatradix.layout import numbers, reasons


@helper
def end_at(s, row, length):
    """Return the row that ends at path length `length` on the edge of `row`; split the edge there if it goes on."""
    if row > 0 and length < s.end[row]:
        grow_table(s, 1)
        row = split_edge(s, row, length, s.numbers[numbers.CLOCK] + 1)
    return row


@helper
def lock_place(s, row, length):
    """Lock the path to path length `length` on the edge of `row`; return the row of its end. May split the edge."""
    row = end_at(s, row, length)
    if row == 0:
        return row
    s.own_locks[row] += 1
    newly = np.int64(0)
    above = row
    while above > 0:
        if s.lock_ref[above] == 0:
            newly += s.length[above]
        s.lock_ref[above] += 1
        above = np.int64(s.parent[above])
    s.numbers[numbers.PROTECTED] += newly
    s.numbers[numbers.EVICTABLE] -= newly
    return row


@helper
def unlock_row(s, row):
    s.own_locks[row] -= 1
    freed = np.int64(0)
    above = row
    while above > 0:
        s.lock_ref[above] -= 1
        if s.lock_ref[above] == 0:
            freed += s.length[above]
            if s.children[above] == 0 and s.wanted[above] == 0:
                offer(s, above)
        above = np.int64(s.parent[above])
    s.numbers[numbers.PROTECTED] -= freed
    s.numbers[numbers.EVICTABLE] += freed


@helper
def _relock_row(s, row):
    """Undo `unlock_row`. If that made an entry in the queue, the entry is dropped when its turn comes."""
    lock_place(s, row, np.int64(s.end[row]))


@helper
def _locked_row(s, handle, length):
    """Return the row at whose end the lock of a place lies, 0 for the root, or the reason why there is none."""
    row = resolve(s, handle, length)
    if row > 0 and (s.end[row] != length or s.own_locks[row] == 0):
        return np.int64(reasons.NOT_LOCKED)
    return row


@fixed_types("(int64, int64, int64, int64)")
def lock_one(addresses, call, handle, length):
    """Lock one path; return the handle of its end, which is new if an edge was split, or the reason for refusal."""
    s = open_state(addresses)
    row = resolve(s, handle, length)
    if row < 0:
        note_refusal(s, 0, length)
        return row
    if near_limit(s, s.lock_ref, numbers.MOST_LOCKS, 1):
        reason = refuse_one(s, s.lock_ref, row, length, reasons.TOO_MANY_LOCKS)
        if reason < 0:
            return reason
    handle = handle_of(s, lock_place(s, row, length))
    note_change(s, call, numbers.LOCKED, handle, length, 0)
    return handle


@fixed_types("(int64, int64, int64, int64)")
def unlock_one(addresses, call, handle, length):
    s = open_state(addresses)
    row = _locked_row(s, handle, length)
    if row < 0:
        note_refusal(s, 0, length)
        return row
    if row > 0:
        unlock_row(s, row)
    note_change(s, call, numbers.UNLOCKED, handle, length, 0)
    return np.int64(0)


@helper
def _check(s, handles, lengths):
    """Return 0, or the reason why a place is refused."""
    for query in range(len(handles)):
        row = resolve(s, handles[query], np.int64(lengths[query]))
        if row < 0:
            note_refusal(s, query, lengths[query])
            return row
    return np.int64(0)


@kernel
def lock(addresses, call, handles, lengths):
    """Lock a batch in order; return 0, or the reason. `handles`, int64 [B], is updated where an edge was split."""
    s = open_state(addresses)
    reason = _check(s, handles, lengths)
    if reason == 0 and near_limit(s, s.lock_ref, numbers.MOST_LOCKS, len(handles)):
        reason = refuse_above_limit(s, s.lock_ref, rows_of(s, handles, lengths), lengths, reasons.TOO_MANY_LOCKS)
    if reason < 0:
        return reason
    for query in range(len(handles)):
        length = np.int64(lengths[query])
        row = resolve(s, handles[query], length)
        handles[query] = handle_of(s, lock_place(s, row, length))
    note_change(s, call, numbers.LOCKED, 0, 0, 0)
    return np.int64(0)


@kernel
def split(addresses, handles, lengths):
    """End an edge at each place of a batch; return 0, or the reason. `handles`, int64 [B], is updated."""
    s = open_state(addresses)
    reason = _check(s, handles, lengths)
    if reason < 0:
        return reason
    for query in range(len(handles)):
        length = np.int64(lengths[query])
        handles[query] = handle_of(s, end_at(s, resolve(s, handles[query], length), length))
    return np.int64(0)


@kernel
def unlock(addresses, call, handles, lengths):
    """Unlock a batch in order, all of it or nothing; return 0, or the reason."""
    s = open_state(addresses)
    for query in range(len(handles)):
        row = _locked_row(s, handles[query], np.int64(lengths[query]))
        if row < 0:
            for done in range(query):
                again = resolve(s, handles[done], np.int64(lengths[done]))
                if again > 0:
                    _relock_row(s, again)
            note_refusal(s, query, lengths[query])
            return row
        if row > 0:
            unlock_row(s, row)
    note_change(s, call, numbers.UNLOCKED, 0, 0, 0)
    return np.int64(0)
