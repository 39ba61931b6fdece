"""Enlarge: move a tree to larger arrays, in one step for everyone who has its address table."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import helper, int64_at, kernel, open_state
from flatradix.kernels.cpu.reset import fill_derived
from flatradix.kernels.cpu.units import copy_slots
from flatradix.layout import numbers
from flatradix.layout.state import TreeState

_FIELDS = len(TreeState._fields)


@helper
def _copy_row(s, t, row):
    t.parent[row] = s.parent[row]
    t.start[row] = s.start[row]
    t.length[row] = s.length[row]
    t.end[row] = s.end[row]
    t.children[row] = s.children[row]
    t.lock_ref[row] = s.lock_ref[row]
    t.own_locks[row] = s.own_locks[row]
    t.wanted[row] = s.wanted[row]
    t.own_wants[row] = s.own_wants[row]
    t.hit_count[row] = s.hit_count[row]
    t.tag[row] = s.tag[row]
    t.tick[row] = s.tick[row]
    t.created[row] = s.created[row]
    t.priority[row] = s.priority[row]
    t.generation[row] = s.generation[row]


@kernel
def enlarge(addresses, larger, max_tokens, rows, pages):
    """Copy a tree to the arrays of the address table `larger`, and let its own table have their addresses.

    `larger`: of empty arrays for `max_tokens` tokens, with `rows` rows and pools of `pages` pages. It has the tree's
    own `numbers`, `events` and `multipliers`. Rows and pool ranges stay, and so do handles. What follows from the rows
    is built anew: the child table, the bitmap and the eviction queue. O(cached tokens).
    """
    s = open_state(addresses)
    t = open_state(larger)
    page, had = s.numbers[numbers.PAGE], s.numbers[numbers.ROW_CAPACITY]
    units = s.numbers[numbers.POOL_PAGES] * page
    for row in range(s.numbers[numbers.ROWS]):
        _copy_row(s, t, row)
    for at in range(s.numbers[numbers.FREE_ROWS]):
        t.free_rows[at] = s.free_rows[at]
    for code in range(had):
        t.namespace_children[code] = s.namespace_children[code]
        t.namespace_hash[code] = s.namespace_hash[code]
    copy_slots(s.tokens, t.tokens, False, units)
    if s.numbers[numbers.BIGRAM] != 0:
        copy_slots(s.seconds, t.seconds, False, units)
    t.numbers[numbers.MAX_TOKENS] = max_tokens
    t.numbers[numbers.ROW_CAPACITY] = rows
    t.numbers[numbers.POOL_PAGES] = pages
    fill_derived(t)
    table, their_table = int64_at(addresses), int64_at(larger)
    for field in range(_FIELDS):
        table[field] = their_table[field]
