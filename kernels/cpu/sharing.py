"""Exact count of the new units that the queries of one insert batch share with one another.

Needed only if the new parts of all queries together do not fit: with sharing, the batch may still fit.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper
from flatradix.kernels.cpu.units import token_at
from flatradix.layout import numbers


@helper
def _common(s, a, b, keys, wide, namespaces, rows, reached, ends, starts):
    """Compare the new parts of two queries; return (units in common, in whole pages; whether `a` goes first).

    New parts can share units only if both queries leave the tree at the same place. Any fixed order serves that puts
    equal beginnings next to one another.
    """
    root_a = ~namespaces[a] if rows[a] == 0 else rows[a]
    root_b = ~namespaces[b] if rows[b] == 0 else rows[b]
    if root_a != root_b:
        return np.int64(0), root_a < root_b
    if reached[a] != reached[b]:
        return np.int64(0), reached[a] < reached[b]
    from_a = reached[a] - starts[a]
    from_b = reached[b] - starts[b]
    bigram = s.numbers[numbers.BIGRAM]
    units_a = np.int64(ends[a] - reached[a])
    units_b = np.int64(ends[b] - reached[b])
    shorter = min(units_a, units_b)
    tokens = shorter + bigram if shorter > 0 else 0
    for j in range(tokens):
        x = token_at(keys[a], wide, from_a + j)
        y = token_at(keys[b], wide, from_b + j)
        if x != y:
            units = max(j - bigram, 0)
            return units - units % s.numbers[numbers.PAGE], x < y
    return shorter, units_a < units_b


@helper
def _sift(order, at, size, s, keys, wide, namespaces, rows, reached, ends, starts):
    """Sift one entry down, in a heap sort that has the last query in order on top."""
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size:
            _, first = _common(s, order[child], order[child + 1], keys, wide, namespaces, rows, reached, ends, starts)
            if first:
                child += 1
        _, first = _common(s, order[at], order[child], keys, wide, namespaces, rows, reached, ends, starts)
        if not first:
            return
        order[at], order[child] = order[child], order[at]
        at = child


@helper
def shared_units(s, keys, wide, namespaces, rows, reached, ends, starts):
    """Return how many units the batch saves by sharing: a unit that is new in n queries counts n - 1 times.

    In sorted order, no earlier query shares more with a query than the one right before it.
    """
    count = len(keys)
    order = np.arange(count)
    for at in range(count // 2 - 1, -1, -1):
        _sift(order, at, count, s, keys, wide, namespaces, rows, reached, ends, starts)
    for size in range(count - 1, 0, -1):
        order[0], order[size] = order[size], order[0]
        _sift(order, 0, size, s, keys, wide, namespaces, rows, reached, ends, starts)
    total = np.int64(0)
    for at in range(1, count):
        common, _ = _common(s, order[at - 1], order[at], keys, wide, namespaces, rows, reached, ends, starts)
        total += common
    return total
