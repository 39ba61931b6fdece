"""Which rows can be evicted, and the key of each. The lowest key goes first.

The effective key of a node is the greatest key in its subtree, so that no node goes before a node below it. Under lru
the tick of a node is already its effective key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flatradix.kernels.gpu.launch import Arrays, Kernel
from flatradix.kernels.gpu.rows import FREE
from flatradix.layout import numbers
from flatradix.layout.queries import Wants

# Above every key; ticks grow by two with each query.
HIGHEST = tl.constexpr((1 << 62) - 1)
# Rows that a program handles at once: 8 for each thread of 16 warps.
BLOCK = tl.constexpr(4096)
CLIMBERS = tl.constexpr(256)


@triton.jit
def keys_of(s, w, BY_TICK: tl.constexpr):
    if BY_TICK:
        return s.tick
    else:
        return w.eviction_key


@triton.jit
def is_evictable(s, row, there):
    parent = tl.load(s.parent + row, mask=there, other=FREE)
    locks = tl.load(s.lock_ref + row, mask=there, other=1)
    return (parent != FREE) & (locks == 0) & (row > 0)


@triton.jit
def evictable_block(s, w, base, capacity, BY_TICK: tl.constexpr):
    """Return (rows, their keys, which rows are evictable) of the block at `base`.

    Rows that were never used are read too, and count as free: a mask would turn four loads into sixteen.
    """
    row = base + tl.arange(0, BLOCK)
    keys = keys_of(s, w, BY_TICK) + row
    if base + BLOCK <= capacity:
        parent = tl.load(s.parent + row)
        locks = tl.load(s.lock_ref + row)
        key = tl.load(keys)
    else:
        parent = tl.load(s.parent + row, mask=row < capacity, other=FREE)
        locks = tl.load(s.lock_ref + row, mask=row < capacity, other=1)
        key = tl.load(keys, mask=row < capacity, other=0)
    return row, key, (parent != FREE) & (locks == 0) & (row > 0)


@triton.jit(do_not_specialize=["rows"])
def climb_kernel(s, w, rows: tl.int32, PINNED: tl.constexpr):
    """Raise the keys of all rows above each evictable row at least to its own key.

    A lane stops at a locked row, and at a row whose key another lane has raised as far: that lane continues upwards.
    PINNED: a lane from a row without soft pins stops below a row with some, which goes when no such rows are left.
    """
    row = tl.program_id(0) * CLIMBERS + tl.arange(0, CLIMBERS)
    climbs = is_evictable(s, row, row < rows)
    key = tl.load(w.eviction_key + row, mask=climbs, other=0)
    above = tl.load(s.parent + row, mask=climbs, other=-1)
    climbs = climbs & (above >= 0)
    if PINNED:
        pinned = tl.load(s.wanted + row, mask=climbs, other=0) > 0
        climbs = climbs & (pinned | (tl.load(s.wanted + above, mask=climbs, other=0) == 0))
    while tl.max(climbs.to(tl.int32)) > 0:
        locks = tl.load(s.lock_ref + above, mask=climbs, other=1)
        known = tl.load(w.eviction_key + above, mask=climbs, other=0)
        parent = tl.load(s.parent + above, mask=climbs, other=-1)
        climbs = climbs & (locks == 0) & (known < key)
        before = tl.atomic_max(w.eviction_key + above, key, mask=climbs, sem="relaxed")
        climbs = climbs & (before < key) & (parent >= 0)
        above = tl.where(climbs, parent, 0)
        if PINNED:
            climbs = climbs & (pinned | (tl.load(s.wanted + above, mask=climbs, other=0) == 0))


_climb = Kernel(climb_kernel, ["i32"])


# The class of a key lies above all ranks and ticks: nodes that nobody wants, those of waiting prompts, soft pins.
CLASS = tl.constexpr(1 << 60)
NO_TURN = tl.constexpr((1 << 31) - 1)


@triton.jit(do_not_specialize=["ends", "order", "count"])
def turns_kernel(s, w, ends, order, count: tl.int32):
    """Lower the turn of each row on a waiting prompt's path to the prompt's place in the order."""
    place = tl.program_id(0) * CLIMBERS + tl.arange(0, CLIMBERS)
    entry = tl.load(order + place, mask=place < count, other=0)
    row = tl.load(ends + entry, mask=place < count, other=0)
    turns = w.victims + tl.load(s.numbers + numbers.ROW_CAPACITY)
    while tl.max(row) > 0:
        on = row > 0
        parent = tl.load(s.parent + row, mask=on, other=0)
        before = tl.atomic_min(turns + row, place, mask=on, sem="relaxed")
        # The rows above a row with a lower turn have one, too: from the lane that lowered it.
        row = tl.where(on & (before > place), tl.maximum(parent, 0), 0)


@triton.jit(do_not_specialize=["rows", "count"])
def classes_kernel(s, w, rows: tl.int32, count: tl.int32, WAITING: tl.constexpr, BY_TICK: tl.constexpr):
    row = tl.program_id(0) * CLIMBERS + tl.arange(0, CLIMBERS)
    there = row < rows
    key = tl.load(keys_of(s, w, BY_TICK) + row, mask=there, other=0)
    pinned = tl.load(s.wanted + row, mask=there, other=0) > 0
    if WAITING:
        turns = w.victims + tl.load(s.numbers + numbers.ROW_CAPACITY)
        turn = tl.load(turns + row, mask=there, other=NO_TURN)
        key = tl.where((turn < NO_TURN) & ~pinned, CLASS + (count - turn).to(tl.int64), key)
    tl.store(w.eviction_key + row, tl.where(pinned, 2 * CLASS + key, key), mask=there)


_turns = Kernel(turns_kernel, ["*i32", "*i32", "i32"])
_classes = Kernel(classes_kernel, ["i32", "i32"])


def classify(arrays: Arrays, wants: Wants, by_tick: bool) -> None:
    """Fill `scratch.eviction_key` so that unwanted nodes go first, then those of waiting prompts, then soft pins.

    The prompts at the front of the queue's order keep their nodes longest. by_tick: the ticks are the keys within a
    class, else what `effective_keys` has left. Overwrites `scratch.victims[1]`.
    """
    rows, count = arrays.rows, wants.waiting
    if count:
        arrays.scratch.victims[1].fill_(NO_TURN.value)
        _turns(arrays, -(-count // CLIMBERS.value), (wants.rows, wants.order, count))
    _classes(arrays, -(-rows // CLIMBERS.value), (rows, count), (count > 0, by_tick))


def effective_keys(arrays: Arrays, scores: torch.Tensor, pinned: bool) -> None:
    """Fill `scratch.eviction_key` with the highest rank in each node's subtree. Ranks follow the order (score, tick).

    scores: int64, one a row; those of free rows are arbitrary. pinned: whether there are soft pins: of a subtree with
    soft pins, only its nodes with soft pins count. Takes 0.9 ms for a million rows on an H200, nearly all
    of it in two sorts. Nodes with equal score and tick lie on one path, where the order of their ranks does not matter.
    """
    rows = scores.shape[0]
    order = torch.argsort(arrays.state.tick[:rows], stable=True)
    order = order[torch.argsort(scores[order], stable=True)]
    arrays.scratch.eviction_key[:rows].scatter_(0, order, torch.arange(rows, device=scores.device))
    _climb(arrays, -(-rows // CLIMBERS.value), (rows,), (pinned,))
