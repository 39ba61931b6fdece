"""Insert: store the part of each key that is not cached yet.

First every query is walked and checked and the room for the whole batch is found, with nothing written. Then the
queries are carried out in order, each from the place that its first walk reached: what earlier queries of the batch
added or split since is found from there.
"""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels.cpu.children import add_child, make_room, tag_of
from flatradix.kernels.cpu.jit import helper, kernel, open_state
from flatradix.kernels.cpu.pool import find_room, mark
from flatradix.kernels.cpu.queue import offer
from flatradix.kernels.cpu.rows import handle_of, split, take_row
from flatradix.kernels.cpu.sharing import shared_units
from flatradix.kernels.cpu.units import copy_checked, first_bad
from flatradix.kernels.cpu.walk import begin, refuse, walk, whole_pages
from flatradix.layout import MAX_UNITS
from flatradix.refusals import BAD_SLOT, BAD_TOKEN, NO_CAPACITY, NO_ROOM


@helper
def _plan(s, query, key, wide, tokens, namespace, named, start_handle, start):
    """Walk one query; returns (row, length reached, length of the whole key), row negative if refused."""
    row = begin(s, start_handle, start, namespace, named, key, wide, tokens)
    if row < 0:
        refuse(s, query, start)
        return row, start, start
    units = whole_pages(s, tokens)
    row, length = walk(s, key, wide, units, namespace, row, start)
    return row, length, start + units


@helper
def _refuse_outside(s, query, values, wide, begin, end, limit, reason):
    """The reason, with the place of the first value of `values[begin:end]` outside [0, limit], or 0."""
    bad = first_bad(values, wide, begin, end, limit)
    if bad < 0:
        return np.int64(0)
    refuse(s, query, bad)
    return np.int64(reason)


@helper
def _reserve(s, needed):
    """Where `needed` units will go in the pool: 0 if none are needed, or why they cannot."""
    if s.meta[meta.EVICTABLE] + s.meta[meta.PROTECTED] + needed > s.meta[meta.MAX_TOKENS]:
        refuse(s, 0, needed)
        return np.int64(NO_CAPACITY)
    if needed == 0:
        return np.int64(0)
    place = find_room(s, needed)
    if place < 0:
        return np.int64(NO_ROOM)
    s.meta[meta.POOL_CURSOR] = (place + needed) // s.meta[meta.PAGE]
    return place


@helper
def _cut(s, row, length, tick):
    """End the edge of `row` at `length`; returns the row that ends there."""
    if row == 0 or length == s.end[row]:
        return row
    upper = split(s, row, length, tick)
    s.tick[row] = tick - 1
    return upper


@helper
def _add_leaf(s, parent, end, key, wide, count, place, tick, priority):
    """A new node of `count` units behind `parent`, a row or a namespace's code; `key` begins with its first unit.

    What the pools hold at `place` is the caller's to write.
    """
    step = 8 if wide else 4
    row = take_row(s)
    s.parent[row] = parent
    s.start[row] = place
    s.length[row] = count
    s.end[row] = end
    s.children[row] = 0
    s.lock_ref[row] = 0
    s.own_locks[row] = 0
    s.hit_count[row] = 0
    s.queued[row] = 0
    s.created[row] = tick
    s.priority[row] = priority
    add_child(s, row, tag_of(s, key, key + step, wide, parent))
    if parent >= 0:
        s.children[parent] += 1
    else:
        s.namespace_children[~parent] += 1
    mark(s, place, count, True)
    s.meta[meta.EVICTABLE] += count
    return row


@helper
def _use_path(s, row, tick, priority, inserted):
    """What an insert does to each node of its path: SGLang counts no hit on what the request itself had inserted."""
    row = np.int64(row)
    while row > 0:
        s.tick[row] = tick
        s.priority[row] = max(s.priority[row], priority)
        if s.end[row] > inserted and s.hit_count[row] < MAX_UNITS:
            s.hit_count[row] += 1
        row = np.int64(s.parent[row])


@helper
def _carry_out(s, row, length, end, key, wide, start, namespace, priority, inserted, place):
    """Insert one planned query; returns (row of its end, length that was there).

    Units of the key from the length that was there to `end` are put at `place` in the pool.
    """
    s.meta[meta.CLOCK] += 2
    tick = s.meta[meta.CLOCK]
    while row > 0 and s.end[row] - s.length[row] >= length:
        row = np.int64(s.parent[row])
    step = 8 if wide else 4
    row, length = walk(s, key + step * (length - start), wide, end - length, namespace, max(row, 0), length)
    make_room(s, 2)
    row = _cut(s, row, length, tick)
    if length < end:
        parent = row if row > 0 else ~namespace
        new = key + step * (length - start)
        row = _add_leaf(s, parent, end, new, wide, end - length, place, tick, priority)
    _use_path(s, row, tick, priority, inserted)
    if length < end:
        offer(s, row)
    return row, length


