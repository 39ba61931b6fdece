"""The entries of a waiting queue, and the lists in which they stand: by age, in the queue's order, at a row, by key."""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import fixed_types, helper, kernel, open_waiting
from flatradix.layout import hashing, waiting
from flatradix.layout.waiting import NONE

mix = helper(hashing.mix)
GONE_ID = -1
MOST_LENGTHS = 1 << 16


@helper
def take_entry(q):
    q.counts[waiting.LIVE] += 1
    count = q.counts[waiting.FREE]
    if count > 0:
        q.counts[waiting.FREE] = count - 1
        return np.int64(q.free[count - 1])
    entry = q.counts[waiting.ENTRIES]
    q.counts[waiting.ENTRIES] = entry + 1
    q.dirty[entry] = 0
    return entry


@helper
def free_entry(q, entry):
    q.counts[waiting.LIVE] -= 1
    q.id[entry] = GONE_ID
    q.priority[entry] = 0
    q.free[q.counts[waiting.FREE]] = entry
    q.counts[waiting.FREE] += 1


@helper
def close_gaps(q):
    """Remove the gaps that prompts left in the list by age."""
    kept = np.int64(0)
    for at in range(q.counts[waiting.AGED]):
        if q.by_age[at] != NONE:
            q.by_age[kept] = q.by_age[at]
            q.id_by_age[kept] = q.id_by_age[at]
            kept += 1
    q.counts[waiting.AGED] = kept


@helper
def position_of(q, number):
    """Return the position of an id in the list by age, or -1 if no such prompt waits."""
    low, high = np.int64(0), q.counts[waiting.AGED]
    while low < high:
        middle = (low + high) // 2
        if q.id_by_age[middle] < number:
            low = middle + 1
        else:
            high = middle
    if low == q.counts[waiting.AGED] or q.id_by_age[low] != number or q.by_age[low] == NONE:
        return np.int64(-1)
    return low


@helper
def has_left(q, turn):
    """Return whether the prompt of a turn waits no more."""
    return q.id[q.turns[turn]] != q.id_of_turn[turn]


@helper
def _close_turns(q):
    """Remove the turns of prompts that left."""
    kept = np.int64(0)
    for turn in range(q.counts[waiting.TURNS]):
        if not has_left(q, turn):
            q.turns[kept] = q.turns[turn]
            q.id_of_turn[kept] = q.id_of_turn[turn]
            kept += 1
    q.counts[waiting.TURNS] = kept


@helper
def append_turn(q, entry):
    """Give a prompt the last turn. Its id must be stored."""
    if q.counts[waiting.TURNS] == q.counts[waiting.BUCKETS]:  # also the length of `turns`
        _close_turns(q)
    turn = q.counts[waiting.TURNS]
    q.turns[turn], q.id_of_turn[turn] = entry, q.id[entry]
    q.counts[waiting.TURNS] = turn + 1


@helper
def mark_dirty(q, entry):
    """Have the next look take an entry up, unless it is noted already."""
    if q.dirty[entry] == 0:
        q.dirty[entry] = 1
        q.todo[q.counts[waiting.TODO]] = entry
        q.counts[waiting.TODO] += 1


@kernel
def clear_todo(table):
    """Forget the entries that are noted for the next look."""
    q = open_waiting(table)
    for at in range(q.counts[waiting.TODO]):
        q.dirty[q.todo[at]] = 0
    q.counts[waiting.TODO] = 0


@helper
def enter_row(q, entry, row):
    q.row[entry] = row
    if row > 0:
        first = q.at_row[row]
        q.next_at_row[entry] = first
        q.previous_at_row[entry] = NONE
        if first != NONE:
            q.previous_at_row[first] = entry
        q.at_row[row] = entry


@helper
def leave_row(q, entry):
    row = q.row[entry]
    if row > 0:
        after, before = q.next_at_row[entry], q.previous_at_row[entry]
        if before == NONE:
            q.at_row[row] = after
        else:
            q.next_at_row[before] = after
        if after != NONE:
            q.previous_at_row[after] = before
    q.row[entry] = 0


@helper
def bucket_of(q, key):
    return mix(key) & (q.counts[waiting.BUCKETS] - 1)


@helper
def enter_key(q, entry, key):
    q.key[entry] = key
    q.keyed[entry] = 1
    bucket = bucket_of(q, key)
    first = q.buckets[bucket]
    q.next_with_key[entry] = first
    q.previous_with_key[entry] = NONE
    if first != NONE:
        q.previous_with_key[first] = entry
    q.buckets[bucket] = entry


