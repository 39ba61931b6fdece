"""Evict: free childless, unlocked nodes until enough tokens are free.

First nodes that nobody wants, in the order of the policy. Then what a waiting queue wants, from the last prompt in its
order on. Last what soft pins want, in the order of the policy. By pages, the last victim loses only its last pages.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change
from flatradix.kernels.cpu.jit import fixed_types, helper, open_state, open_waiting
from flatradix.kernels.cpu.queue import clear, drop, first_at, offer, push, refill_in_order, run_at, score_of
from flatradix.kernels.cpu.rows import free_row, shorten_row
from flatradix.kernels.cpu.units import copy_slots
from flatradix.kernels.cpu.waiting import has_left, mark_dirty
from flatradix.kernels.cpu.wants import end_wants
from flatradix.layout import numbers, waiting
from flatradix.layout.state import FREE_ROW
from flatradix.layout.waiting import NONE

# An eviction that has put back this many entries, and one for each 32 rows, fills the queue anew: by one pass over the
# rows and a radix sort, where each entry put back would be an operation of the heap.
_FEW_PUT_BACK = 64


@helper
def _score(s, scores, row):
    if s.numbers[numbers.POLICY] == numbers.SCORES and s.created[row] >= 0:
        return scores[row]
    return score_of(s, row)


@helper
def _fill_queue(s, scores, wanted):
    """Enter every candidate that is wanted, or every other. Rows that have an entry keep it."""
    for row in range(1, s.numbers[numbers.ROWS]):
        candidate = s.parent[row] != FREE_ROW and s.children[row] == 0 and s.lock_ref[row] == 0
        if candidate and s.queued[row] == 0 and (s.wanted[row] > 0) == wanted:
            push(s, row, _score(s, scores, row))


@helper
def _empty_queue(s):
    for at in range(s.numbers[numbers.HEAP_SIZE]):
        s.queued[s.queue_row[at]] = 0
    for index in range(s.numbers[numbers.RUN_LENGTH]):
        s.queued[s.queue_row[run_at(s, index)]] = 0
    clear(s)


@helper
def free_victim(s, row):
    """Free a victim; return its parent if that has no children and no locks left, else 0.

    A namespace that is empty now goes to `released`, except that of no name.
    """
    parent = np.int64(s.parent[row])
    _detach(s, row, parent)
    free_row(s, row)
    return parent if parent > 0 and s.children[parent] == 0 and s.lock_ref[parent] == 0 else np.int64(0)


@helper
def _detach(s, row, parent):
    if parent >= 0:
        s.children[parent] -= 1
        return
    namespace = ~np.int64(parent)
    s.namespace_children[namespace] -= 1
    if s.namespace_children[namespace] == 0 and namespace != 0:
        s.released[s.numbers[numbers.RELEASED]] = namespace
        s.numbers[numbers.RELEASED] += 1


@helper
def _take_first(s, at, scores, spare):
    """Remove the queue's first entry, which is at `at`; return (its row if it can be evicted now, else 0; put back).

    If the row has been used since it was entered, it is entered again with its present score and tick: `put back` is
    then 1, else 0. If it has children or locks by now, or is wanted and such rows are spared, it is not.
    """
    row = np.int64(s.queue_row[at])
    score = s.queue_score[at]
    tick = s.queue_tick[at]
    drop(s, at)
    if s.children[row] > 0 or s.lock_ref[row] > 0 or (spare and s.wanted[row] > 0):
        return np.int64(0), 0
    if score == _score(s, scores, row) and tick == s.tick[row]:
        return row, 0
    push(s, row, _score(s, scores, row))
    return np.int64(0), 1


@helper
def _cut(s, row, missing):
    """By pages, free the last pages of the last victim, if `missing` tokens need less than all of it.

    Return the tokens of these pages, or 0. What is left of the victim is a candidate again.
    """
    page = s.numbers[numbers.PAGE]
    if s.numbers[numbers.BY_PAGE] == 0 or missing > s.length[row] - page:
        return np.int64(0)
    units = (missing + page - 1) // page * page
    shorten_row(s, row, units)
    offer(s, row)
    return units


@helper
def gather_victims(s, tokens, nodes, shortened, pool, pool_wide, starts, lengths, slots):
    """Copy the slots of the `nodes` rows freed last to `slots`, and then those behind the end of the row `shortened`.

    tokens: how many slots that are in all. If `pool` is 0, fill their pool ranges instead. Returns how many ranges.
    """
    step = 8 if pool_wide else 4
    first = s.numbers[numbers.FREE_ROWS] - nodes
    ranges = nodes + (shortened > 0)
    for at in range(ranges):
        row = s.free_rows[first + at] if at < nodes else shortened
        start, count = np.int64(s.start[row]), np.int64(s.length[row])
        if at == nodes:
            start, count = start + count, tokens
        if pool == 0:
            starts[at], lengths[at] = start, count
        else:
            copy_slots(pool + step * start, slots, pool_wide, count)
            slots += step * count
        tokens -= count
    return ranges


@helper
def _evict_in_order(s, scores, spare, missing):
    """Free the queue's rows until `missing` tokens are free; return (tokens, nodes, row that was shortened, or 0).

    spare: not what is wanted.
    """
    tokens = np.int64(0)
    nodes = np.int64(0)
    most = _FEW_PUT_BACK + s.numbers[numbers.ROWS] // 32
    while tokens < missing:
        at = first_at(s)
        if at < 0:
            break
        row, put_back = _take_first(s, at, scores, spare)
        most -= put_back
        if most == 0:
            refill_in_order(s, spare)
            most = np.int64(-1)  # not again in this call
        if row > 0:
            if s.wanted[row] > 0:
                end_wants(s, row)
            tail = _cut(s, row, missing - tokens)
            if tail > 0:
                return tokens + tail, nodes, row
            above = free_victim(s, row)
            if above > 0 and s.queued[above] == 0 and not (spare and s.wanted[above] > 0):
                push(s, above, _score(s, scores, above))
            tokens += s.length[row]
            nodes += 1
    return tokens, nodes, np.int64(0)


@helper
def _give_up(s, q, entry):
    """End the want of a waiting prompt, which wants anew what is left when the queue looks next; return its row."""
    row = np.int64(q.wants[entry])
    q.wants[entry] = NONE
    mark_dirty(q, entry)
    above = row
    while above > 0:
        s.wanted[above] -= 1
        above = np.int64(s.parent[above])
    return row


@helper
def _evict_of_waiting(s, q, missing):
    """Give up the waiting prompts from the last on, and free from below what nobody wants then, as _evict_in_order."""
    tokens = np.int64(0)
    nodes = np.int64(0)
    turn = q.counts[waiting.TURNS]
    while turn > 0 and tokens < missing:
        turn -= 1
        entry = np.int64(q.turns[turn])
        if q.wants[entry] != NONE and not has_left(q, turn):
            row = _give_up(s, q, entry)
            free = s.children[row] == 0 and s.lock_ref[row] == 0
            while free and row > 0 and s.wanted[row] == 0 and tokens < missing:
                tail = _cut(s, row, missing - tokens)
                if tail > 0:
                    return tokens + tail, nodes, row
                tokens += s.length[row]
                nodes += 1
                row = free_victim(s, row)
            if free and row > 0 and s.wanted[row] == 0:
                offer(s, row)
    return tokens, nodes, np.int64(0)


@fixed_types("(int64, int64, int64, int64[::1], int64, int64, boolean, int32[::1], int32[::1], int64)")
def evict(addresses, call, missing, scores, keeper, pool, pool_wide, starts, lengths, slots):
    """Free nodes until `missing` tokens are free or no candidate is left; return (tokens, nodes, pool ranges).

    By pages, the last node may lose only its last pages; it does not count as a node then.

    keeper: address of the table of the waiting queue that keeps what it wants, and has just looked; 0 if there is none.
    scores: int64 [rows], or [0] if the policy needs no scores or nothing is wanted. The freed slots are copied, in
    order, from the slot pool at the address `pool` to the address `slots`, with the same dtype. If `pool` is 0,
    `starts` and `lengths`, int32, get the pool ranges instead. Each array has space for all that may be freed. Nothing
    is allocated.
    """
    s = open_state(addresses)
    by_scores = missing > 0 and s.numbers[numbers.POLICY] == numbers.SCORES
    if by_scores:
        _fill_queue(s, scores, False)
    tokens, nodes, shortened = _evict_in_order(s, scores, True, missing)
    if tokens < missing and keeper != 0:
        more_tokens, more_nodes, shortened = _evict_of_waiting(s, open_waiting(keeper), missing - tokens)
        tokens, nodes = tokens + more_tokens, nodes + more_nodes
    if tokens < missing and tokens < s.numbers[numbers.EVICTABLE]:
        _fill_queue(s, scores, True)
        more_tokens, more_nodes, shortened = _evict_in_order(s, scores, False, missing - tokens)
        tokens, nodes = tokens + more_tokens, nodes + more_nodes
    s.numbers[numbers.EVICTABLE] -= tokens
    if by_scores:
        _empty_queue(s)
    ranges = gather_victims(s, tokens, nodes, shortened, pool, pool_wide, starts, lengths, slots)
    note_change(s, call, numbers.EVICTED, shortened, tokens, ranges)
    return tokens, nodes, ranges
