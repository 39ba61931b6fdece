"""The slot pool in host memory: checking, writing and gathering KV slots, and the ranges of a path.

`pool` is an address; `pool_wide` and `wide` tell int64 from int32.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper, int32_at, int64_at, kernel, open_state
from flatradix.kernels.cpu.rows import resolve
from flatradix.kernels.cpu.units import first_bad
from flatradix.kernels.cpu.walk import refuse


@kernel
def check_slots(values, wide, counts, limit):
    """The first slot outside [0, limit] as (query, position), or (-1, -1). `values` int64 [B] are addresses."""
    for query in range(len(values)):
        bad = first_bad(values[query], wide, np.int64(0), counts[query], limit)
        if bad >= 0:
            return query, bad
    return -1, -1


@kernel
def check_slots_one(values, wide, count, limit):
    return first_bad(values, wide, np.int64(0), count, limit)


@helper
def _write(pool, pool_wide, place, values, wide, count):
    if pool_wide:
        out = int64_at(pool + 8 * place)
        if wide:
            broad = int64_at(values)
            for j in range(count):
                out[j] = broad[j]
        else:
            narrow = int32_at(values)
            for j in range(count):
                out[j] = narrow[j]
    else:
        small = int32_at(pool + 4 * place)
        if wide:
            broad = int64_at(values)
            for j in range(count):
                small[j] = np.int32(broad[j])
        else:
            narrow = int32_at(values)
            for j in range(count):
                small[j] = narrow[j]


@kernel
def write_slots_one(pool, pool_wide, place, values, wide, skip, count):
    """Write `count` slots from `values[skip:]` to pool unit `place` and on."""
    _write(pool, pool_wide, place, values + (8 if wide else 4) * skip, wide, count)


@kernel
def write_slots(pool, pool_wide, places, values, wide, skips, counts):
    for query in range(len(values)):
        step = 8 if wide else 4
        _write(pool, pool_wide, places[query], values[query] + step * skips[query], wide, counts[query])


@kernel
def gather_slots(pool, pool_wide, starts, lengths, out):
    """Concatenate the ranges (`starts`, `lengths`, int32 [N]) of the pool into `out` int64."""
    at = np.int64(0)
    for part in range(len(starts)):
        count = np.int64(lengths[part])
        start = np.int64(starts[part])
        if pool_wide:
            broad = int64_at(pool + 8 * start)
            for j in range(count):
                out[at + j] = broad[j]
        else:
            narrow = int32_at(pool + 4 * start)
            for j in range(count):
                out[at + j] = narrow[j]
        at += count


@kernel
def move_slots(pool, pool_wide, sources, targets, lengths):
    """Slide ranges down in ascending order: no target is above its source."""
    for part in range(len(sources)):
        count = np.int64(lengths[part])
        if pool_wide:
            broad = int64_at(pool)
            for j in range(count):
                broad[targets[part] + j] = broad[sources[part] + j]
        else:
            narrow = int32_at(pool)
            for j in range(count):
                narrow[targets[part] + j] = narrow[sources[part] + j]


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