@helper
def leave_key(q, entry):
    if q.keyed[entry] == 0:
        return
    after, before = q.next_with_key[entry], q.previous_with_key[entry]
    if before == NONE:
        q.buckets[bucket_of(q, q.key[entry])] = after
    else:
        q.next_with_key[before] = after
    if after != NONE:
        q.previous_with_key[after] = before
    q.keyed[entry] = 0


@kernel
def enter_keys(table):
    """Enter every key again, after the buckets were replaced by more."""
    q = open_waiting(table)
    for at in range(q.counts[waiting.AGED]):
        entry = np.int64(q.by_age[at])
        if entry != NONE and q.keyed[entry] != 0:
            enter_key(q, entry, q.key[entry])


@kernel
def entries_by_age(table, entries):
    """Fill `entries`, int64 [N], with the entries of all waiting prompts, the oldest first."""
    q = open_waiting(table)
    close_gaps(q)
    for at in range(q.counts[waiting.AGED]):
        entries[at] = q.by_age[at]


@kernel
def find_entries(table, ids, entries):
    """Fill `entries`, int64 [B], with the entries of ids; return the first query that does not wait, or -1."""
    q = open_waiting(table)
    for query in range(len(ids)):
        at = position_of(q, ids[query])
        if at < 0:
            return np.int64(query)
        entries[query] = q.by_age[at]
    return np.int64(-1)


@kernel
def entries_in_order(table, entries):
    """Fill `entries`, int32 [N], with the entries of all waiting prompts in the queue's order."""
    q = open_waiting(table)
    _close_turns(q)
    for turn in range(len(entries)):
        entries[turn] = q.turns[turn]


@helper
def _longest_and_equal(q, count):
    """Return (a bound of the cached lengths, whether the priorities of the `count` waiting prompts are equal).

    Goes through all entries, without a branch, several at a time: those that have left have priority 0.
    """
    longest = np.int32(0)
    differing = np.int64(0)
    first = q.priority[q.by_age[0]]
    for entry in range(1, q.counts[waiting.ENTRIES]):
        longest = max(longest, q.length[entry])
        differing |= q.priority[entry] ^ first
    if differing != 0 and first != 0:
        differing = np.int64(0)
        for at in range(count):
            differing |= q.priority[q.by_age[at]] ^ first
    return np.int64(longest), differing == 0


@helper
def _shift_of(page):
    """Return the highest power of two that divides a page, as a shift: a division takes longer than all else here."""
    shift = np.int64(0)
    while (page >> shift) & 1 == 0:
        shift += 1
    return shift


@helper
def _begins_of(q, count, longest, shift):
    """Return where the prompts of each cached length, in shifted units from the longest on, begin in the order."""
    begins = np.zeros((longest >> shift) + 2, np.int32)
    for at in range(count):
        begins[((longest - q.length[q.by_age[at]]) >> shift) + 1] += 1
    total = np.int32(0)
    for length in range(len(begins)):
        total += begins[length]
        begins[length] = total
    return begins


@fixed_types("(int64, int64, int64[::1])")
def order_by_longest(table, page, ids):
    """Make "lpm" the queue's order, and fill `ids`, int64 [N]; return whether that was done. A counting sort.

    It is not if priorities differ, or if a match has more than MOST_LENGTHS different lengths.
    """
    q = open_waiting(table)
    if q.counts[waiting.AGED] != q.counts[waiting.LIVE]:
        close_gaps(q)
    count = q.counts[waiting.AGED]
    if count == 0:
        return True
    shift = _shift_of(page)
    longest, equal = _longest_and_equal(q, count)
    if not equal or longest >> shift >= MOST_LENGTHS:
        return False
    begins = _begins_of(q, count, longest, shift)
    for at in range(count):
        entry = q.by_age[at]
        length = (longest - q.length[entry]) >> shift
        turn = begins[length]
        q.turns[turn], q.id_of_turn[turn] = entry, q.id_by_age[at]
        begins[length] = turn + 1
    q.counts[waiting.TURNS] = count
    for turn in range(count):
        ids[turn] = q.id_of_turn[turn]
    return True


@kernel
def set_order(table, entries):
    """Make `entries`, int64 [N], all waiting prompts, the queue's order."""
    q = open_waiting(table)
    for turn in range(len(entries)):
        q.turns[turn], q.id_of_turn[turn] = entries[turn], q.id[entries[turn]]
    q.counts[waiting.TURNS] = len(entries)
