"""Wants: a count on each node from a place to the root; evictions spare wanted nodes as long as they can.

`wanted` counts soft pins and what a waiting queue wants; `own_wants` counts the soft pins that end at a node, so that
nobody can remove a want of the queue.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change, note_refusal
from flatradix.kernels.cpu.counts import near_limit, refuse_above_limit, rows_of
from flatradix.kernels.cpu.jit import helper, kernel, open_state
from flatradix.kernels.cpu.lock import end_at
from flatradix.kernels.cpu.queue import offer
from flatradix.kernels.cpu.rows import handle_of, resolve
from flatradix.layout import numbers, reasons


@helper
def want_row(s, row):
    """Add one want to the path of a row. Its entry in the eviction queue is dropped when its turn comes."""
    row = np.int64(row)
    while row > 0:
        s.wanted[row] += 1
        row = np.int64(s.parent[row])


@helper
def unwant_row(s, row):
    """Remove one want from the path of a row."""
    row = np.int64(row)
    while row > 0:
        s.wanted[row] -= 1
        if s.wanted[row] == 0 and s.children[row] == 0 and s.lock_ref[row] == 0:
            offer(s, row)
        row = np.int64(s.parent[row])


@helper
def end_wants(s, row):
    """End all wants of a childless node that is about to lose its end: the nodes above lose them too."""
    count = s.wanted[row]
    s.wanted[row] = 0
    s.own_wants[row] = 0
    row = np.int64(s.parent[row])
    while row > 0:
        s.wanted[row] -= count
        row = np.int64(s.parent[row])


@kernel
def want(addresses, call, handles, lengths):
    """Want a batch of places, all of them or none; return 0, or the reason.

    `handles`, int64 [B], is updated where an edge was split. A dropped place is not wanted, as no look-up finds it.
    """
    s = open_state(addresses)
    for query in range(len(handles)):
        row = resolve(s, handles[query], np.int64(lengths[query]))
        if row < 0:
            note_refusal(s, query, lengths[query])
            return row
    if near_limit(s, s.wanted, numbers.MOST_WANTS, len(handles)):
        reason = refuse_above_limit(s, s.wanted, rows_of(s, handles, lengths), lengths, reasons.TOO_MANY_WANTS)
        if reason < 0:
            return reason
    for query in range(len(handles)):
        length = np.int64(lengths[query])
        row = end_at(s, resolve(s, handles[query], length), length)
        if s.created[row] >= 0:
            s.own_wants[row] += row > 0
            want_row(s, row)
        handles[query] = handle_of(s, row)
    note_change(s, call, numbers.WANTED, 0, 0, 0)
    return np.int64(0)


@kernel
def unwant(addresses, call, handles, lengths):
    """Remove the wants of a batch of places, all of them or none; return 0, or the reason.

    Stale and dropped places are skipped: their wants have ended.
    """
    s = open_state(addresses)
    for query in range(len(handles)):
        row = resolve(s, handles[query], np.int64(lengths[query]))
        bad = row == reasons.NOT_THERE
        if row > 0 and s.created[row] >= 0:
            bad = s.end[row] != lengths[query] or s.own_wants[row] == 0
            if not bad:
                s.own_wants[row] -= 1
                unwant_row(s, row)
        if bad:
            for done in range(query):
                again = resolve(s, handles[done], np.int64(lengths[done]))
                if again > 0 and s.created[again] >= 0:
                    s.own_wants[again] += 1
                    want_row(s, again)
            note_refusal(s, query, lengths[query])
            return np.int64(reasons.NOT_WANTED)
    note_change(s, call, numbers.UNWANTED, 0, 0, 0)
    return np.int64(0)


@kernel
def alive(addresses, handles, lengths, out):
    """Fill `out`, bool [B]: whether each place is still in the tree, and was not dropped."""
    s = open_state(addresses)
    for query in range(len(handles)):
        row = resolve(s, handles[query], np.int64(lengths[query]))
        out[query] = row == 0 or (row > 0 and s.created[row] >= 0)
