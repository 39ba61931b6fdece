"""Evict: free childless, unlocked nodes in the order of the policy until enough tokens are free."""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change
from flatradix.kernels.cpu.jit import fixed_types, helper, open_state
from flatradix.kernels.cpu.queue import clear, drop, first_at, push, run_at, score_of
from flatradix.kernels.cpu.rows import free_row
from flatradix.kernels.cpu.units import copy_slots
from flatradix.layout import numbers
from flatradix.layout.state import FREE_ROW


@helper
def _score(s, scores, row):
    if s.numbers[numbers.POLICY] == numbers.SCORES:
        return scores[row]
    return score_of(s, row)


@helper
def _fill_queue(s, scores):
    """Enter every candidate, for policies that score all nodes at each eviction."""
    for row in range(1, s.numbers[numbers.ROWS]):
        if s.parent[row] != FREE_ROW and s.children[row] == 0 and s.lock_ref[row] == 0:
            push(s, row, scores[row])


@helper
def _empty_queue(s):
    for at in range(s.numbers[numbers.HEAP_SIZE]):
        s.queued[s.queue_row[at]] = 0
    for index in range(s.numbers[numbers.RUN_LENGTH]):
        s.queued[s.queue_row[run_at(s, index)]] = 0
    clear(s)


@helper
def _detach(s, row, scores):
    """Remove a victim from its parent, which may become a candidate, or from its namespace.

    A namespace that is empty now goes to `released`, except that of no name.
    """
    parent = s.parent[row]
    if parent >= 0:
        s.children[parent] -= 1
        if s.children[parent] == 0 and s.lock_ref[parent] == 0 and s.queued[parent] == 0:
            push(s, parent, _score(s, scores, parent))
        return
    namespace = ~np.int64(parent)
    s.namespace_children[namespace] -= 1
    if s.namespace_children[namespace] == 0 and namespace != 0:
        s.released[s.numbers[numbers.RELEASED]] = namespace
        s.numbers[numbers.RELEASED] += 1


@helper
def _take_first(s, at, scores):
    """Remove the queue's first entry, which is at `at`; return its row if it can be evicted now, else 0.

    If the row has been used since it was entered, it is entered again with its present score and tick. If it has
    children or locks by now, it is not.
    """
    row = np.int64(s.queue_row[at])
    score = s.queue_score[at]
    tick = s.queue_tick[at]
    drop(s, at)
    if s.children[row] > 0 or s.lock_ref[row] > 0:
        return np.int64(0)
    if score == _score(s, scores, row) and tick == s.tick[row]:
        return row
    push(s, row, _score(s, scores, row))
    return np.int64(0)


@helper
def _gather_victims(s, nodes, pool, pool_wide, starts, lengths, slots):
    """Copy the slots of the `nodes` rows freed last to `slots`. If `pool` is 0, fill their pool ranges instead."""
    step = 8 if pool_wide else 4
    first = s.numbers[numbers.FREE_ROWS] - nodes
    for at in range(nodes):
        row = s.free_rows[first + at]
        start, count = np.int64(s.start[row]), np.int64(s.length[row])
        if pool == 0:
            starts[at], lengths[at] = start, count
        else:
            copy_slots(pool + step * start, slots, pool_wide, count)
            slots += step * count


@fixed_types("(int64, int64, int64, int64[::1], int64, boolean, int32[::1], int32[::1], int64)")
def evict(addresses, call, wanted, scores, pool, pool_wide, starts, lengths, slots):
    """Free nodes until `wanted` tokens are free or no candidate is left; return (tokens, nodes).

    scores: int64 [rows], or [0] if the policy needs no scores or nothing is wanted. The freed slots are copied, in
    order, from the slot pool at the address `pool` to the address `slots`, with the same dtype. If `pool` is 0,
    `starts` and `lengths`, int32, get the pool ranges instead. Each array has space for all that may be freed. Nothing
    is allocated.
    """
    s = open_state(addresses)
    by_scores = wanted > 0 and s.numbers[numbers.POLICY] == numbers.SCORES
    if by_scores:
        _fill_queue(s, scores)
    tokens = np.int64(0)
    nodes = np.int64(0)
    while tokens < wanted:
        at = first_at(s)
        if at < 0:
            break
        row = _take_first(s, at, scores)
        if row > 0:
            _detach(s, row, scores)
            free_row(s, row)
            tokens += s.length[row]
            nodes += 1
    s.numbers[numbers.EVICTABLE] -= tokens
    if by_scores:
        _empty_queue(s)
    _gather_victims(s, nodes, pool, pool_wide, starts, lengths, slots)
    note_change(s, call, numbers.EVICTED, 0, tokens, nodes)
    return tokens, nodes
