"""Match: the longest cached prefix of each key."""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change, note_refusal
from flatradix.kernels.cpu.counts import near_limit, refuse_above_limit, refuse_one
from flatradix.kernels.cpu.jit import fixed_types, helper, kernel, open_state
from flatradix.kernels.cpu.lock import end_at, lock_place
from flatradix.kernels.cpu.rows import handle_of, resolve, row_at
from flatradix.kernels.cpu.units import first_bad
from flatradix.kernels.cpu.walk import namespace_of, start_row, touch_path, walk, whole_pages
from flatradix.layout import numbers, reasons
from flatradix.layout.handles import NO_HANDLE


@helper
def _bad_token(s, key, wide, units, done):
    """Return the position of the first invalid token in the page that ended the walk, or -1. Cached pages have none."""
    if done >= units:
        return -1
    return first_bad(key, wide, done, done + s.numbers[numbers.PAGE] + s.numbers[numbers.BIGRAM], numbers.MAX_TOKEN)


@helper
def _finish(s, row, length, touch, lock, split):
    if touch:
        s.numbers[numbers.CLOCK] += 2
        touch_path(s, row, s.numbers[numbers.CLOCK])
    if lock:
        row = lock_place(s, row, length)
    elif split:
        row = end_at(s, row, length)
    return handle_of(s, row)


@fixed_types("(int64, int64, int64, boolean, int64, int64, boolean, boolean, boolean)")
def match_one(addresses, call, key, wide, tokens, namespace, touch, lock, split):
    """Match one key from the root; return (length, handle), or (the reason, the position of the bad token)."""
    s = open_state(addresses)
    units = whole_pages(s, tokens)
    row, length = walk(s, key, wide, units, namespace, np.int64(0), np.int64(0))
    bad = _bad_token(s, key, wide, units, length)
    if bad >= 0:
        note_refusal(s, 0, bad)
        return np.int64(reasons.BAD_TOKEN), np.int64(bad)
    if lock and near_limit(s, s.lock_ref, numbers.MOST_LOCKS, 1):
        reason = refuse_one(s, s.lock_ref, row, length, reasons.TOO_MANY_LOCKS)
        if reason < 0:
            return reason, length
    handle = _finish(s, row, length, touch, lock, split)
    if lock:
        note_change(s, call, numbers.LOCKED, handle, length, 0)
    return length, handle


@helper
def _walk_query(s, query, keys, wide, counts, namespaces, named, start_handles, start_lengths):
    """Walk one query of a batch from its start; return (row, length). A negative row is the reason for refusal."""
    key = keys[query]
    start = np.int64(0)
    if start_handles[query] != NO_HANDLE:
        start = np.int64(start_lengths[query])
    row = start_row(s, start_handles[query], start, namespaces[query], named[query], key, wide, counts[query])
    if row < 0:
        note_refusal(s, query, start)
        return row, start
    units = whole_pages(s, counts[query])
    row, length = walk(s, key, wide, units, namespaces[query], row, start)
    bad = _bad_token(s, key, wide, units, length - start)
    if bad >= 0:
        note_refusal(s, query, bad)
        return np.int64(reasons.BAD_TOKEN), length
    return row, length


@kernel
def match(
    addresses, call, keys, wide, counts, namespaces, named, start_handles, start_lengths, touch, lock, split, lengths,
    handles,
):  # fmt: skip
    """Match a batch in order.

    `keys`, int64 [B], are addresses; `counts` are in tokens; `namespaces` are codes; `named` says whether the caller
    gave a namespace. Fills `lengths`, int32 [B], and `handles`, int64 [B]. Returns 0, or the reason why nothing was
    touched or locked. A match does not change what another match finds, so all walks come first. A lock may split the
    edge on which a later query ends; the later query then finds the row of its place again.
    """
    s = open_state(addresses)
    for query in range(len(keys)):
        row, length = _walk_query(s, query, keys, wide, counts, namespaces, named, start_handles, start_lengths)
        if row < 0:
            return row
        lengths[query] = np.int32(length)
        handles[query] = row
    if lock and near_limit(s, s.lock_ref, numbers.MOST_LOCKS, len(keys)):
        reason = refuse_above_limit(s, s.lock_ref, handles, lengths, reasons.TOO_MANY_LOCKS)
        if reason < 0:
            return reason
    for query in range(len(keys)):
        length = np.int64(lengths[query])
        handles[query] = _finish(s, row_at(s, handles[query], length), length, touch, lock, split)
    if lock:
        note_change(s, call, numbers.LOCKED, 0, 0, 0)
    return np.int64(0)


@helper
def _old_place(s, handle, length, namespace, named, units):
    """Return (row, length) of a place from which a whole key can be walked on.

    That is the root if the place is gone, or was dropped.
    """
    row = resolve(s, handle, length)
    if row <= 0 or s.created[row] < 0 or length > units or (named and namespace_of(s, row) != namespace):
        return np.int64(0), np.int64(0)
    return row, length


@kernel
def rematch(
    addresses, keys, wide, counts, namespaces, named, old_handles, old_lengths, lengths, handles
):  # fmt: skip
    """Match a batch of whole keys from old places of the same keys, without a touch; return 0, or the reason."""
    s = open_state(addresses)
    step = 8 if wide else 4
    for query in range(len(keys)):
        units = whole_pages(s, counts[query])
        row, start = _old_place(s, old_handles[query], old_lengths[query], namespaces[query], named[query], units)
        key = keys[query] + step * start
        row, length = walk(s, key, wide, units - start, namespaces[query], row, start)
        bad = _bad_token(s, key, wide, units - start, length - start)
        if bad >= 0:
            note_refusal(s, query, start + bad)
            return np.int64(reasons.BAD_TOKEN)
        lengths[query] = np.int32(length)
        handles[query] = handle_of(s, row)
    return np.int64(0)
