"""Limits of the lock counts and of the soft pins of a node, which are 32 bits wide.

A count of a node is at least that of each node below, so the node at the top of a path has the largest. A call that
adds counts adds them to a bound on the largest of all (`MOST_LOCKS`, `MOST_WANTS`) and compares this sum with the
limit. Only when the bound passes the limit, which takes 2**30 calls, it looks at the nodes.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_refusal
from flatradix.kernels.cpu.jit import helper
from flatradix.kernels.cpu.rows import resolve
from flatradix.layout import numbers
from flatradix.layout.state import FREE_ROW


@helper
def largest(s, counts):
    """Return the largest of `counts`, a column of locks or wants, over all nodes. O(rows)."""
    most = np.int64(0)
    for row in range(1, s.numbers[numbers.ROWS]):
        if s.parent[row] < 0 and s.parent[row] != FREE_ROW:
            most = max(most, np.int64(counts[row]))
    return most


@helper
def near_limit(s, counts, bound, more):
    """Return whether `more` additions may bring a count above MAX_LOCKS. bound: MOST_LOCKS or MOST_WANTS."""
    s.numbers[bound] += more
    if s.numbers[bound] <= numbers.MAX_LOCKS:
        return False
    s.numbers[bound] = largest(s, counts) + more
    return s.numbers[bound] > numbers.MAX_LOCKS


@helper
def _top(s, row):
    """Return the node at the top of the path of `row`, 0 for the root."""
    row = np.int64(row)
    while row > 0 and s.parent[row] > 0:
        row = np.int64(s.parent[row])
    return row


@helper
def refuse_one(s, counts, row, length, reason):
    """Return 0, or `reason` if one more at `row` brings a count above the limit. length: for the message."""
    top = _top(s, row)
    if top == 0 or counts[top] < numbers.MAX_LOCKS:
        return np.int64(0)
    note_refusal(s, 0, length)
    return np.int64(reason)


@helper
def refuse_above_limit(s, counts, rows, lengths, reason):
    """Return 0, or `reason` if a count exceeds the limit when each of `rows`, int64 [B], adds one in turn.

    lengths: of the places, for the message. The counts at the tops are raised meanwhile, and restored.
    """
    raised = 0
    while raised < len(rows):
        top = _top(s, rows[raised])
        if top > 0 and counts[top] >= numbers.MAX_LOCKS:
            break
        counts[top] += 1  # row 0, the root, may be among them
        raised += 1
    for query in range(raised):
        counts[_top(s, rows[query])] -= 1
    if raised == len(rows):
        return np.int64(0)
    note_refusal(s, raised, lengths[raised])
    return np.int64(reason)


@helper
def rows_of(s, handles, lengths):
    """Return int64 [B]: the rows of good places."""
    rows = np.empty(len(handles), np.int64)
    for query in range(len(handles)):
        rows[query] = resolve(s, handles[query], np.int64(lengths[query]))
    return rows
