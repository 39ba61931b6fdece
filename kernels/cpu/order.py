"""Orders of a waiting queue: a stable sort by keys, turns for the oldest, and depth first through the tree."""

from __future__ import annotations

from typing import Any

import numpy as np

from flatradix.kernels.cpu.jit import helper, kernel

_DIGIT = 11


@helper
def _pass(keys, source, target, lowest, shift, counts):
    """Sort positions stably by one digit of their keys."""
    counts[:] = 0
    mask = np.uint64((1 << _DIGIT) - 1)
    for at in range(len(source)):
        counts[(np.uint64(keys[source[at]] - lowest) >> shift) & mask] += 1
    total = np.int64(0)
    for digit in range(1 << _DIGIT):
        count = counts[digit]
        counts[digit] = total
        total += count
    for at in range(len(source)):
        digit = (np.uint64(keys[source[at]] - lowest) >> shift) & mask
        target[counts[digit]] = source[at]
        counts[digit] += 1


@helper
def sort_positions(keys, order):
    """Sort the positions in `order`, int64 [N], stably by `keys`, int64. Radix sort: only the digits in use count."""
    if len(order) == 0:
        return
    lowest = highest = keys[order[0]]
    for at in order:
        lowest, highest = min(lowest, keys[at]), max(highest, keys[at])
    other = np.empty_like(order)
    counts = np.empty(1 << _DIGIT, np.int64)
    span = np.uint64(highest - lowest)
    shift = np.uint64(0)
    while shift < 64 and span >> shift > 0:
        _pass(keys, order, other, lowest, shift, counts)
        order[:] = other
        shift += np.uint64(_DIGIT)


@kernel
def sort_by(keys, order):
    """Sort the positions in `order`, int64 [N], stably by `keys`, int64."""
    sort_positions(keys, order)


@kernel
def with_oldest(order, classes, every, out):
    """Fill `out` with `order`, but let every `every`-th turn of a class go to its oldest position that is left.

    The oldest is the lowest position. order, out: int64 [N]. classes: int64 by position; those of one class stand
    together in `order`.
    """
    taken = np.zeros(len(order), np.bool_)
    begin = 0
    while begin < len(order):
        end = begin
        while end < len(order) and classes[order[end]] == classes[order[begin]]:
            end += 1
        by_age = np.sort(order[begin:end])
        next_in_order, oldest = begin, 0
        for turn in range(end - begin):
            while taken[order[next_in_order]]:
                next_in_order += 1
            while taken[by_age[oldest]]:
                oldest += 1
            chosen = by_age[oldest] if (turn + 1) % every == 0 else order[next_in_order]
            taken[chosen] = True
            out[begin + turn] = chosen
        begin = end


@helper
def _count_paths(parents, rows, local, weights, touched):
    """Count the prompts at or below each row; list the rows in the order in which prompts first touch them."""
    count = 0
    for at in range(len(rows)):
        row: Any = np.int64(rows[at])
        while row > 0:
            if local[row] == 0:
                touched[count] = row
                count += 1
                local[row] = count
                weights[count] = 0
            weights[local[row]] += 1
            row = np.int64(parents[row])
    return count


@helper
def _link_children(parents, local, weights, touched, first_child, next_child):
    """Link the children of each node: heavier first, of equal weight the one with the older prompt first."""
    count = len(touched)
    keys = np.empty(count, np.int64)
    for at in range(count):
        keys[at] = (np.int64(weights[at + 1]) << 32) | (count - at)
    order = np.arange(count)
    sort_positions(keys, order)
    for turn in range(count):
        child = order[turn] + 1
        above = parents[touched[child - 1]]
        node = local[above] if above > 0 else 0
        next_child[child] = first_child[node]
        first_child[node] = child


@helper
def _emit(first_child, next_child, first_prompt, next_prompt, out):
    """Write prompts depth first: those below a node, then those at the node."""
    stack = np.empty(len(first_child), np.int64)
    stack[0] = 0
    depth, count = 1, 0
    while depth > 0:
        node = stack[depth - 1]
        child = first_child[node]
        if child > 0:
            first_child[node] = next_child[child]
            stack[depth] = child
            depth += 1
            continue
        prompt = first_prompt[node]
        while prompt > 0:
            out[count] = prompt - 1
            count += 1
            prompt = next_prompt[prompt]
        depth -= 1


@kernel
def depth_first(parents, rows, out):
    """Fill `out`, int64 [N], with the positions of prompts, depth first through the tree. O(N x depth + rows touched).

    parents: int32 [R], of the tree. rows: int32 [N], the row at which each prompt ends, 0 for the root, oldest first.
    """
    local = np.zeros(len(parents), np.int32)
    room = np.int64(1)
    for at in range(len(rows)):
        above = np.int64(rows[at])
        while above > 0 and local[above] == 0:
            local[above] = 1
            room += 1
            above = np.int64(parents[above])
    local[:] = 0
    weights, touched = np.zeros(room, np.int64), np.empty(room, np.int64)
    count = _count_paths(parents, rows, local, weights, touched)
    first_child, next_child = np.zeros(room, np.int64), np.zeros(room, np.int64)
    _link_children(parents, local, weights, touched[:count], first_child, next_child)
    first_prompt, next_prompt = np.zeros(room, np.int64), np.zeros(len(rows) + 1, np.int64)
    for at in range(len(rows) - 1, -1, -1):
        node = local[rows[at]] if rows[at] > 0 else 0
        next_prompt[at + 1] = first_prompt[node]
        first_prompt[node] = at + 1
    _emit(first_child, next_child, first_prompt, next_prompt, out)
