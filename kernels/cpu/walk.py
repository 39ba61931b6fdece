"""The walk down along a key, and the way back up, which match, lock and insert share."""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.children import find_child
from flatradix.kernels.cpu.jit import helper
from flatradix.kernels.cpu.rows import resolve
from flatradix.kernels.cpu.units import common_tokens, token_at
from flatradix.layout import numbers, reasons
from flatradix.layout.handles import NO_HANDLE


@helper
def whole_pages(s, tokens):
    """Return how many units the whole pages of a key of `tokens` tokens hold."""
    units = tokens - s.numbers[numbers.BIGRAM]
    if units <= 0:
        return np.int64(0)
    return units - units % s.numbers[numbers.PAGE]


@helper
def _along_edge(s, row, at, key, wide, limit):
    """Return how many units, in whole pages, `key` shares with the edge of `row` from path length `at` on."""
    count = min(s.end[row] - at, limit)
    if count == 0:
        return np.int64(0)
    first = s.start[row] + s.length[row] - (s.end[row] - at)
    common = common_tokens(s.tokens + 4 * first, key, wide, count)
    if s.numbers[numbers.BIGRAM] != 0 and common > 0:
        step = 8 if wide else 4
        common = common_tokens(s.seconds + 4 * first, key + step, wide, common)
    return common - common % s.numbers[numbers.PAGE]


@helper
def walk(s, key, wide, units, namespace, row, at):
    """Follow `units` (whole pages) of `key` from (row, at); return the last row and the path length reached.

    `row` 0 stands for the root of `namespace`. Writes nothing. If the row ends beyond the returned length, only a part
    of its edge matches.
    """
    step = 8 if wide else 4
    done = np.int64(0)
    if row > 0:
        done = _along_edge(s, row, at, key, wide, units)
        if at + done < s.end[row]:
            return row, at + done
    elif namespace == numbers.UNKNOWN_NAMESPACE:
        return row, at
    parent = row if row > 0 else ~namespace
    while done < units:
        child, common = find_child(s, parent, key + step * done, wide, units - done)
        if child == 0:
            break
        row = child
        parent = child
        done += common
        if common < s.length[row]:
            break
    return row, at + done


@helper
def namespace_of(s, row):
    parent = np.int64(row)
    while parent >= 0:
        parent = np.int64(s.parent[parent])
    return ~parent


@helper
def start_row(s, handle, length, namespace, named, key, wide, tokens):
    """Return the row to walk from: the root without a handle, else the row where (handle, length) lies; or the reason.

    A start below the root has its own namespace. If the caller gave a namespace (`named`), it must be the same. With
    bigrams, the first token of the key must be the second token of the unit before the start.
    """
    if handle == NO_HANDLE:
        return np.int64(0)
    row = resolve(s, handle, length)
    if row <= 0:
        return row
    if named and namespace_of(s, row) != namespace:
        return np.int64(reasons.OTHER_NAMESPACE)
    if s.numbers[numbers.BIGRAM] != 0 and tokens > 0:
        last = s.start[row] + s.length[row] - (s.end[row] - length) - 1
        if token_at(s.seconds, False, last) != token_at(key, wide, 0):
            return np.int64(reasons.OTHER_TOKEN)
    return row


@helper
def touch_path(s, row, tick):
    row = np.int64(row)
    while row > 0:
        s.tick[row] = tick
        row = np.int64(s.parent[row])
