"""The running requests of a PrefixCache: checks of calls on them, and their numbers.

`cache` is the address of the table of a `Running`. Requests are given by their rows, int64 [B].
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import fixed_types, helper, kernel, open_running
from flatradix.kernels.cpu.units import copy_checked, first_bad
from flatradix.layout import running
from flatradix.layout.numbers import MAX_TOKEN


@helper
def get(c, field, row):
    return c.data[field * c.counts[running.ROWS] + row]


@helper
def put(c, field, row, value):
    c.data[field * c.counts[running.ROWS] + row] = value


@helper
def page_count(c, tokens):
    """Return how many pages hold so many tokens."""
    page = c.counts[running.PAGE]
    return (tokens + page - 1) // page


@helper
def owned_from(c, row):
    """Return the tokens before which the slots of a request are not its own: cached or borrowed."""
    return max(get(c, running.COMMITTED, row), get(c, running.BORROWED, row))


@helper
def _most_computed(c, row, known):
    """Return how many tokens of a request can be computed: those that are known, up to the end of its last page."""
    slots = page_count(c, get(c, running.LENGTH, row)) * c.counts[running.PAGE]
    return min(known, slots, c.counts[running.MOST_SLOTS])


@helper
def _refusal(c, row, serial, known, more, end):
    """Return 0, or the reason why a call on a request is refused. `row` must be in range, or negative."""
    if row < 0 or serial == 0 or get(c, running.SERIAL, row) != serial:
        return running.NOT_RUNNING
    if get(c, running.MARK, row) != 0:
        return running.TWICE
    if known > c.counts[running.MOST_KNOWN]:
        return running.TOO_MANY_TOKENS
    if more < 0 or more > c.counts[running.MOST_SLOTS] - get(c, running.LENGTH, row):
        return running.TOO_LONG
    return running.BAD_END if end < 0 else 0


@fixed_types("(int64, int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64, int64[:, ::1])")
def read_requests(cache, rows, serials, added, more, up_to, behind, found):
    """Check a call on running requests; return (0, -1), or a reason of `layout.running` and the first query refused.

    serials: int64 [B]. added: new tokens of each; more: slots more; up_to: tokens that are computed: int64 [B], or [0]
    if the call has none. Without `up_to`, all tokens are computed that are known and have slots, but the last `behind`.
    found: int64 [5, B], gets the known and the computed tokens after the call, and LENGTH, NUM_TOKENS and COMMITTED
    before the call.
    """
    c = open_running(cache)
    reason, query = 0, -1
    for at in range(len(rows)):
        row, known, end = rows[at], np.int64(0), np.int64(0)
        if row >= c.counts[running.ROWS]:
            row = np.int64(-1)
        if row >= 0:
            known = get(c, running.NUM_TOKENS, row) + (added[at] if len(added) > 0 else 0)
            if len(up_to) == 0:
                end = min(known - behind, get(c, running.LENGTH, row))
            else:
                end = up_to[at] if up_to[at] <= _most_computed(c, row, known) else np.int64(-1)
        reason = _refusal(c, row, serials[at], known, more[at] if len(more) > 0 else np.int64(0), end)
        if reason != 0:
            query = at
            break
        put(c, running.MARK, row, 1)
        found[0, at], found[1, at] = known, end
        found[2, at] = get(c, running.LENGTH, row)
        found[3, at] = get(c, running.NUM_TOKENS, row)
        found[4, at] = get(c, running.COMMITTED, row)
    for at in range(len(rows) if query < 0 else query):
        put(c, running.MARK, rows[at], 0)
    return reason, query


@kernel
def store_tokens(tokens, width, rows, begins, addresses, wide, counts, skips):
    """Store tokens of each query in its row from `begins` on; return (first query with a bad token or -1, position).

    tokens: the address of int32 [R, width]. addresses, counts: int64 [B], of int64 tokens if `wide`, else of int32.
    skips: int64 [B], or [0] for none: tokens of each query that are not stored. A position is counted from the query's
    first token.
    """
    step = 8 if wide else 4
    for query in range(len(rows)):
        skip = skips[query] if len(skips) > 0 else np.int64(0)
        left = counts[query] - skip
        if left <= 0:
            continue
        source = addresses[query] + step * skip
        target = tokens + 4 * (width * rows[query] + begins[query])
        if copy_checked(source, wide, target, False, left, MAX_TOKEN) < 0:
            return np.int64(query), np.int64(first_bad(addresses[query], wide, skip, counts[query], MAX_TOKEN))
    return np.int64(-1), np.int64(0)


@kernel
def first_bad_of(addresses, wide, counts, skips):
    """Return (the first query with a token out of range, its position), or (-1, 0). As for `store_tokens`."""
    for query in range(len(addresses)):
        position = first_bad(addresses[query], wide, skips[query], counts[query], MAX_TOKEN)
        if position >= 0:
            return np.int64(query), np.int64(position)
    return np.int64(-1), np.int64(0)


@fixed_types("(int64[::1],)")
def extent(counts):
    """Return (the least, but at most 1; the greatest) of int64 [B], none of them negative."""
    least, greatest = np.int64(1), np.int64(0)
    for query in range(len(counts)):
        least, greatest = min(least, counts[query]), max(greatest, counts[query])
    return least, greatest


@helper
def granted_length(count, begin, chunk):
    """Return how many tokens of a prompt get slots, if the first `begin` have: `chunk` more, or 0 for all."""
    return begin + min(count - begin, chunk) if chunk > 0 else count  # begin + chunk may overflow


@fixed_types("(int64, int64[::1], int64[::1], int64, int64[::1])")
def plan_begin(cache, counts, begins, chunk, lengths):
    """Return how many free pages prompts need. counts, begins: int64 [B], their tokens, and those that have slots.

    lengths: int64 [B], gets the tokens that will have slots: `chunk` more at most, 0 for all.
    """
    c = open_running(cache)
    needed = np.int64(0)
    for query in range(len(counts)):
        lengths[query] = granted_length(counts[query], begins[query], chunk)
        needed += page_count(c, lengths[query]) - begins[query] // c.counts[running.PAGE]
    return needed


@helper
def start_request(c, row, tokens, length, cached, begin, priority):
    """Let a request run in the row that is free and is used next."""
    put(c, running.NUM_TOKENS, row, tokens)
    put(c, running.LENGTH, row, length)
    put(c, running.CACHED, row, begin)
    put(c, running.COMMITTED, row, cached)
    put(c, running.KEPT, row, cached)
    put(c, running.COUNTED, row, 0)
    put(c, running.MISSING, row, 0)
    put(c, running.PRIORITY, row, priority)
    put(c, running.BORROWED, row, 0)
    put(c, running.SERIAL, row, c.counts[running.NEXT_SERIAL])
    c.counts[running.NEXT_SERIAL] += 1
    c.counts[running.FREE_ROWS] -= 1
    c.counts[running.BEGUN] += 1
    c.counts[running.PROMPT_TOKENS] += tokens
    c.counts[running.CACHED_TOKENS] += cached
    c.counts[running.SHARED_TOKENS] += begin - cached


@kernel
def start_requests(cache, rows, counts, lengths, cached, begins, priorities):
    """Let requests run in the rows that are free and are used next, in order. All are int64 [B].

    counts: tokens of the prompts. lengths: tokens with slots. cached: tokens in the tree. begins: tokens that need no
    computing.
    """
    c = open_running(cache)
    for query in range(len(rows)):
        start_request(
            c, rows[query], counts[query], lengths[query], cached[query], begins[query], priorities[query]
        )  # fmt: skip


@helper
def has_pages_to_insert(c, row, end):
    """Return whether a commit up to `end` inserts. The first commit counts hits, even if it adds no page."""
    committed = get(c, running.COMMITTED, row)
    return end > committed or (committed > 0 and get(c, running.COUNTED, row) == 0)


@helper
def know(c, row, known, end):
    """Let a request know `known` tokens, of which `end` are computed, at most up to the end of its last page."""
    put(c, running.NUM_TOKENS, row, known)
    put(c, running.LENGTH, row, max(get(c, running.LENGTH, row), end))


@kernel
def begin_commit(cache, rows, known, ends, chosen):
    """Let requests know `known` tokens, of which `ends` are computed; return how many have whole pages to insert.

    known, ends: int64 [B]. chosen: int64 [4, B], gets the rows of these requests, the tokens that they have committed,
    the ends of their whole pages, and the tokens before which their slots are not their own.
    """
    c = open_running(cache)
    page = c.counts[running.PAGE]
    count = 0
    for at in range(len(rows)):
        row = rows[at]
        know(c, row, known[at], ends[at])
        end = ends[at] // page * page
        if has_pages_to_insert(c, row, end):
            committed = get(c, running.COMMITTED, row)
            chosen[0, count], chosen[1, count], chosen[2, count] = row, committed, max(end, committed)
            chosen[3, count] = owned_from(c, row)
            count += 1
    return count


@kernel
def end_commit(cache, rows, ends):
    """Note that the whole pages up to `ends`, int64 [B], are in the tree."""
    c = open_running(cache)
    for query in range(len(rows)):
        put(c, running.COMMITTED, rows[query], ends[query])
        put(c, running.COUNTED, rows[query], ends[query])


@helper
def end_request(c, row):
    """Free the row of a request. Its numbers stay until the row is used again."""
    put(c, running.SERIAL, row, 0)
    c.free_rows[c.counts[running.FREE_ROWS]] = row
    c.counts[running.FREE_ROWS] += 1


@kernel
def end_requests(cache, rows):
    c = open_running(cache)
    for query in range(len(rows)):
        end_request(c, rows[query])


@kernel
def newly_protected(parents, lengths, ends, locks, rows, cached, tokens):
    """Fill `tokens`, int64 [B], with how many evictable tokens a lock of each place alone would protect.

    parents, lengths, ends, locks: int32 [R], columns of the tree. rows, cached: int64 [B], where each match ends.
    """
    for query in range(len(rows)):
        row = rows[query]
        tokens[query] = 0
        while row > 0 and locks[row] == 0:
            begin = np.int64(ends[row]) - lengths[row]
            tokens[query] += max(min(np.int64(ends[row]), cached[query]) - begin, 0)
            row = np.int64(parents[row])
