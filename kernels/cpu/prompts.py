"""The prompts of a waiting queue: their tokens in a pool, and a tree of prompts that tells what they share.

The tree of prompts is a TreeState whose token pool holds every prompt in one piece. An edge is a range of any one
prompt below it, so prompts are stored once, and nothing moves. `lock_ref` counts the prompts at or below a node,
`own_locks` those that end at it. When a prompt leaves, edges may still lie in its range: `tidy` lets every edge lie in
the oldest prompt below it, then frees the ranges.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.children import add_child, grow_table, refill, remove_child, replace_child, tag_of
from flatradix.kernels.cpu.jit import fixed_types, helper, kernel, open_state, open_waiting
from flatradix.kernels.cpu.look import forget_place
from flatradix.kernels.cpu.pool import find_free, mark
from flatradix.kernels.cpu.rows import put_back, release_row, split_edge, take_row
from flatradix.kernels.cpu.units import copy_checked, first_bad
from flatradix.kernels.cpu.waiting import (
    append_turn,
    close_gaps,
    free_entry,
    mark_dirty,
    position_of,
    take_entry,
)
from flatradix.kernels.cpu.walk import walk, whole_pages
from flatradix.layout import numbers, waiting
from flatradix.layout.waiting import NONE

BAD_TOKEN, NO_SPACE = -1, -2  # NO_SPACE: no free range of the pool is long enough


@helper
def _span(f, tokens):
    """Return the length of a prompt's range: whole pages."""
    page = f.numbers[numbers.PAGE]
    return (np.int64(tokens) + page - 1) // page * page


@helper
def _store(f, key, wide, tokens):
    """Copy a prompt to a free range; return its start, NO_SPACE or BAD_TOKEN."""
    span = _span(f, tokens)
    if span == 0:
        return np.int64(0)
    start = find_free(f, span)
    if start < 0:
        return np.int64(NO_SPACE)
    if copy_checked(key, wide, f.tokens + 4 * start, False, tokens, numbers.MAX_TOKEN) < 0:
        return np.int64(BAD_TOKEN)
    mark(f, start, span, True)
    f.numbers[numbers.POOL_CURSOR] = (start + span) // f.numbers[numbers.PAGE]
    return start


@helper
def _add_leaf(f, parent, start, length, end):
    row = take_row(f)
    f.parent[row] = parent
    f.start[row] = start
    f.length[row] = length
    f.end[row] = end
    f.children[row] = 0
    f.lock_ref[row] = 0
    f.own_locks[row] = 0
    f.tick[row] = 0
    first = f.tokens + 4 * start
    add_child(f, row, tag_of(f, first, first + 4, False, parent))
    if parent > 0:
        f.children[parent] += 1
    return row


@helper
def _enter(f, start, units, space):
    """Enter a prompt into the tree of prompts; return (the row of its end, units that an older prompt has too)."""
    key = f.tokens + 4 * start
    row, length = walk(f, key, False, units, space, np.int64(0), np.int64(0))
    shared = length
    grow_table(f, 2)
    if row > 0 and length < f.end[row]:
        row = split_edge(f, row, length, np.int64(0))
    if length < units:
        row = _add_leaf(f, row if row > 0 else ~space, start + length, units - length, units)
    f.own_locks[row] += row > 0
    above = row
    while above > 0:
        f.lock_ref[above] += 1
        above = np.int64(f.parent[above])
    return row, shared


@helper
def _link(f, q, start, tokens, left, space, priority, arrival):
    """Add a stored prompt to the queue; return its id."""
    entry = take_entry(q)
    number = q.counts[waiting.NEXT_ID]
    q.counts[waiting.NEXT_ID] = number + 1
    units = whole_pages(f, tokens - left)
    q.id[entry], q.start[entry] = number, start
    q.tokens[entry], q.units[entry] = tokens, units
    q.space[entry], q.priority[entry], q.arrival[entry] = space, priority, arrival
    q.leaf[entry], q.shared[entry] = _enter(f, start, units, space)
    q.row[entry], q.length[entry], q.keyed[entry], q.wants[entry] = 0, 0, 0, 0
    if q.counts[waiting.AGED] == q.counts[waiting.BUCKETS]:  # also the length of `by_age`
        close_gaps(q)
    at = q.counts[waiting.AGED]
    q.by_age[at], q.id_by_age[at] = entry, number
    q.counts[waiting.AGED] = at + 1
    q.in_space[space] += 1
    q.counts[waiting.LIVE_TOKENS] += _span(f, tokens)
    append_turn(q, entry)
    mark_dirty(q, entry)
    return number


@fixed_types("(int64, int64, int64, boolean, int64, int64, int64, int64, float64)")
def add_prompt(forest, table, key, wide, tokens, left, space, priority, arrival):
    """Add one prompt; return its id, BAD_TOKEN or NO_SPACE. left: tokens at the end that no match covers."""
    f, q = open_state(forest), open_waiting(table)
    start = _store(f, key, wide, tokens)
    if start < 0:
        return start
    return _link(f, q, start, tokens, left, space, priority, arrival)


