"""Evict: free childless, unlocked nodes in the order of the policy until enough tokens are free."""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.jit import helper, kernel, open_state
from flatradix.kernels.cpu.queue import clear, drop, first_place, push, run_place, score_of
from flatradix.kernels.cpu.rows import free_row
from flatradix.layout import FREE_ROW


@helper
def _score(s, scores, row):
    if s.meta[meta.POLICY] == meta.SCORES:
        return scores[row]
    return score_of(s, row)


@helper
def _fill_queue(s, scores):
    """Enter every candidate, for policies whose scores are made anew for each eviction."""
    for row in range(1, s.meta[meta.ROWS]):
        if s.parent[row] != FREE_ROW and s.children[row] == 0 and s.lock_ref[row] == 0:
            push(s, row, scores[row])


@helper
def _empty_queue(s):
    for place in range(s.meta[meta.HEAP]):
        s.queued[s.queue_row[place]] = 0
    for index in range(s.meta[meta.RUN]):
        s.queued[s.queue_row[run_place(s, index)]] = 0
    clear(s)


@helper
def _detach(s, row, scores):
    """Take a victim from its parent, which may become a candidate, or its namespace, which may be empty now."""
    parent = s.parent[row]
    if parent >= 0:
        s.children[parent] -= 1
        if s.children[parent] == 0 and s.lock_ref[parent] == 0 and s.queued[parent] == 0:
            push(s, parent, _score(s, scores, parent))
        return
    namespace = ~np.int64(parent)
    s.namespace_children[namespace] -= 1
    if s.namespace_children[namespace] == 0 and namespace != 0:
        s.released[s.meta[meta.RELEASED]] = namespace
        s.meta[meta.RELEASED] += 1


@helper
def _take_first(s, place, scores):
    """Take the entry at `place` out; returns its row if it can be evicted now, else 0.

    An entry whose row has been used since is put back where it belongs by now.
    """
    row = np.int64(s.queue_row[place])
    score = s.queue_score[place]
    tick = s.queue_tick[place]
    drop(s, place)
    if s.children[row] > 0 or s.lock_ref[row] > 0:
        return np.int64(0)
    if score == _score(s, scores, row) and tick == s.tick[row]:
        return row
    push(s, row, _score(s, scores, row))
    return np.int64(0)


@kernel
def evict(table, wanted, scores):
    """Free nodes until `wanted` tokens are free or no candidate is left; returns (tokens, nodes).

    The rows freed are the last `nodes` entries of `free_rows`, in order. `scores` int64 [rows], or [0] for the policies
    that the queue knows.
    """
    s = open_state(table)
    if s.meta[meta.POLICY] == meta.SCORES:
        _fill_queue(s, scores)
    tokens = np.int64(0)
    nodes = 0
    while tokens < wanted:
        place = first_place(s)
        if place < 0:
            break
        row = _take_first(s, place, scores)
        if row > 0:
            _detach(s, row, scores)
            free_row(s, row)
            tokens += s.length[row]
            nodes += 1
    s.meta[meta.EVICTABLE] -= tokens
    if s.meta[meta.POLICY] == meta.SCORES:
        _empty_queue(s)
    return tokens, nodes
