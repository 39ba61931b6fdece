"""A PrefixCache whose index is in host memory: whole calls on many requests, in one kernel each.

A page of the cache is a page of the tree. So the tree keeps the number of each page instead of its slots:
`Running.pool` has one for each page of the tree's pools. `cache` is the address of the table of a `Running`,
`addresses` that of the tree. Requests are given by their rows, int64 [B]; begins and ends are in tokens.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.calls import note_change, note_refusal
from flatradix.kernels.cpu.compact import plan_moves, slide_all
from flatradix.kernels.cpu.counts import near_limit, refuse_above_limit
from flatradix.kernels.cpu.insert import insert_all
from flatradix.kernels.cpu.jit import fixed_types, helper, int32_at, int64_at, kernel, open_running, open_state
from flatradix.kernels.cpu.lock import lock_place, unlock_row
from flatradix.kernels.cpu.requests import (
    end_request,
    get,
    granted_length,
    has_pages_to_insert,
    know,
    owned_from,
    page_count,
    put,
    start_request,
    store_tokens,
)
from flatradix.kernels.cpu.rows import handle_of, resolve, row_at
from flatradix.kernels.cpu.units import first_bad
from flatradix.kernels.cpu.walk import walk
from flatradix.layout import numbers, reasons, running
from flatradix.layout.handles import NO_HANDLE

# Pages of rows


@helper
def _take(c, row, begin, end):
    """Take free pages for the columns `begin` to `end` of a row."""
    free = c.counts[running.FREE_PAGES]
    first = row * c.counts[running.WIDTH]
    for at in range(begin, end):
        free -= 1
        c.pages[first + at] = c.stack[free]
    c.counts[running.FREE_PAGES] = free


@helper
def _give(c, row, begin, end):
    """Put the pages in the columns `begin` to `end` of a row back on the stack."""
    free = c.counts[running.FREE_PAGES]
    first = row * c.counts[running.WIDTH]
    for at in range(begin, end):
        c.stack[free] = c.pages[first + at]
        free += 1
    c.counts[running.FREE_PAGES] = free


@helper
def _write_path(s, c, row, begin, end, number):
    """Write the tree's pages of the path to `row`, from `begin` to `end`, to row `number`. Goes from its end up."""
    page = c.counts[running.PAGE]
    target = number * c.counts[running.WIDTH]
    while row > 0 and end > begin:
        first = np.int64(s.end[row] - s.length[row])
        source = np.int64(s.start[row]) // page - first // page
        low = max(first, begin)
        for at in range(low // page, end // page):
            c.pages[target + at] = c.pool[source + at]
        end = low
        row = np.int64(s.parent[row])


@kernel
def take_pages(cache, rows, begins, ends):
    """Take free pages for tokens `begins` to `ends` of each row. There must be enough."""
    c = open_running(cache)
    for query in range(len(rows)):
        _take(c, rows[query], page_count(c, begins[query]), page_count(c, ends[query]))


@kernel
def give_page_list(cache, pages):
    """Put pages, int32 [K], on the stack of free pages."""
    c = open_running(cache)
    free = c.counts[running.FREE_PAGES]
    for at in range(len(pages)):
        c.stack[free + at] = pages[at]
    c.counts[running.FREE_PAGES] = free + len(pages)


@kernel
def write_pages(addresses, cache, handles, lengths, rows):
    """Write the tree's pages of good places, int64 and int32 [B], to rows."""
    s, c = open_state(addresses), open_running(cache)
    for query in range(len(rows)):
        length = np.int64(lengths[query])
        _write_path(s, c, resolve(s, handles[query], length), np.int64(0), length, rows[query])


@fixed_types("(int64, int64[::1], int64[::1], int64[::1])")
def count_changes(cache, rows, begins, ends):
    """Return how many pages `pack_changes` packs."""
    c = open_running(cache)
    count = np.int64(0)
    for query in range(len(rows)):
        count += page_count(c, ends[query]) - page_count(c, begins[query])
    return count


@fixed_types("(int64, int64[::1], int64[::1], int64[::1], int64, int64)")
def pack_changes(cache, rows, begins, ends, ranges, pages):
    """Copy the pages of tokens `begins` to `ends` of each row to the address `pages`, int32, one behind the other.

    ranges: address of int64 [3, B]. Row 0 gets the sum of the counts up to and including each row, row 1 zeros, row 2
    the position of the pages in the page table, minus the sum of the counts before.
    """
    c, where, target = open_running(cache), int64_at(ranges), int32_at(pages)
    many, count = len(rows), np.int64(0)
    for query in range(many):
        first = rows[query] * c.counts[running.WIDTH]
        begin, end = page_count(c, begins[query]), page_count(c, ends[query])
        where[many + query], where[2 * many + query] = 0, first + begin - count
        for at in range(begin, end):
            target[count] = c.pages[first + at]
            count += 1
        where[query] = count


# Begin


@fixed_types(
    "(int64, int64, int64, int64[::1], boolean, int64[::1], int64[::1], int64, int64[::1], int64[::1], int64[::1])"
)
def find_prompts(addresses, cache, call, prompts, wide, counts, codes, chunk, cached, lengths, handles):
    """Match prompts without their last tokens, without a touch, and lock their places; return how many pages they need.

    A negative result is a reason, and nothing is locked. prompts, wide, counts, chunk, lengths: as for `admit` and
    `plan_begin`. codes: int64 [B], namespaces; [0] for no name. cached, handles: int64 [B], get the places.
    """
    s, c = open_state(addresses), open_running(cache)
    page = c.counts[running.PAGE]
    for query in range(len(counts)):
        units = (counts[query] - 1) // page * page
        code = codes[query] if len(codes) > 0 else np.int64(0)
        row, length = walk(s, prompts[query], wide, units, code, np.int64(0), np.int64(0))
        bad = first_bad(prompts[query], wide, length, min(length + page, units), numbers.MAX_TOKEN)
        if bad >= 0:
            note_refusal(s, query, bad)
            return np.int64(reasons.BAD_TOKEN)
        cached[query], handles[query] = length, row
    if near_limit(s, s.lock_ref, numbers.MOST_LOCKS, len(counts)):
        reason = refuse_above_limit(s, s.lock_ref, handles, cached, reasons.TOO_MANY_LOCKS)
        if reason < 0:
            return reason
    needed = np.int64(0)
    for query in range(len(counts)):
        row = lock_place(s, row_at(s, handles[query], cached[query]), cached[query])
        handles[query] = handle_of(s, row)
        lengths[query] = granted_length(counts[query], cached[query], chunk)
        needed += page_count(c, lengths[query]) - cached[query] // page
    note_change(s, call, numbers.LOCKED, 0, 0, 0)
    return needed


@fixed_types(
    "(int64, int64, int64[::1], int64[::1], boolean, int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], "
    "int64[::1])"
)
def admit(addresses, cache, rows, prompts, wide, counts, cached, begins, lengths, handles, priorities):
    """Let prompts run in the rows that are free and are used next; return (the first query with a bad token, position).

    (-1, 0) if all tokens are good; otherwise nothing has changed. prompts: addresses of the prompts, counts of tokens,
    which are int64 if `wide`. cached, handles: the good places that the requests hold. begins: tokens that need no
    computing. lengths: tokens that get slots; enough pages must be free.
    """
    s, c = open_state(addresses), open_running(cache)
    query, position = store_tokens(c.tokens, c.counts[running.MOST_KNOWN], rows, cached, prompts, wide, counts, cached)
    if query >= 0:
        return query, position
    for query in range(len(rows)):
        row = rows[query]
        _write_path(s, c, resolve(s, handles[query], cached[query]), np.int64(0), cached[query], row)
        _take(c, row, page_count(c, begins[query]), page_count(c, lengths[query]))
        c.handles[row] = handles[query]
        start_request(c, row, counts[query], lengths[query], cached[query], begins[query], priorities[query])
    return np.int64(-1), np.int64(0)


# Commit


@helper
def _unlock(s, c, row):
    """Unlock the place that a request holds."""
    length = get(c, running.COMMITTED, row)
    if length > 0:
        unlock_row(s, resolve(s, c.handles[row], length))


@helper
def _store_pages(c, number, begin, end, target):
    """Write pages of a row, from token `begin` to `end`, to the page pool, where the tokens are at `target`."""
    page = c.counts[running.PAGE]
    source = number * c.counts[running.WIDTH] + begin // page
    for at in range((end - begin) // page):
        c.pool[target // page + at] = c.pages[source + at]


@helper
def _replace(s, c, number, row, begin, end):
    """Let a request have the tree's pages of its tokens `begin` to `end`, of the path to `row`; free its own pages."""
    page = c.counts[running.PAGE]
    owned = max(begin, owned_from(c, number))
    _give(c, number, owned // page, end // page)
    c.counts[running.DUPLICATE_TOKENS] += max(end - owned, 0)
    while row > 0 and s.end[row] - s.length[row] >= end:
        row = np.int64(s.parent[row])
    _write_path(s, c, row, begin, end, number)


@fixed_types("(int64, int64, int64, int64[::1], int64[::1], int64[::1], int64[::1], int64[:, ::1])")
def commit(addresses, cache, call, rows, known, ends, codes, replaced):
    """Let requests know `known` tokens, of which `ends` are computed, and insert their whole pages.

    known, ends: int64 [B]. codes: int64 [B], the namespace of each request that has committed nothing; [0] if all are
    of no name. Returns (a negative reason and nothing has changed, or how many requests inserted, how many of these got
    other pages). replaced: int64 [3, B], gets the rows of the latter, and from where to where they have other pages.
    """
    s, c = open_state(addresses), open_running(cache)
    page, most = c.counts[running.PAGE], len(rows)
    chosen, target = np.empty((8, most), np.int64), np.empty((2, most), np.int32)
    named = np.zeros(most, np.bool_)
    numbers_of, keys, counts, spaces = chosen[0], chosen[1], chosen[2], chosen[3]
    places, begins, priorities, inserted = chosen[4], chosen[5], chosen[6], chosen[7]
    out_handles, starts = np.empty(most, np.int64), np.empty(most, np.int64)
    count = 0
    for at in range(most):
        row = rows[at]
        begin = get(c, running.COMMITTED, row)
        if not has_pages_to_insert(c, row, ends[at] // page * page):
            continue
        numbers_of[count] = row
        begins[count] = begin
        keys[count] = c.tokens + 4 * (row * c.counts[running.MOST_KNOWN] + begin)
        counts[count] = max(ends[at] // page * page - begin, 0)
        spaces[count] = codes[at] if len(codes) > 0 else 0
        named[count] = begin == 0 and spaces[count] != 0
        places[count] = c.handles[row] if begin > 0 else NO_HANDLE
        priorities[count] = get(c, running.PRIORITY, row)
        inserted[count] = get(c, running.COUNTED, row)
        count += 1
    if count > 0:
        reason = insert_all(
            addresses, call, keys[:count], False, counts[:count], spaces[:count], named[:count], places[:count],
            begins[:count], priorities[:count], inserted[:count], keys[:count], False, np.int64(0), False, np.int64(0),
            target[0, :count], target[1, :count], out_handles[:count], starts[:count],
        )  # fmt: skip
        if reason < 0:
            return reason, np.int64(0)
    for at in range(most):
        know(c, rows[at], known[at], ends[at])
    for at in range(count):
        _store_pages(c, numbers_of[at], np.int64(target[0, at]), np.int64(target[1, at]), starts[at])
    others = 0
    for at in range(count):
        number, begin, prefix, end = numbers_of[at], begins[at], np.int64(target[0, at]), np.int64(target[1, at])
        row = lock_place(s, resolve(s, out_handles[at], end), end)
        _unlock(s, c, number)
        if prefix > begin:
            _replace(s, c, number, row, begin, prefix)
            replaced[0, others], replaced[1, others], replaced[2, others] = number, begin, prefix
            others += 1
        c.handles[number] = handle_of(s, row)
        put(c, running.COMMITTED, number, end)
        put(c, running.COUNTED, number, end)
    return np.int64(count), np.int64(others)


# Grow and end


@fixed_types("(int64, int64[::1], int64[::1], int64[:, ::1])")
def grow(cache, rows, more, changed):
    """Give requests slots for `more` tokens, int64 [B], if enough pages are free; return how many got pages.

    If too few are free, nothing changes, and the result is -1. changed: int64 [3, B], gets the rows that got pages, and
    from where to where they have slots now that they had not.
    """
    c = open_running(cache)
    needed = np.int64(0)
    for at in range(len(rows)):
        length = get(c, running.LENGTH, rows[at])
        needed += page_count(c, length + more[at]) - page_count(c, length)
    if needed > c.counts[running.FREE_PAGES]:
        return np.int64(-1)
    count = 0
    for at in range(len(rows)):
        row = rows[at]
        length = get(c, running.LENGTH, row)
        begin, end = page_count(c, length), page_count(c, length + more[at])
        if end > begin:
            _take(c, row, begin, end)
            changed[0, count], changed[1, count], changed[2, count] = row, length, length + more[at]
            count += 1
        put(c, running.LENGTH, row, length + more[at])
        put(c, running.MISSING, row, 0)
    return np.int64(count)


@fixed_types("(int64, int64, int64, int64[::1], int64[::1])")
def release(addresses, cache, call, rows, begins):
    """End requests: unlock their places, free their pages and rows.

    begins: int64 [B], the tokens before which pages are not freed; [0] for those that are cached or borrowed.
    """
    s, c = open_state(addresses), open_running(cache)
    page = c.counts[running.PAGE]
    for at in range(len(rows)):
        row = rows[at]
        _unlock(s, c, row)
        begin = begins[at] if len(begins) > 0 else owned_from(c, row)
        _give(c, row, begin // page, page_count(c, get(c, running.LENGTH, row)))
        end_request(c, row)
    note_change(s, call, numbers.UNLOCKED, 0, 0, 0)


# The page pool of the tree


@kernel
def pages_of_ranges(pool, starts, lengths, count, page, pages):
    """Copy the pages of `count` ranges of the tree's pools, int32 in tokens, to `pages`, one behind the other."""
    source = int32_at(pool)
    at = 0
    for index in range(count):
        first = np.int64(starts[index]) // page
        for place in range(np.int64(lengths[index]) // page):
            pages[at] = source[first + place]
            at += 1


@kernel
def compact_pages(addresses, call, pool, moves):
    """Compact the pools of a tree, and the page pool at the address `pool`. moves: int32 [3, nodes], memory."""
    s = open_state(addresses)
    page, pages = s.numbers[numbers.PAGE], int32_at(pool)
    plan_moves(addresses, moves[0], moves[1], moves[2])
    slide_all(addresses, call, np.int64(0), False)
    for at in range(moves.shape[1]):
        source, target = np.int64(moves[0, at]) // page, np.int64(moves[1, at]) // page
        for place in range(np.int64(moves[2, at]) // page):
            pages[target + place] = pages[source + place]
