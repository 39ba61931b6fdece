"""Insert: store the part of each key that is not cached yet.

First, every query is walked and checked, and free pool units for the whole batch are found. The tree does not change
yet. Then the queries are carried out in order. Each walks on from the place that its first walk reached, and finds what
earlier queries of the batch have added or split there.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change, note_refusal
from flatradix.kernels.cpu.children import add_child, grow_table, tag_of
from flatradix.kernels.cpu.jit import fixed_types, helper, kernel, open_state
from flatradix.kernels.cpu.pool import find_free, mark
from flatradix.kernels.cpu.queue import offer, refill_queue
from flatradix.kernels.cpu.rows import free_row, handle_of, note_event, resolve, row_at, split_edge, take_row
from flatradix.kernels.cpu.sharing import shared_units
from flatradix.kernels.cpu.units import copy_checked, first_bad
from flatradix.kernels.cpu.walk import start_row, walk, whole_pages
from flatradix.layout import dropped, numbers, reasons
from flatradix.layout.handles import NO_HANDLE

made_below = helper(dropped.made_below)


@helper
def _plan(s, query, key, wide, tokens, namespace, named, start_handle, start):
    """Walk one query; return (row, length reached, length of the whole key). A negative row is a reason to refuse."""
    row = start_row(s, start_handle, start, namespace, named, key, wide, tokens)
    if row < 0:
        note_refusal(s, query, start)
        return row, start, start
    units = whole_pages(s, tokens)
    row, length = walk(s, key, wide, units, namespace, row, start)
    return row, length, start + units


@helper
def _refuse_outside(s, query, values, wide, begin, end, limit, reason):
    """Refuse the first value of `values[begin:end]` outside [0, limit]; return `reason`, or 0 if there is none."""
    bad = first_bad(values, wide, begin, end, limit)
    if bad < 0:
        return np.int64(0)
    note_refusal(s, query, bad)
    return np.int64(reason)


@helper
def _reserve(s, needed):
    """Find `needed` free units, move the cursor behind them, and return their start (0 if none), or the reason."""
    if s.numbers[numbers.EVICTABLE] + s.numbers[numbers.PROTECTED] + needed > s.numbers[numbers.MAX_TOKENS]:
        note_refusal(s, 0, needed)
        return np.int64(reasons.NO_CAPACITY)
    if needed == 0:
        return np.int64(0)
    target = find_free(s, needed)
    if target < 0:
        return np.int64(reasons.NO_POOL_SPACE)
    s.numbers[numbers.POOL_CURSOR] = (target + needed) // s.numbers[numbers.PAGE]
    return target


@helper
def _cut(s, row, length, tick):
    """End the edge of `row` at `length`; return the row that ends there."""
    if row == 0 or length == s.end[row]:
        return row
    upper = split_edge(s, row, length, tick)
    s.tick[row] = tick - 1
    return upper


@helper
def _add_leaf(s, parent, end, key, wide, count, target, tick, priority):
    """Add a node of `count` units below `parent`, a row or ~namespace; return its row. `key` begins with them.

    The caller writes the units and slots at `target` in the pools.
    """
    step = 8 if wide else 4
    row = take_row(s)
    s.parent[row] = parent
    s.start[row] = target
    s.length[row] = count
    s.end[row] = end
    s.children[row] = 0
    s.lock_ref[row] = 0
    s.own_locks[row] = 0
    s.wanted[row] = 0
    s.own_wants[row] = 0
    s.hit_count[row] = 0
    s.queued[row] = 0
    s.created[row] = tick if parent < 0 else made_below(s.created[parent], tick)
    s.priority[row] = priority
    tag = tag_of(s, key, key + step, wide, parent)
    add_child(s, row, tag)
    note_event(s, numbers.LEAF, parent, (row << 32) | tag)
    if parent >= 0:
        s.children[parent] += 1
    else:
        s.namespace_children[~parent] += 1
    mark(s, target, count, True)
    s.numbers[numbers.EVICTABLE] += count
    s.numbers[numbers.LONGEST] = max(s.numbers[numbers.LONGEST], count)
    return row


@helper
def _use_path(s, row, tick, priority, inserted):
    """Update tick, priority and hit count of each node on an insert's path.

    As in SGLang, a node that ends within `inserted` gets no hit: the request itself inserted it before.
    """
    row = np.int64(row)
    while row > 0:
        s.tick[row] = tick
        s.priority[row] = max(s.priority[row], priority)
        if s.end[row] > inserted and s.hit_count[row] < numbers.MAX_HITS:
            s.hit_count[row] += 1
        row = np.int64(s.parent[row])


@helper
def _insert_planned(s, row, length, end, key, wide, start, namespace, priority, inserted, target):
    """Insert one planned query; return (row of its end, length that was cached before).

    The units from that length to `end` get the pool range from `target` on, which `_store` fills.
    """
    s.numbers[numbers.CLOCK] += 2
    tick = s.numbers[numbers.CLOCK]
    row = row_at(s, row, length)
    step = 8 if wide else 4
    row, length = walk(s, key + step * (length - start), wide, end - length, namespace, row, length)
    grow_table(s, 2)
    row = _cut(s, row, length, tick)
    if length < end:
        parent = row if row > 0 else ~namespace
        new = key + step * (length - start)
        row = _add_leaf(s, parent, end, new, wide, end - length, target, tick, priority)
    _use_path(s, row, tick, priority, inserted)
    if length < end:
        offer(s, row)
    return row, length


@helper
def _store(s, key, wide, target, count, slots, slots_wide, pool, pool_wide, limit):
    """Write new units and their slots into the pools; return a negative number if a value is out of range.

    `key` and `slots` begin with the first new unit. If `pool` is 0, the caller stores the slots.
    """
    outside = copy_checked(key, wide, s.tokens + 4 * target, False, count, numbers.MAX_TOKEN)
    if s.numbers[numbers.BIGRAM] != 0:
        outside |= copy_checked(key + (8 if wide else 4), wide, s.seconds + 4 * target, False, count, numbers.MAX_TOKEN)
    if pool != 0:
        first = pool + (8 if pool_wide else 4) * target
        outside |= copy_checked(slots, slots_wide, first, pool_wide, count, limit)
    return outside


@helper
def _check(s, query, key, wide, slots, slots_wide, pool, limit, known, tokens):
    """Return 0, or the reason if a token from `known` on or any slot is out of range. Cached tokens are in range."""
    reason = _refuse_outside(s, query, key, wide, known, tokens, numbers.MAX_TOKEN, reasons.BAD_TOKEN)
    if reason == 0 and pool != 0:
        reason = _refuse_outside(s, query, slots, slots_wide, np.int64(0), tokens, limit, reasons.BAD_SLOT)
    return reason


@fixed_types(
    "(int64, int64, int64, boolean, int64, int64, boolean, "
    "int64, int64, int64, int64, int64, boolean, int64, boolean, int64)"
)
def insert_one(
    addresses, call, key, wide, tokens, namespace, named, start_handle, start, priority, inserted,
    slots, slots_wide, pool, pool_wide, limit,
):  # fmt: skip
    """Insert one key; return (length cached before, length of the whole key, handle, pool index of the new units).

    A negative first number is the reason why nothing changed; NO_POOL_SPACE asks for a compaction. The new units are
    copied to a free pool range and checked in the same pass. Only then does the tree change.
    """
    s = open_state(addresses)
    zero = np.int64(0)
    row, length, end = _plan(s, 0, key, wide, tokens, namespace, named, start_handle, start)
    if row < 0:
        return row, zero, zero, zero
    known = length - start
    target = _reserve(s, end - length)
    if target < 0:
        reason = _check(s, 0, key, wide, slots, slots_wide, pool, limit, known, tokens)
        if reason == 0:
            reason = target
        return reason, zero, zero, zero
    first = key + (8 if wide else 4) * known
    first_slot = slots + (8 if slots_wide else 4) * known
    outside = _store(s, first, wide, target, end - length, first_slot, slots_wide, pool, pool_wide, limit)
    good = outside >= 0 and first_bad(key, wide, end - start, tokens, numbers.MAX_TOKEN) < 0
    if pool != 0:
        good &= first_bad(slots, slots_wide, zero, known, limit) < 0
        good &= first_bad(slots, slots_wide, end - start, tokens, limit) < 0
    if not good:
        reason = _check(s, 0, key, wide, slots, slots_wide, pool, limit, known, tokens)
        if reason < 0:
            return reason, zero, zero, zero
    row, length = _insert_planned(s, row, length, end, key, wide, start, namespace, priority, inserted, target)
    handle = handle_of(s, row)
    note_change(s, call, numbers.INSERTED, handle, end, length)
    return length, end, handle, target


@helper
def insert_all(
    addresses, call, keys, wide, counts, namespaces, named, start_handles, start_lengths, priorities, inserted,
    slots, slots_wide, pool, pool_wide, limit, prefix_lengths, lengths, handles, pool_starts,
):  # fmt: skip
    """Do what `insert` does, for kernels that insert."""
    s = open_state(addresses)
    needed = np.int64(0)
    for query in range(len(keys)):
        start = np.int64(start_lengths[query]) if start_handles[query] != NO_HANDLE else np.int64(0)
        row, length, end = _plan(
            s, query, keys[query], wide, counts[query], namespaces[query], named[query], start_handles[query],
            start,
        )  # fmt: skip
        if row < 0:
            return row
        reason = _check(
            s, query, keys[query], wide, slots[query], slots_wide, pool, limit, length - start, counts[query]
        )
        if reason < 0:
            return reason
        handles[query] = row
        prefix_lengths[query] = np.int32(length)
        lengths[query] = np.int32(end)
        pool_starts[query] = start
        needed += end - length
    target = _reserve(s, needed)
    if target < 0:
        needed -= shared_units(s, keys, wide, namespaces, handles, prefix_lengths, lengths, pool_starts)
        target = _reserve(s, needed)
        if target < 0:
            return target
    for query in range(len(keys)):
        start = pool_starts[query]
        end = np.int64(lengths[query])
        row, length = _insert_planned(
            s, handles[query], np.int64(prefix_lengths[query]), end, keys[query], wide,
            start, namespaces[query], priorities[query], inserted[query], target,
        )  # fmt: skip
        first = keys[query] + (8 if wide else 4) * (length - start)
        first_slot = slots[query] + (8 if slots_wide else 4) * (length - start)
        _store(s, first, wide, target, end - length, first_slot, slots_wide, pool, pool_wide, limit)
        handles[query] = row
        prefix_lengths[query] = np.int32(length)
        pool_starts[query] = target
        target += end - length
    for query in range(len(keys)):
        handles[query] = handle_of(s, handles[query])
    note_change(s, call, numbers.INSERTED, 0, 0, 0)
    return np.int64(0)


@kernel
def insert(
    addresses, call, keys, wide, counts, namespaces, named, start_handles, start_lengths, priorities, inserted,
    slots, slots_wide, pool, pool_wide, limit, prefix_lengths, lengths, handles, pool_starts,
):  # fmt: skip
    """Insert a batch in order, all of it or nothing; return 0 or the reason.

    `keys` and `slots`, int64 [B], are addresses; `counts` are in tokens; `namespaces` are codes. Fills `prefix_lengths`
    and `lengths`, int32 [B], `handles`, int64 [B], and `pool_starts`, int64 [B]: the pool index of the new units.
    """
    return insert_all(
        addresses, call, keys, wide, counts, namespaces, named, start_handles, start_lengths, priorities, inserted,
        slots, slots_wide, pool, pool_wide, limit, prefix_lengths, lengths, handles, pool_starts,
    )  # fmt: skip


@helper
def _remove_leaf(s, row):
    """Free a node without locks and children; return its parent. Its entry in the queue stays."""
    parent = np.int64(s.parent[row])
    if parent >= 0:
        s.children[parent] -= 1
    else:
        s.namespace_children[~parent] -= 1
    s.numbers[numbers.EVICTABLE] -= s.length[row]
    free_row(s, row)
    return parent


@kernel
def take_back_insert(addresses, prefix_lengths, lengths, handles):
    """Remove the nodes that the last call inserted, given its results. O(rows).

    Cuts, ticks, priorities and hit counts remain. Goes from the last query to the first, and from the end of each up:
    the nodes that later queries added below a node are then gone.
    """
    s = open_state(addresses)
    for query in range(len(handles) - 1, -1, -1):
        row = resolve(s, handles[query], np.int64(lengths[query]))
        while row > 0 and s.end[row] - s.length[row] >= prefix_lengths[query]:
            row = _remove_leaf(s, row)
    refill_queue(s)
    note_change(s, 0, 0, 0, 0, 0)
