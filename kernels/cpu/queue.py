"""The eviction queue: candidate rows in the order (score, tick), updated lazily.

A row enters when it becomes childless, unlocked and unwanted, and has at most one entry (`queued`). Under the policies
that use the queue, its score and tick never fall, so its entry never comes too late. An eviction that removes an entry
compares it with the row, and enters the row again if it has been used since. A match therefore costs the queue nothing.

Most rows come in order (under lru, all inserted rows). They are appended to a sorted run, a ring in the upper half of
the queue's arrays, and removed from its front. The others go to a min-heap in the lower half. An eviction is therefore
mostly O(1) per node and O(log n) at worst, whatever the size of the tree.

If much of the tree has been used since it was entered, an eviction finds one entry after another that has to go back.
After the first of them it fills the queue anew instead, from all rows, and sorts the entries digit by digit. That is
O(rows): 20 to 30 ms for 500,000 leaves that were all used in random order, instead of 40 to 700 (one core of an EPYC).
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper
from flatradix.layout import numbers
from flatradix.layout.dropped import LOWEST
from flatradix.layout.state import FREE_ROW


@helper
def score_of(s, row):
    """Return the score of a row under a built-in policy, as in SGLang's evict_policy.py. The lowest goes first.

    What was dropped goes before all else.
    """
    if s.created[row] < 0:
        return np.int64(LOWEST)
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
    """Return whether (score, tick, row) goes before the entry at `at`.

    Rows with equal ticks are on one path: the deeper row goes first.
    """
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
    """Return the position of entry `index` of the run in the queue's arrays."""
    capacity = s.numbers[numbers.ROW_CAPACITY]
    at = s.numbers[numbers.RUN_HEAD] + index
    if at >= capacity:
        at -= capacity
    return capacity + at


@helper
def push(s, row, score):
    s.queued[row] = 1
    tick = s.tick[row]
    count = s.numbers[numbers.RUN_LENGTH]
    if count == 0 or not _before(s, score, tick, row, run_at(s, count - 1)):
        _set(s, run_at(s, count), score, tick, row)
        s.numbers[numbers.RUN_LENGTH] = count + 1
    else:
        _push_heap(s, score, tick, row)


@helper
def _push_heap(s, score, tick, row):
    at = s.numbers[numbers.HEAP_SIZE]
    s.numbers[numbers.HEAP_SIZE] = at + 1
    while at > 0:
        above = (at - 1) // numbers.HEAP_ARITY
        if not _before(s, score, tick, row, above):
            break
        _move(s, above, at)
        at = above
    _set(s, at, score, tick, row)


@helper
def _first_below(s, at, size):
    """Return the position of the first in order among the children of heap entry `at`, or -1."""
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
    size = s.numbers[numbers.HEAP_SIZE] - 1
    s.numbers[numbers.HEAP_SIZE] = size
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
    """Return the position of the queue's first entry, or -1."""
    heap = s.numbers[numbers.HEAP_SIZE]
    if s.numbers[numbers.RUN_LENGTH] == 0:
        return 0 if heap > 0 else -1
    front = run_at(s, 0)
    if heap > 0 and _before(s, s.queue_score[0], s.queue_tick[0], s.queue_row[0], front):
        return 0
    return front


@helper
def drop(s, at):
    """Remove the queue's first entry, which is at `at`."""
    s.queued[s.queue_row[at]] = 0
    if at == 0:
        _pop_heap(s)
        return
    s.numbers[numbers.RUN_LENGTH] -= 1
    head = s.numbers[numbers.RUN_HEAD] + 1
    s.numbers[numbers.RUN_HEAD] = head if head < s.numbers[numbers.ROW_CAPACITY] else 0


@helper
def clear(s):
    """Remove all entries. `queued` of their rows stays as it is."""
    s.numbers[numbers.HEAP_SIZE] = 0
    s.numbers[numbers.RUN_LENGTH] = 0
    s.numbers[numbers.RUN_HEAD] = 0


@helper
def offer(s, row):
    """Enter a row that has become a candidate, unless it has an entry or each eviction scores all rows."""
    if s.queued[row] == 0 and s.numbers[numbers.POLICY] != numbers.SCORES:
        push(s, row, score_of(s, row))


@helper
def _collect(s, spare):
    """Enter every candidate at the next position of the heap's arrays, in the order of rows; return how many.

    spare: not what is wanted.
    """
    count = 0
    for row in range(1, s.numbers[numbers.ROWS]):
        s.queued[row] = 0
        candidate = s.parent[row] != FREE_ROW and s.children[row] == 0 and s.lock_ref[row] == 0
        if candidate and not (spare and s.wanted[row] > 0):
            s.queued[row] = 1
            _set(s, count, score_of(s, row), s.tick[row], row)
            count += 1
    return count


@helper
def _sort_digit(s, keys, lowest, shift, source, target, count):
    """Sort `count` entries from position `source` on stably by one digit of their keys, to position `target` on."""
    digits, mask = s.queue_digits, np.uint64((1 << numbers.DIGIT_BITS) - 1)
    for digit in range(1 << numbers.DIGIT_BITS):
        digits[digit] = 0
    for at in range(source, source + count):
        digits[np.int64((np.uint64(keys[at] - lowest) >> shift) & mask)] += 1
    place = np.int64(target)
    for digit in range(1 << numbers.DIGIT_BITS):
        place, digits[digit] = place + digits[digit], place
    for at in range(source, source + count):
        digit = np.int64((np.uint64(keys[at] - lowest) >> shift) & mask)
        _move(s, at, digits[digit])
        digits[digit] += 1


@helper
def _sort_by(s, keys, source, target, count):
    """Sort entries stably by `keys`, with the other arrays' half as memory; return (where they are, the other half)."""
    lowest = highest = keys[source]
    for at in range(source, source + count):
        lowest, highest = min(lowest, keys[at]), max(highest, keys[at])
    span = np.uint64(highest - lowest)
    shift = np.uint64(0)
    while shift < 64 and span >> shift > 0:
        _sort_digit(s, keys, lowest, shift, source, target, count)
        source, target = target, source
        shift += np.uint64(numbers.DIGIT_BITS)
    return source, target


@helper
def refill_in_order(s, spare):
    """Empty the queue and enter every candidate, all in the sorted run. O(rows). spare: not what is wanted.

    Two candidates never have equal ticks: rows with equal ticks are on one path, and a candidate has no children.
    """
    clear(s)
    count = _collect(s, spare)
    if count == 0:
        return
    heap, run = np.int64(0), np.int64(s.numbers[numbers.ROW_CAPACITY])
    heap, run = _sort_by(s, s.queue_tick, heap, run, count)
    heap, run = _sort_by(s, s.queue_score, heap, run, count)
    if heap == 0:
        for at in range(count):
            _move(s, at, run + at)
    s.numbers[numbers.RUN_LENGTH] = count


@helper
def refill_queue(s):
    """Empty the queue and enter every candidate. O(rows), and O(log n) for each candidate that is not in order."""
    clear(s)
    for row in range(1, s.numbers[numbers.ROWS]):
        s.queued[row] = 0
        if s.parent[row] != FREE_ROW and s.children[row] == 0 and s.lock_ref[row] == 0 and s.wanted[row] == 0:
            offer(s, row)
