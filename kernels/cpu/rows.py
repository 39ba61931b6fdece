"""Rows and handles: allocating and freeing rows, splitting an edge, finding the row of a place."""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.children import add_child, remove_child, replace_child, tag_of
from flatradix.kernels.cpu.jit import helper
from flatradix.kernels.cpu.pool import mark
from flatradix.layout import dropped, handles, numbers, reasons
from flatradix.layout.handles import GENERATION_MASK, LOW32, ROW_BITS, ROW_MASK
from flatradix.layout.state import FREE_ROW

pack_handle = helper(handles.pack_handle)
next_generation = helper(handles.next_generation)
made_above = helper(dropped.made_above)
left_below = helper(dropped.left_below)


@helper
def handle_of(s, row):
    return pack_handle(row, s.numbers[numbers.GENERATION] + s.generation[row])


@helper
def row_at(s, row, length):
    """Return the row on whose edge the path of `row` reaches `length`; 0 for the root. A split may have moved it up."""
    row = np.int64(row)
    while row > 0 and s.end[row] - s.length[row] >= length:
        row = np.int64(s.parent[row])
    return max(row, np.int64(0))


@helper
def resolve(s, handle, length):
    """Return the row on whose edge the place (handle, length) lies: end - edge length < `length` <= end.

    For length 0 that is the root, row 0. If there is no such place, return STALE or NOT_THERE. The lower part of a
    split edge keeps its row, so splits can only move the place to rows above the handle's. Only an eviction by pages
    moves the end of a row, towards the root: then a place beyond the end is stale, and never comes back.
    """
    row = handle & ROW_MASK
    if handle < 0 or row >= s.numbers[numbers.ROWS]:
        return np.int64(reasons.STALE)
    if handle >> ROW_BITS != (s.numbers[numbers.GENERATION] + s.generation[row]) & GENERATION_MASK:
        return np.int64(reasons.STALE)
    if s.parent[row] == FREE_ROW:
        return np.int64(reasons.STALE)
    if length < 0 or length > s.end[row] or length % s.numbers[numbers.PAGE] != 0:
        cut = row > 0 and length > s.end[row] and length % s.numbers[numbers.PAGE] == 0
        return np.int64(reasons.STALE if cut and s.numbers[numbers.BY_PAGE] != 0 else reasons.NOT_THERE)
    return row_at(s, row, length)


@helper
def note_event(s, kind, row, detail):
    """Write an event for those who follow the tree. detail: the second word, as `numbers` defines it."""
    count = s.numbers[numbers.EVENTS]
    at = 2 * (count & (numbers.EVENT_RING - 1))
    s.events[at] = (kind << 32) | (row & LOW32)
    s.events[at + 1] = detail
    s.numbers[numbers.EVENTS] = count + 1


@helper
def take_row(s):
    count = s.numbers[numbers.FREE_ROWS]
    s.numbers[numbers.NODES] += 1
    if count > 0:
        s.numbers[numbers.FREE_ROWS] = count - 1
        return np.int64(s.free_rows[count - 1])
    row = s.numbers[numbers.ROWS]
    s.numbers[numbers.ROWS] = row + 1
    s.generation[row] = 0
    return row


@helper
def free_row(s, row):
    """Free a row. Its handles go stale. Until the row is used again, its `start` and `length` stay readable.

    `own_locks`, which is 0 then, holds its parent, for those who want to know the key of what was freed.
    """
    begin = np.int64(s.end[row]) - s.length[row]
    s.own_locks[row] = s.parent[row]
    note_event(s, numbers.FREED, row, (np.int64(s.parent[row]) << 32) | begin)
    mark(s, s.start[row], s.length[row], False)
    release_row(s, row)


@helper
def shorten_row(s, row, units):
    """Free the last `units` units of a childless node's edge, whole pages but not all. Places there go stale."""
    s.length[row] -= units
    s.end[row] -= units
    note_event(s, numbers.SHORTENED, row, np.int64(s.end[row]))
    mark(s, np.int64(s.start[row]) + s.length[row], units, False)


@helper
def release_row(s, row):
    """Free a row without a mark in the pool and without an event."""
    remove_child(s, row)
    put_back(s, row)


@helper
def put_back(s, row):
    """Free a row that has no entry in the child table."""
    s.parent[row] = FREE_ROW
    s.generation[row] = next_generation(s.generation[row])
    count = s.numbers[numbers.FREE_ROWS]
    s.free_rows[count] = row
    s.numbers[numbers.FREE_ROWS] = count + 1
    s.numbers[numbers.NODES] -= 1


@helper
def split_edge(s, row, at, created):
    """Cut the edge of `row` at path length `at`, a page boundary inside it; return the row of the upper part.

    The lower part keeps the row, so handles of this row and of rows below stay valid. The upper part takes over the
    entry in the child table, and copies tick, priority, hit_count, lock_ref and wanted. Locks and wants that end at
    the old node end at the lower part. `created`: the time.
    """
    upper = take_row(s)
    inside = at - (s.end[row] - s.length[row])
    s.parent[upper] = s.parent[row]
    s.start[upper] = s.start[row]
    s.length[upper] = inside
    s.end[upper] = at
    s.children[upper] = 1
    s.lock_ref[upper] = s.lock_ref[row]
    s.own_locks[upper] = 0
    s.wanted[upper] = s.wanted[row]
    s.own_wants[upper] = 0
    s.hit_count[upper] = s.hit_count[row]
    s.queued[upper] = 0
    s.tick[upper] = s.tick[row]
    s.created[upper] = made_above(s.created[row], created)
    s.priority[upper] = s.priority[row]
    replace_child(s, row, upper)

    s.parent[row] = upper
    s.created[row] = left_below(s.created[row])
    s.start[row] += inside
    s.length[row] -= inside
    start = np.int64(s.start[row])
    add_child(s, row, tag_of(s, s.tokens + 4 * start, s.seconds + 4 * start, False, upper))
    note_event(s, numbers.CUT, row, (upper << 32) | at)
    return upper