@helper
def _store(s, key, wide, place, count, slots, slots_wide, pool, pool_wide, limit):
    """Write new units and their slots into the pools; negative if a value is out of range.

    `key` and `slots` begin with the first that is new. `pool` 0: the slots are stored by somebody else.
    """
    outside = copy_checked(key, wide, s.tokens + 4 * place, False, count, MAX_UNITS)
    if s.meta[meta.BIGRAM] != 0:
        outside |= copy_checked(key + (8 if wide else 4), wide, s.seconds + 4 * place, False, count, MAX_UNITS)
    if pool != 0:
        target = pool + (8 if pool_wide else 4) * place
        outside |= copy_checked(slots, slots_wide, target, pool_wide, count, limit)
    return outside


@helper
def _check(s, query, key, wide, slots, slots_wide, pool, limit, known, tokens):
    """0, or the reason: a token from `known` on, or any slot, is out of range. What is cached already is in range."""
    reason = _refuse_outside(s, query, key, wide, known, tokens, MAX_UNITS, BAD_TOKEN)
    if reason == 0 and pool != 0:
        reason = _refuse_outside(s, query, slots, slots_wide, np.int64(0), tokens, limit, BAD_SLOT)
    return reason


@kernel
def insert_one(
    table, key, wide, tokens, namespace, named, start_handle, start, priority, inserted,
    slots, slots_wide, pool, pool_wide, limit,
):  # fmt: skip
    """Insert one key; returns (length that was there, length of the whole key, handle, place of the rest in the pool).

    A negative first number is the reason why nothing changed; NO_ROOM asks for a compaction. What is new is copied to
    free units and checked on the way; only then does the tree take it.
    """
    s = open_state(table)
    zero = np.int64(0)
    row, length, end = _plan(s, 0, key, wide, tokens, namespace, named, start_handle, start)
    if row < 0:
        return row, zero, zero, zero
    known = length - start
    place = _reserve(s, end - length)
    if place < 0:
        reason = _check(s, 0, key, wide, slots, slots_wide, pool, limit, known, tokens)
        if reason == 0:
            reason = place
        return reason, zero, zero, zero
    first = key + (8 if wide else 4) * known
    first_slot = slots + (8 if slots_wide else 4) * known
    outside = _store(s, first, wide, place, end - length, first_slot, slots_wide, pool, pool_wide, limit)
    good = outside >= 0 and first_bad(key, wide, end - start, tokens, MAX_UNITS) < 0
    if pool != 0:
        good &= first_bad(slots, slots_wide, zero, known, limit) < 0
        good &= first_bad(slots, slots_wide, end - start, tokens, limit) < 0
    if not good:
        reason = _check(s, 0, key, wide, slots, slots_wide, pool, limit, known, tokens)
        if reason < 0:
            return reason, zero, zero, zero
    row, length = _carry_out(s, row, length, end, key, wide, start, namespace, priority, inserted, place)
    return length, end, handle_of(s, row), place


@kernel
def insert(
    table, keys, wide, counts, namespaces, named, start_handles, start_lengths, priorities, inserted,
    slots, slots_wide, pool, pool_wide, limit, prefix_lengths, lengths, handles, places,
):  # fmt: skip
    """Insert a batch in order, all of it or nothing; returns 0 or the reason.

    `keys` and `slots` int64 [B] are addresses, `counts` tokens, `namespaces` codes. Fills `prefix_lengths` and
    `lengths` int32 [B], `handles` int64 [B], and `places` int64 [B]: where the new units begin in the pool.
    """
    s = open_state(table)
    needed = np.int64(0)
    for query in range(len(keys)):
        start = np.int64(start_lengths[query]) if start_handles[query] != meta.NO_HANDLE else np.int64(0)
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
        places[query] = start
        needed += end - length
    place = _reserve(s, needed)
    if place < 0:
        needed -= shared_units(s, keys, wide, namespaces, handles, prefix_lengths, lengths, places)
        place = _reserve(s, needed)
        if place < 0:
            return place
    for query in range(len(keys)):
        start = places[query]
        end = np.int64(lengths[query])
        row, length = _carry_out(
            s, handles[query], np.int64(prefix_lengths[query]), end, keys[query], wide,
            start, namespaces[query], priorities[query], inserted[query], place,
        )  # fmt: skip
        first = keys[query] + (8 if wide else 4) * (length - start)
        first_slot = slots[query] + (8 if slots_wide else 4) * (length - start)
        _store(s, first, wide, place, end - length, first_slot, slots_wide, pool, pool_wide, limit)
        handles[query] = row
        prefix_lengths[query] = np.int32(length)
        places[query] = place
        place += end - length
    for query in range(len(keys)):
        handles[query] = handle_of(s, handles[query])
    return np.int64(0)
