"""The eviction queue: candidate rows in the order (score, tick), kept up lazily.

A row enters when it becomes childless and unlocked, once (`queued`). Its score and tick only ever grow under the
policies that use the queue, so an entry is never too late: whoever takes it looks again, and puts it back if the row
has been used since. A look-up thus costs the queue nothing.

Most rows come in order (under lru all that are inserted do): they are appended to a sorted run, a ring in the upper
half of the queue's arrays, and taken from its front. The others go to a min-heap in the lower half. So an eviction is
O(1) a node mostly and O(log n) at worst, whatever the size of the tree.
"""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.jit import helper


@helper
def score_of(s, row):
    """What the built-in policies order by, before the tick; smaller goes first (SGLang's evict_policy.py)."""
    policy = s.meta[meta.POLICY]
    if policy == meta.LFU:
        return np.int64(s.hit_count[row])
    if policy == meta.SLRU:
        return np.int64(s.hit_count[row] >= s.meta[meta.THRESHOLD])
    if policy == meta.FIFO:
        return s.created[row]
    if policy == meta.FILO:
        return -s.created[row]
    if policy == meta.PRIORITY:
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
def run_place(s, index):
    """Where the entry of the run with that index stands."""
    capacity = s.meta[meta.ROW_CAPACITY]
    place = s.meta[meta.RUN_HEAD] + index
    if place >= capacity:
        place -= capacity
    return capacity + place


@helper
def push(s, row, score):
    s.queued[row] = 1
    tick = s.tick[row]
    count = s.meta[meta.RUN]
    if count == 0 or not _before(s, score, tick, row, run_place(s, count - 1)):
        _set(s, run_place(s, count), score, tick, row)
        s.meta[meta.RUN] = count + 1
    else:
        _push_heap(s, score, tick, row)


@helper
def _push_heap(s, score, tick, row):
    place = s.meta[meta.HEAP]
    s.meta[meta.HEAP] = place + 1
    while place > 0:
        above = (place - 1) // meta.HEAP_ARITY
        if not _before(s, score, tick, row, above):
            break
        _move(s, above, place)
        place = above
    _set(s, place, score, tick, row)


@helper
def _first_below(s, place, size):
    """The first in order of the heap's entries right below `place`, or -1."""
    child = meta.HEAP_ARITY * place + 1
    if child >= size:
        return -1
    best = child
    for other in range(child + 1, min(child + meta.HEAP_ARITY, size)):
        if _before(s, s.queue_score[other], s.queue_tick[other], s.queue_row[other], best):
            best = other
    return best


@helper
def _pop_heap(s):
    size = s.meta[meta.HEAP] - 1
    s.meta[meta.HEAP] = size
    if size == 0:
        return
    score, tick, row = s.queue_score[size], s.queue_tick[size], s.queue_row[size]
    place = 0
    while True:
        below = _first_below(s, place, size)
        if below < 0 or _before(s, score, tick, row, below):
            break
        _move(s, below, place)
        place = below
    _set(s, place, score, tick, row)


@helper
def first_place(s):
    """Where the first entry in order stands, or -1."""
    heap = s.meta[meta.HEAP]
    if s.meta[meta.RUN] == 0:
        return 0 if heap > 0 else -1
    front = run_place(s, 0)
    if heap > 0 and _before(s, s.queue_score[0], s.queue_tick[0], s.queue_row[0], front):
        return 0
    return front


@helper
def drop(s, place):
    """Take the first entry out, which stands at `place`."""
    s.queued[s.queue_row[place]] = 0
    if place == 0:
        _pop_heap(s)
        return
    s.meta[meta.RUN] -= 1
    head = s.meta[meta.RUN_HEAD] + 1
    s.meta[meta.RUN_HEAD] = head if head < s.meta[meta.ROW_CAPACITY] else 0


@helper
def clear(s):
    """Forget all entries, leaving their rows marked."""
    s.meta[meta.HEAP] = 0
    s.meta[meta.RUN] = 0
    s.meta[meta.RUN_HEAD] = 0


@helper
def offer(s, row):
    """Enter a row that has become a candidate, unless the policy scores all rows at each eviction."""
    if s.queued[row] == 0 and s.meta[meta.POLICY] != meta.SCORES:
        push(s, row, score_of(s, row))
