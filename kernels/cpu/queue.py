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

from flatradix.kernels.cpu.jit import helper
from flatradix.layout import numbers
from flatradix.layout.state import FREE_ROW


@helper
def score_of(s, row):
    """What the built-in policies order by, before the tick; smaller goes first (SGLang's evict_policy.py)."""
    policy = s.numbers[numbers.POLICY]
    if policy == numbers.LFU:
        return np.int64(s.hit_count[row])
    if policy == numbers.SLRU:
        return np.int64(s.hit_count[row] >= s.numbers[numbers.PROTECTED_THRESHOLD])
    if policy == numbers.FIFO:
        return s.created[row]
    if policy == numbers.FILO:
        return -s.created[row]
    if policy == numbers.PRIORITY:
        return s.priority[row]
    return np.int64(0)


@helper
def _before(s, score, tick, row, at):
    """Whether (score, tick, row) goes before the entry at `at`. Equal ticks are on one path: deeper goes first."""
    if score != s.queue_score[at]:
        return score < s.queue_score[at]
    if tick != s.queue_tick[at]:
        return tick < s.queue_tick[at]
    return s.end[row] > s.end[s.queue_row[at]]


@helper
def _set(s, at, score, tick, row):
    s.queue_score[at] = score
    s.queue_tick[at] = tick
    s.queue_row[at] = row


@helper
def _move(s, source, target):
    _set(s, target, s.queue_score[source], s.queue_tick[source], s.queue_row[source])


@helper
def run_at(s, index):
    """Where the entry of the run with that index stands."""
    capacity = s.numbers[numbers.ROW_CAPACITY]
    at = s.numbers[numbers.RUN_HEAD] + index
    if at >= capacity:
        at -= capacity
    return capacity + at


@helper
def push(s, row, score):
    s.queued[row] = 1
    tick = s.tick[row]
    count = s.numbers[numbers.RUN]
    if count == 0 or not _before(s, score, tick, row, run_at(s, count - 1)):
        _set(s, run_at(s, count), score, tick, row)
        s.numbers[numbers.RUN] = count + 1
    else:
        _push_heap(s, score, tick, row)


@helper
def _push_heap(s, score, tick, row):
    at = s.numbers[numbers.HEAP]
    s.numbers[numbers.HEAP] = at + 1
    while at > 0:
        above = (at - 1) // numbers.HEAP_ARITY
        if not _before(s, score, tick, row, above):
            break
        _move(s, above, at)
        at = above
    _set(s, at, score, tick, row)


@helper
def _first_below(s, at, size):
    """The first in order of the heap's entries right below `at`, or -1."""
    child = numbers.HEAP_ARITY * at + 1
    if child >= size:
        return -1
    best = child
    for other in range(child + 1, min(child + numbers.HEAP_ARITY, size)):
        if _before(s, s.queue_score[other], s.queue_tick[other], s.queue_row[other], best):
            best = other
    return best


@helper
def _pop_heap(s):
    size = s.numbers[numbers.HEAP] - 1
    s.numbers[numbers.HEAP] = size
    if size == 0:
        return
    score, tick, row = s.queue_score[size], s.queue_tick[size], s.queue_row[size]
    at = 0
    while True:
        below = _first_below(s, at, size)
        if below < 0 or _before(s, score, tick, row, below):
            break
        _move(s, below, at)
        at = below
    _set(s, at, score, tick, row)


@helper
def first_at(s):
    """Where the first entry in order stands, or -1."""
    heap = s.numbers[numbers.HEAP]
    if s.numbers[numbers.RUN] == 0:
        return 0 if heap > 0 else -1
    front = run_at(s, 0)
    if heap > 0 and _before(s, s.queue_score[0], s.queue_tick[0], s.queue_row[0], front):
        return 0
    return front


@helper
def drop(s, at):
    """Take the first entry out, which stands at `at`."""
    s.queued[s.queue_row[at]] = 0
    if at == 0:
        _pop_heap(s)
        return
    s.numbers[numbers.RUN] -= 1
    head = s.numbers[numbers.RUN_HEAD] + 1
    s.numbers[numbers.RUN_HEAD] = head if head < s.numbers[numbers.ROW_CAPACITY] else 0


@helper
def clear(s):
    """Forget all entries, leaving their rows marked."""
    s.numbers[numbers.HEAP] = 0
    s.numbers[numbers.RUN] = 0
    s.numbers[numbers.RUN_HEAD] = 0


@helper
def offer(s, row):
    """Enter a row that has become a candidate, unless the policy scores all rows at each eviction."""
    if s.queued[row] == 0 and s.numbers[numbers.POLICY] != numbers.SCORES:
        push(s, row, score_of(s, row))


@helper
def refill_queue(s):
    """Enter every candidate anew. O(rows), and O(log n) for each candidate that does not come in order."""
    clear(s)
    for row in range(1, s.numbers[numbers.ROWS]):
        s.queued[row] = 0
        if s.parent[row] != FREE_ROW and s.children[row] == 0 and s.lock_ref[row] == 0:
            offer(s, row)
