"""The slot pool in host memory, an address of int32 or (`pool_wide`) int64, and the ranges of a path in it."""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.jit import helper, kernel, open_state
from flatradix.kernels.cpu.rows import resolve
from flatradix.kernels.cpu.units import copy_checked
from flatradix.kernels.cpu.walk import refuse
from flatradix.refusals import BAD_ROW, TOO_LONG


@kernel
def gather_slots(pool, pool_wide, starts, lengths, out):
    """Concatenate the ranges (`starts`, `lengths`, int32 [N]) of the pool into `out` int64."""
    target = np.int64(out.ctypes.data)
    for part in range(len(starts)):
        count = np.int64(lengths[part])
        source = pool + (8 if pool_wide else 4) * np.int64(starts[part])
        copy_checked(source, pool_wide, target, True, count, 0)
        target += 8 * count


@helper
def _depth(s, row):
    depth = np.int64(0)
    while row > 0:
        depth += 1
        row = np.int64(s.parent[row])
    return depth


@kernel
def count_path_nodes(table, handles, lengths):
    """Nodes on the paths of a batch together, or the reason of the first bad handle."""
    s = open_state(table)
    total = np.int64(0)
    for query in range(len(handles)):
        row = resolve(s, handles[query], np.int64(lengths[query]))
        if row < 0:
            refuse(s, query, lengths[query])
            return row
        total += _depth(s, row)
    return total


@helper
def _fill(s, row, length, starts, counts, end):
    """Write the ranges of one path so that they end before place `end`."""
    while row > 0:
        end -= 1
        begins = np.int64(s.end[row] - s.length[row])
        starts[end] = s.start[row]
        counts[end] = length - begins
        length = begins
        row = np.int64(s.parent[row])


@kernel
def victim_ranges(table, starts, counts):
    """Fill `starts` and `counts` int32 [nodes] with the pool ranges of the rows that were freed last, in order."""
    s = open_state(table)
    nodes = len(starts)
    first = s.meta[meta.FREE_ROWS] - nodes
    for at in range(nodes):
        row = s.free_rows[first + at]
        starts[at] = s.start[row]
        counts[at] = s.length[row]


@kernel
def path_ranges(table, handles, lengths, starts, counts):
    """Fill `starts` and `counts` int32 [nodes] with the pool ranges of the paths, each from the root down."""
    s = open_state(table)
    end = np.int64(0)
    for query in range(len(handles)):
        length = np.int64(lengths[query])
        row = resolve(s, handles[query], length)
        end += _depth(s, row)
        _fill(s, row, length, starts, counts, end)


@kernel
def path_ranges_one(table, handle, length, starts, counts):
    """The same for one path; returns its nodes, with nothing written if there are more than places, or the reason."""
    s = open_state(table)
    row = resolve(s, handle, length)
    if row < 0:
        refuse(s, 0, length)
        return row
    nodes = _depth(s, row)
    if nodes <= len(starts):
        _fill(s, row, length, starts, counts, nodes)
    return nodes


@helper
def _check_row(s, query, length, handle, number, height, width):
    """0, or why a match cannot be written to row `number` of a table."""
    row = resolve(s, handle, length)
    value = length
    if row >= 0:
        row = np.int64(0)
        if number < 0 or number >= height:
            row, value = np.int64(BAD_ROW), np.int64(number)
        elif length > width:
            row = np.int64(TOO_LONG)
    if row < 0:
        refuse(s, query, value)
    return row


@helper
def _write_path(s, row, length, pool, pool_wide, target, wide):
    """Copy the slots of one path to `target`, from its end up."""
    while row > 0:
        begins = np.int64(s.end[row] - s.length[row])
        source = pool + (8 if pool_wide else 4) * np.int64(s.start[row])
        copy_checked(source, pool_wide, target + (8 if wide else 4) * begins, wide, length - begins, 0)
        length = begins
        row = np.int64(s.parent[row])


@kernel
def write_slots(table, handles, lengths, rows, pool, pool_wide, target, wide, stride, height, width):
    """Write the slots of each match into row `rows[i]` (int64 [B]) of a table at the address `target`.

    `height` rows of `width` elements, `stride` apart. All or nothing: returns 0, or the reason. `pool` 0: check only.
    """
    s = open_state(table)
    for query in range(len(handles)):
        reason = _check_row(s, query, np.int64(lengths[query]), handles[query], rows[query], height, width)
        if reason < 0:
            return reason
    for query in range(len(handles) if pool != 0 else 0):
        length = np.int64(lengths[query])
        place = target + (8 if wide else 4) * stride * rows[query]
        _write_path(s, resolve(s, handles[query], length), length, pool, pool_wide, place, wide)
    return np.int64(0)
