"""The eviction queue: a 4-ary min-heap of candidate rows by (score, tick), kept up lazily.

A row enters when it becomes childless and unlocked, once (`queued`). Its score and tick only ever grow under the
policies that use the queue, so an entry is never too late: whoever takes it looks again, and puts it back if the row
has been used since. A look-up thus costs the queue nothing, and an eviction O(log n) whatever the size of the tree.
"""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.jit import helper

LRU, LFU, SLRU, FIFO, FILO, PRIORITY, SCORES = range(7)
ARITY = 4


@helper
def score_of(s, row):
    """What the built-in policies order by, before the tick; smaller goes first (SGLang's evict_policy.py)."""
    policy = s.meta[meta.POLICY]
    if policy == LFU:
        return np.int64(s.hit_count[row])
    if policy == SLRU:
        return np.int64(s.hit_count[row] >= s.meta[meta.THRESHOLD])
    if policy == FIFO:
        return s.created[row]
    if policy == FILO:
        return -s.created[row]
    if policy == PRIORITY:
        return s.priority[row]
    return np.int64(0)


@helper
def _before(s, score, tick, row, place):
    """Whether (score, tick, row) goes before the entry at `place`. Equal ticks are on one path: deeper goes first."""
    if score != s.queue_score[place]:
        return score < s.queue_score[place]
    if tick != s.queue_tick[place]:
        return tick < s.queue_tick[place]
    return s.end[row] > s.end[s.queue_row[place]]


@helper
def _set(s, place, score, tick, row):
    s.queue_score[place] = score
    s.queue_tick[place] = tick
    s.queue_row[place] = row


@helper
def _move(s, source, target):
    _set(s, target, s.queue_score[source], s.queue_tick[source], s.queue_row[source])


@helper
def push(s, row, score):
    s.queued[row] = 1
    tick = s.tick[row]
    place = s.meta[meta.QUEUE]
    s.meta[meta.QUEUE] = place + 1
    while place > 0:
        above = (place - 1) // ARITY
        if not _before(s, score, tick, row, above):
            break
        _move(s, above, place)
        place = above
    _set(s, place, score, tick, row)


@helper
def _first_below(s, place, size):
    """The first in order of the entries right below `place`, or -1."""
    child = ARITY * place + 1
    if child >= size:
        return -1
    best = child
    for other in range(child + 1, min(child + ARITY, size)):
        if _before(s, s.queue_score[other], s.queue_tick[other], s.queue_row[other], best):
            best = other
    return best


@helper
def sift_down(s, score, tick, row, size):
    """Put an entry into the hole at the top."""
    place = 0
    while True:
        below = _first_below(s, place, size)
        if below < 0 or _before(s, score, tick, row, below):
            break
        _move(s, below, place)
        place = below
    _set(s, place, score, tick, row)


@helper
def drop_top(s):
    """Take the first entry out."""
    s.queued[s.queue_row[0]] = 0
    size = s.meta[meta.QUEUE] - 1
    s.meta[meta.QUEUE] = size
    if size > 0:
        sift_down(s, s.queue_score[size], s.queue_tick[size], s.queue_row[size], size)


@helper
def offer(s, row):
    """Enter a row that has become a candidate, unless the policy scores all rows at each eviction."""
    if s.queued[row] == 0 and s.meta[meta.POLICY] != SCORES:
        push(s, row, score_of(s, row))
