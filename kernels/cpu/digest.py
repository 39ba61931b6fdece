"""Digest: an order-independent hash of the logical tree. Row numbers and positions in the pools do not count.

The hash of a path is the sum of one term for each (position, unit). The path hash of a node is therefore its parent's
plus the sum of its own edge, and every order of work gives the same result. The digest is the sum of one term for each
node, 128 bits in two lanes.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper, int32_at, kernel, open_state
from flatradix.kernels.cpu.units import token_at
from flatradix.layout import hashing, numbers
from flatradix.layout.state import FREE_ROW

mix = helper(hashing.mix)


@helper
def _edge_sum(s, row, lane):
    """Return the sum of the terms of a node's own edge."""
    tokens = int32_at(s.tokens + 4 * np.int64(s.start[row]))
    seconds = int32_at(s.seconds + 4 * np.int64(s.start[row]))
    bigram = s.numbers[numbers.BIGRAM] != 0
    begin = np.int64(s.end[row] - s.length[row])
    total = np.int64(0)
    for j in range(np.int64(s.length[row])):
        unit = np.int64(tokens[j])
        if bigram:
            unit |= np.int64(seconds[j]) << 32
        total += mix(mix(unit + lane) + (begin + j))
    return total


@helper
def _path_sums(s, lane):
    """Return int64 [rows]: the hash of the path from the root to each node's end."""
    rows = s.numbers[numbers.ROWS]
    sums = np.zeros(rows, np.int64)
    order = np.empty(rows, np.int64)
    known = np.zeros(rows, np.int8)
    for first in range(1, rows):
        if s.parent[first] == FREE_ROW:
            continue
        depth = 0
        row = np.int64(first)
        while row > 0 and known[row] == 0:
            order[depth] = row
            depth += 1
            row = np.int64(s.parent[row])
        total = sums[row] if row > 0 else mix(s.namespace_hash[~row] + lane)
        for at in range(depth - 1, -1, -1):
            row = order[at]
            total += _edge_sum(s, row, lane)
            sums[row] = total
            known[row] = 1
    return sums


@helper
def _slot_sum(slots, wide, begin, count):
    total = np.int64(0)
    for j in range(count):
        total += mix(token_at(slots, wide, begin + j) + mix(np.int64(j)))
    return total


@kernel
def digest(addresses, slots, slots_wide, lane):
    """Return one lane of the digest, int64. `slots` is the address of the slot pool in host memory."""
    s = open_state(addresses)
    sums = _path_sums(s, lane)
    total = np.int64(0)
    for row in range(1, s.numbers[numbers.ROWS]):
        if s.parent[row] != FREE_ROW:
            term = mix(sums[row] + s.length[row])
            term = mix(term + _slot_sum(slots, slots_wide, np.int64(s.start[row]), np.int64(s.length[row])))
            term = mix(term + s.lock_ref[row])
            term = mix(term + s.own_locks[row])
            term = mix(term + s.tick[row])
            term = mix(term + s.created[row])
            term = mix(term + s.priority[row])
            total += mix(term + s.hit_count[row])
    return total
