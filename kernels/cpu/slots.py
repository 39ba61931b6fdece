"""The slots on paths. `pool` is the address of the slot pool in host memory: int64 if `pool_wide`, else int32."""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_refusal
from flatradix.kernels.cpu.jit import fixed_types, helper, kernel, open_state
from flatradix.kernels.cpu.rows import resolve
from flatradix.kernels.cpu.units import copy_checked, copy_slots
from flatradix.layout import numbers, reasons


@helper
def _copy_path(s, row, length, pool, pool_wide, target):
    """Copy the slots of one path to `target`, of the pool's dtype. Goes from the end of the path up."""
    step = 8 if pool_wide else 4
    while row > 0:
        begins = np.int64(s.end[row] - s.length[row])
        copy_slots(pool + step * np.int64(s.start[row]), target + step * begins, pool_wide, length - begins)
        length = begins
        row = np.int64(s.parent[row])


@fixed_types("(int64, int64, int64, int64, boolean, int64)")
def path_slots_one(addresses, handle, length, pool, pool_wide, target):
    """Copy the slots of one place to the address `target`, [length] of the pool's dtype; return 0, or the reason."""
    s = open_state(addresses)
    row = resolve(s, handle, length)
    if row < 0:
        note_refusal(s, 0, length)
        return row
    _copy_path(s, row, length, pool, pool_wide, target)
    return np.int64(0)


@helper
def _depth(s, row):
    depth = np.int64(0)
    while row > 0:
        depth += 1
        row = np.int64(s.parent[row])
    return depth


@kernel
def count_paths(addresses, handles, lengths):
    """Return (slots, nodes) on all paths of a batch. A negative first number is the reason of the first bad place."""
    s = open_state(addresses)
    slots = np.int64(0)
    nodes = np.int64(0)
    for query in range(len(handles)):
        length = np.int64(lengths[query])
        row = resolve(s, handles[query], length)
        if row < 0:
            note_refusal(s, query, length)
            return row, nodes
        slots += length
        nodes += _depth(s, row)
    return slots, nodes


@kernel
def path_slots(addresses, handles, lengths, pool, pool_wide, target):
    """Copy the slots of places that `count_paths` accepted, one after another, to the address `target`."""
    s = open_state(addresses)
    step = 8 if pool_wide else 4
    for query in range(len(handles)):
        length = np.int64(lengths[query])
        _copy_path(s, resolve(s, handles[query], length), length, pool, pool_wide, target)
        target += step * length


@helper
def _fill(s, row, length, starts, counts, end):
    """Write the ranges of one path to `starts` and `counts`, so that the last is at index `end` - 1."""
    while row > 0:
        end -= 1
        begins = np.int64(s.end[row] - s.length[row])
        starts[end] = s.start[row]
        counts[end] = length - begins
        length = begins
        row = np.int64(s.parent[row])


@kernel
def path_ranges(addresses, handles, lengths, starts, counts):
    """Fill `starts` and `counts` int32 [nodes] with the pool ranges of the paths, each from the root down."""
    s = open_state(addresses)
    end = np.int64(0)
    for query in range(len(handles)):
        length = np.int64(lengths[query])
        row = resolve(s, handles[query], length)
        end += _depth(s, row)
        _fill(s, row, length, starts, counts, end)


@fixed_types("(int64, int64, int64, int32[::1], int32[::1])")
def path_ranges_one(addresses, handle, length, starts, counts):
    """Fill the ranges of one path; return its number of nodes, or the reason. If they do not fit, write nothing."""
    s = open_state(addresses)
    row = resolve(s, handle, length)
    if row < 0:
        note_refusal(s, 0, length)
        return row
    nodes = _depth(s, row)
    if nodes <= len(starts):
        _fill(s, row, length, starts, counts, nodes)
    return nodes


@helper
def _check_row(s, query, length, handle, number, height, width):
    """Return 0, or the reason why a match cannot be written to row `number` of an engine's table."""
    row = resolve(s, handle, length)
    value = length
    if row >= 0:
        row = np.int64(0)
        if number < 0 or number >= height:
            row, value = np.int64(reasons.BAD_ROW), np.int64(number)
        elif length > width:
            row = np.int64(reasons.TOO_LONG)
    if row < 0:
        note_refusal(s, query, value)
    return row


@helper
def _write_path(s, row, length, pool, pool_wide, target, wide):
    """Copy the slots of one path to `target`, int64 if `wide`, else int32. Goes from the end of the path up."""
    while row > 0:
        begins = np.int64(s.end[row] - s.length[row])
        source = pool + (8 if pool_wide else 4) * np.int64(s.start[row])
        copy_checked(source, pool_wide, target + (8 if wide else 4) * begins, wide, length - begins, numbers.MAX_UNITS)
        length = begins
        row = np.int64(s.parent[row])


@kernel
def write_slots(addresses, handles, lengths, rows, pool, pool_wide, target, wide, stride, height, width):
    """Write the slots of each match to row `rows[i]` (int64 [B]) of an engine's table; return 0, or the reason.

    The table is at the address `target` and has `height` rows of `width` elements, `stride` elements apart. If one
    match is refused, nothing is written. If `pool` is 0, the matches are only checked.
    """
    s = open_state(addresses)
    for query in range(len(handles)):
        reason = _check_row(s, query, np.int64(lengths[query]), handles[query], rows[query], height, width)
        if reason < 0:
            return reason
    for query in range(len(handles) if pool != 0 else 0):
        length = np.int64(lengths[query])
        first = target + (8 if wide else 4) * stride * rows[query]
        _write_path(s, resolve(s, handles[query], length), length, pool, pool_wide, first, wide)
    return np.int64(0)
