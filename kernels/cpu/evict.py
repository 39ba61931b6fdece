"""Evict: free childless, unlocked nodes in the order of the policy until enough tokens are free."""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.jit import helper, kernel, open_state
from flatradix.kernels.cpu.queue import SCORES, drop_top, push, score_of, sift_down
from flatradix.kernels.cpu.rows import free_row
from flatradix.layout import FREE_ROW


@helper
def _score(s, scores, row):
    if s.meta[meta.POLICY] == SCORES:
        return scores[row]
    return score_of(s, row)


@helper
def _fill_queue(s, scores):
    """Enter every candidate, for policies whose scores are made anew for each eviction."""
    s.meta[meta.QUEUE] = 0
    for row in range(1, s.meta[meta.ROWS]):
        if s.parent[row] != FREE_ROW and s.children[row] == 0 and s.lock_ref[row] == 0:
            push(s, row, scores[row])


@helper
def _empty_queue(s):
    for place in range(s.meta[meta.QUEUE]):
        s.queued[s.queue_row[place]] = 0
    s.meta[meta.QUEUE] = 0


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
def _refresh_top(s, row, score):
    """Put the first entry where it belongs now; whether it stays first."""
    if score == s.queue_score[0] and s.tick[row] == s.queue_tick[0]:
        return True
    sift_down(s, score, s.tick[row], row, s.meta[meta.QUEUE])
    return False


@kernel
def evict(table, wanted, scores):
    """Free nodes until `wanted` tokens are free or no candidate is left; returns (tokens, nodes).

    The rows freed are the last `nodes` entries of `free_rows`, in order. `scores` int64 [rows], or [0] for the policies
    that the queue knows.
    """
    s = open_state(table)
    if s.meta[meta.POLICY] == SCORES:
        _fill_queue(s, scores)
    tokens = np.int64(0)
    nodes = 0
    while tokens < wanted and s.meta[meta.QUEUE] > 0:
        row = np.int64(s.queue_row[0])
        if s.children[row] > 0 or s.lock_ref[row] > 0:
            drop_top(s)
        elif _refresh_top(s, row, _score(s, scores, row)):
            drop_top(s)
            _detach(s, row, scores)
            free_row(s, row)
            tokens += s.length[row]
            nodes += 1
    s.meta[meta.EVICTABLE] -= tokens
    if s.meta[meta.POLICY] == SCORES:
        _empty_queue(s)
    return tokens, nodes