@kernel
def add_prompts(forest, table, keys, wide, counts, left, spaces, priorities, arrivals, starts, ids):
    """Add a batch of prompts, all or none; return (0, BAD_TOKEN or NO_SPACE; the first query that is refused).

    keys: addresses, int64 [B]. counts: in tokens. starts: scratch, int64 [B]. Fills `ids`, int64 [B].
    """
    f, q = open_state(forest), open_waiting(table)
    for query in range(len(keys)):
        starts[query] = _store(f, keys[query], wide, counts[query])
        if starts[query] < 0:
            for done in range(query):
                mark(f, starts[done], _span(f, counts[done]), False)
            return starts[query], query
    for query in range(len(keys)):
        ids[query] = _link(f, q, starts[query], counts[query], left, spaces[query], priorities[query], arrivals[query])
    return np.int64(0), 0


@kernel
def first_bad_token(key, wide, count):
    """Return the position of the first token out of range, or -1."""
    return first_bad(key, wide, np.int64(0), count, numbers.MAX_TOKEN)


@helper
def _leave(f, row):
    """Remove a prompt that ends at a row from the tree of prompts, and the nodes that no other prompt has."""
    row = np.int64(row)
    f.own_locks[row] -= row > 0
    while row > 0:
        parent = np.int64(f.parent[row])
        f.lock_ref[row] -= 1
        if f.lock_ref[row] == 0:
            release_row(f, row)
            if parent > 0:
                f.children[parent] -= 1
        row = parent


@helper
def _remove(addresses, f, q, at):
    """Remove the prompt at a position of the list by age."""
    entry = np.int64(q.by_age[at])
    q.by_age[at] = NONE
    if addresses != 0:
        forget_place(open_state(addresses), q, entry)
    _leave(f, q.leaf[entry])
    q.in_space[q.space[entry]] -= 1
    gone = q.counts[waiting.GONE]
    q.gone_start[gone], q.gone_tokens[gone] = q.start[entry], q.tokens[entry]
    q.counts[waiting.GONE] = gone + 1
    span = _span(f, q.tokens[entry])
    q.counts[waiting.GONE_TOKENS] += span
    q.counts[waiting.LIVE_TOKENS] -= span
    free_entry(q, entry)
    mark_dirty(q, entry)


@fixed_types("(int64, int64, int64, int64)")
def remove_prompt(addresses, forest, table, number):
    """Remove the prompt with an id; return whether it waited. addresses: of the tree, or 0."""
    q = open_waiting(table)
    at = position_of(q, number)
    if at >= 0:
        _remove(addresses, open_state(forest), q, at)
    return at >= 0


@kernel
def remove_prompts(addresses, forest, table, ids):
    """Remove waiting prompts. All ids wait, each once. addresses: of the tree, or 0."""
    f, q = open_state(forest), open_waiting(table)
    for query in range(len(ids)):
        _remove(addresses, f, q, position_of(q, ids[query]))


@helper
def _absorb(f, row, parent):
    """Let a row take over the edge of its parent, of which it is the only child."""
    remove_child(f, row)
    replace_child(f, parent, row)
    f.length[row] += f.length[parent]
    f.parent[row] = f.parent[parent]
    put_back(f, parent)


@helper
def _claim(f, q, entry, number):
    """Let the edges of a prompt's path that no older prompt has lie in the range of the prompt."""
    row = np.int64(q.leaf[entry])
    while row > 0 and f.tick[row] != number:
        parent = np.int64(f.parent[row])
        while parent > 0 and f.children[parent] == 1 and f.own_locks[parent] == 0:
            _absorb(f, row, parent)
            parent = np.int64(f.parent[row])
        f.tick[row] = number
        f.start[row] = q.start[entry] + f.end[row] - f.length[row]
        row = parent
    q.shared[entry] = f.end[row] if row > 0 else 0


@kernel
def tidy(forest, table):
    """Find anew what each prompt shares with older ones, and free the ranges of prompts that have left.

    O(prompts + nodes of the tree of prompts).
    """
    f, q = open_state(forest), open_waiting(table)
    number = q.counts[waiting.PASS] + 1
    q.counts[waiting.PASS] = number
    close_gaps(q)
    for at in range(q.counts[waiting.AGED]):
        _claim(f, q, np.int64(q.by_age[at]), number)
    for at in range(q.counts[waiting.GONE]):
        mark(f, q.gone_start[at], _span(f, q.gone_tokens[at]), False)
    q.counts[waiting.GONE] = 0
    q.counts[waiting.GONE_TOKENS] = 0


@kernel
def enter_rows(forest, entries):
    """Fill the child table of a tree of prompts, after the table was replaced by one of `entries` entries."""
    refill(open_state(forest), np.int64(entries - 1))
