"""Look: keep the places of waiting prompts in the tree right, from the events that the tree has noted.

A prompt stands in the list of the row at which its match ends, and, if a new leaf could continue the match, under the
key of that leaf. So an event leads to the prompts that it concerns, and the others are not touched. A prompt whose
match may go on is walked on from its place.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.children import tag_of
from flatradix.kernels.cpu.jit import fixed_types, helper, kernel, open_state, open_waiting
from flatradix.kernels.cpu.waiting import (
    GONE_ID,
    bucket_of,
    enter_key,
    enter_row,
    leave_key,
    leave_row,
    mark_dirty,
)
from flatradix.kernels.cpu.walk import walk
from flatradix.kernels.cpu.wants import unwant_row, want_row
from flatradix.layout import numbers, waiting
from flatradix.layout.handles import LOW32
from flatradix.layout.waiting import NONE


@helper
def _set_place(s, q, pool, entry, row, length, at_end):
    """Move a prompt to a place. at_end: whether the node ends there, so that a new leaf could continue the match."""
    leave_row(q, entry)
    leave_key(q, entry)
    enter_row(q, entry, row)
    q.length[entry] = length
    parent = np.int64(row) if row > 0 else ~q.codes[q.space[entry]]
    if at_end and length < q.units[entry] and (row > 0 or parent < 0):
        first = pool + 4 * (q.start[entry] + length)
        enter_key(q, entry, (parent << 32) | tag_of(s, first, first + 4, False, parent))


@helper
def _is_wanted(s, q, entry):
    """Return whether the want of a prompt still counts: it ends when its node is freed."""
    row = q.wants[entry]
    return row > 0 and s.generation[row] == q.wants_generation[entry]


@helper
def _renew_want(s, q, entry):
    row = np.int64(q.row[entry])
    counts = _is_wanted(s, q, entry)
    if counts and q.wants[entry] == row:
        return
    if row > 0:
        want_row(s, row)
    if counts:
        unwant_row(s, q.wants[entry])
    q.wants[entry] = row
    q.wants_generation[entry] = s.generation[row]


@helper
def forget_place(s, q, entry):
    """Take a prompt out of the lists, and end its want."""
    leave_row(q, entry)
    leave_key(q, entry)
    if _is_wanted(s, q, entry):
        unwant_row(s, q.wants[entry])
    q.wants[entry] = 0


@helper
def _note_leaf(q, parent, tag):
    key = (parent << 32) | tag
    entry = q.buckets[bucket_of(q, key)]
    while entry != NONE:
        if q.key[entry] == key:
            mark_dirty(q, entry)
        entry = q.next_with_key[entry]


@helper
def _note_cut(s, q, pool, row, upper, at):
    """Move the prompts whose match ends on the upper part of a cut edge."""
    entry = q.at_row[row]
    while entry != NONE:
        after = q.next_at_row[entry]
        if q.length[entry] <= at:
            _set_place(s, q, pool, entry, upper, np.int64(q.length[entry]), q.length[entry] == at)
            mark_dirty(q, entry)
        entry = after


@helper
def _note_freed(s, q, pool, row, parent, at):
    """Move the prompts of a node that went to the end of its parent."""
    while q.at_row[row] != NONE:
        entry = q.at_row[row]
        _set_place(s, q, pool, entry, max(parent, np.int64(0)), at, True)
        mark_dirty(q, entry)


@helper
def _note_shortened(s, q, pool, row, end):
    """Move the prompts whose match ends at the new end of a node or beyond to this end, where it can go on now."""
    entry = q.at_row[row]
    while entry != NONE:
        after = q.next_at_row[entry]
        if q.length[entry] >= end:
            _set_place(s, q, pool, entry, row, end, True)
            mark_dirty(q, entry)
        entry = after


@helper
def _start_afresh(q):
    """Move all prompts to the root."""
    for at in range(q.counts[waiting.AGED]):
        entry = q.by_age[at]
        if entry != NONE:
            leave_row(q, entry)
            leave_key(q, entry)
            q.length[entry] = 0
            mark_dirty(q, entry)


@helper
def _read_events(s, q, pool):
    count = s.numbers[numbers.EVENTS]
    if count - q.counts[waiting.READ] > numbers.EVENT_RING:
        _start_afresh(q)
        q.counts[waiting.READ] = count
    for number in range(q.counts[waiting.READ], count):
        at = 2 * (number & (numbers.EVENT_RING - 1))
        kind = s.events[at] >> 32
        row = np.int64(np.int32(s.events[at] & LOW32))
        high, low = s.events[at + 1] >> 32, s.events[at + 1] & LOW32
        if kind == numbers.LEAF:
            _note_leaf(q, row, low)
        elif kind == numbers.CUT:
            _note_cut(s, q, pool, row, high, low)
        elif kind == numbers.FREED:
            _note_freed(s, q, pool, row, high, low)
        elif kind == numbers.SHORTENED:
            _note_shortened(s, q, pool, row, low)
        else:
            _start_afresh(q)
    q.counts[waiting.READ] = count


@helper
def _walk_on(s, q, pool, entry):
    """Follow a prompt from its place as far as the tree goes now."""
    row, length = np.int64(q.row[entry]), np.int64(q.length[entry])
    key = pool + 4 * (q.start[entry] + length)
    units = np.int64(q.units[entry]) - length
    row, length = walk(s, key, False, units, q.codes[q.space[entry]], row, length)
    _set_place(s, q, pool, entry, row, length, row == 0 or length == s.end[row])


@fixed_types("(int64, int64, int64)")
def look(addresses, table, pool):
    """Bring the places and the wants of all waiting prompts up to date. O(events + prompts that they concern).

    pool: address of the prompts' tokens.
    """
    s, q = open_state(addresses), open_waiting(table)
    _read_events(s, q, pool)
    for at in range(q.counts[waiting.TODO]):
        entry = np.int64(q.todo[at])
        q.dirty[entry] = 0
        if q.id[entry] != GONE_ID:
            _walk_on(s, q, pool, entry)
            if q.counts[waiting.KEEP] != 0:
                _renew_want(s, q, entry)
    q.counts[waiting.TODO] = 0


@kernel
def recode(table, changed):
    """Look again at the prompts without a match whose space has a new code. changed: bool [spaces]."""
    q = open_waiting(table)
    for at in range(q.counts[waiting.AGED]):
        entry = q.by_age[at]
        if entry != NONE and changed[q.space[entry]] and q.row[entry] == 0:
            mark_dirty(q, entry)


@kernel
def forget_wants(addresses, table):
    """End the wants of all prompts of a queue that keeps no longer."""
    s, q = open_state(addresses), open_waiting(table)
    for at in range(q.counts[waiting.AGED]):
        entry = q.by_age[at]
        if entry != NONE:
            if _is_wanted(s, q, entry):
                unwant_row(s, q.wants[entry])
            q.wants[entry] = NONE
