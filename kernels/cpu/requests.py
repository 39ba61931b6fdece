"""The running requests of a PrefixCache in host memory: their tokens, their pages, and the stack of free pages.

Requests are given by their rows, int64 [B]. pages: int32 [R, W], the page of each `page` tokens of a request; page i
has the slots i * page to (i + 1) * page - 1. stack: int32 [P], the free pages; the last is allocated first. Begins and
ends of pages, int64 [B], are counted in pages.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper, int32_at, kernel, open_state
from flatradix.kernels.cpu.rows import resolve
from flatradix.kernels.cpu.units import copy_checked, first_bad
from flatradix.layout import running
from flatradix.layout.numbers import MAX_TOKEN


@kernel
def store_tokens(tokens, width, rows, begins, addresses, wide, counts, skips):
    """Store tokens of each query in its row from `begins` on; return (first query with a bad token or -1, position).

    tokens: the address of int32 [R, width]. addresses, counts: int64 [B], of int64 tokens if `wide`, else of int32.
    skips: int64 [B], tokens of each query that are not stored. A position is counted from the query's first token.
    """
    step = 8 if wide else 4
    for query in range(len(rows)):
        left = counts[query] - skips[query]
        if left <= 0:
            continue
        source = addresses[query] + step * skips[query]
        target = tokens + 4 * (width * rows[query] + begins[query])
        if copy_checked(source, wide, target, False, left, MAX_TOKEN) < 0:
            return np.int64(query), np.int64(first_bad(addresses[query], wide, skips[query], counts[query], MAX_TOKEN))
    return np.int64(-1), np.int64(0)


@kernel
def first_bad_of(addresses, wide, counts):
    """Return (the first query with a token out of range, its position), or (-1, 0). As for `store_tokens`."""
    for query in range(len(addresses)):
        position = first_bad(addresses[query], wide, 0, counts[query], MAX_TOKEN)
        if position >= 0:
            return np.int64(query), np.int64(position)
    return np.int64(-1), np.int64(0)


@kernel
def take_pages(stack, free, pages, rows, begins, ends):
    """Take pages from the stack for columns `begins` to `ends` of each row; return how many are still free.

    There must be enough.
    """
    for query in range(len(rows)):
        row = rows[query]
        for at in range(begins[query], ends[query]):
            free -= 1
            pages[row, at] = stack[free]
    return free


@kernel
def give_pages(stack, free, pages, rows, begins, ends):
    """Put the pages in columns `begins` to `ends` of each row back on the stack; return how many are free now."""
    for query in range(len(rows)):
        row = rows[query]
        for at in range(begins[query], ends[query]):
            stack[free] = pages[row, at]
            free += 1
    return free


@kernel
def give_slots(stack, free, slots, page):
    """Put the pages of slots, int32 [K * page], back on the stack; return how many are free now."""
    for at in range(0, len(slots), page):
        stack[free] = slots[at] // page
        free += 1
    return free


@kernel
def slots_of_pages(pages, page, rows, begins, ends, slots):
    """Fill `slots`, int32, with the slots of columns `begins` to `ends` of each row, one row behind the other."""
    count = np.int64(0)
    for query in range(len(rows)):
        row = rows[query]
        for at in range(begins[query], ends[query]):
            first = np.int32(pages[row, at]) * np.int32(page)
            for within in range(page):
                slots[count + within] = first + np.int32(within)
            count += page


@helper
def _write_pages(s, row, begin, end, pool, page, pages, number):
    """Write the pages of a path's units from `begin` to `end`, whole pages, to row `number`. Goes from its end up."""
    slots = int32_at(pool)
    while row > 0 and end > begin:
        first = np.int64(s.end[row] - s.length[row])
        start = np.int64(s.start[row]) - first
        low = max(first, begin)
        for at in range(low // page, end // page):
            pages[number, at] = slots[start + at * page] // page
        end = low
        row = np.int64(s.parent[row])


@kernel
def write_pages(addresses, handles, lengths, pool, page, pages, rows):
    """Write the pages of places, which must be good, to rows. pool: the address of the tree's slots, int32."""
    s = open_state(addresses)
    for query in range(len(rows)):
        length = np.int64(lengths[query])
        row = resolve(s, handles[query], length)
        _write_pages(s, row, np.int64(0), length, pool, page, pages, rows[query])


@kernel
def replace_pages(addresses, handles, lengths, pool, page, pages, rows, begins, owned, ends, stack, free):
    """Let rows have the tree's pages for the columns `begins` to `ends`; put the pages that they had back.

    Only pages from column `owned` on are put back. Returns how many are free now.
    """
    s = open_state(addresses)
    for query in range(len(rows)):
        if ends[query] <= begins[query]:
            continue
        number = rows[query]
        for at in range(max(begins[query], owned[query]), ends[query]):
            stack[free] = pages[number, at]
            free += 1
        row = resolve(s, handles[query], np.int64(lengths[query]))
        while row > 0 and s.end[row] - s.length[row] >= ends[query] * page:
            row = np.int64(s.parent[row])
        _write_pages(s, row, begins[query] * page, ends[query] * page, pool, page, pages, number)
    return free


@kernel
def check_requests(data, rows, serials, added, most_tokens, more, most_length):
    """Return (0, -1) if all requests are running, are given once, and may have `added` more tokens, `more` more slots.

    Else a reason of `layout.running`, and the first query. data: int64 [FIELDS, R]. rows, serials, added, more: int64
    [B]. most_tokens: of a request that are known. most_length: the most slots of a request.
    """
    reason, query = 0, -1
    for at in range(len(rows)):
        row = rows[at]
        if row < 0 or serials[at] == 0 or data[running.SERIAL, row] != serials[at]:
            reason = running.NOT_RUNNING
        elif data[running.MARK, row] != 0:
            reason = running.TWICE
        elif data[running.NUM_TOKENS, row] + added[at] > most_tokens:
            reason = running.TOO_MANY_TOKENS
        elif more[at] < 0 or data[running.LENGTH, row] + more[at] > most_length:
            reason = running.TOO_LONG
        if reason != 0:
            query = at
            break
        data[running.MARK, row] = 1
    for at in range(len(rows) if query < 0 else query):
        data[running.MARK, rows[at]] = 0
    return reason, query


@kernel
def begin_commit(data, rows, known, ends, page, chosen):
    """Let requests know `known` tokens, of which `ends` are computed; return how many have whole pages to insert.

    known, ends: int64 [B]. chosen: int64 [3, B], gets the rows of these requests, the tokens that they have committed,
    and the ends of their whole pages. The first commit of a request counts its hits, even if it adds nothing.
    """
    count = 0
    for at in range(len(rows)):
        row = rows[at]
        data[running.NUM_TOKENS, row] = known[at]
        data[running.LENGTH, row] = max(data[running.LENGTH, row], ends[at])
        committed = data[running.COMMITTED, row]
        end = ends[at] // page * page
        if end > committed or (committed > 0 and data[running.COUNTED, row] == 0):
            chosen[0, count], chosen[1, count], chosen[2, count] = row, committed, max(end, committed)
            count += 1
    return count


@kernel
def grow(data, rows, more, page, stack, free, pages, chosen):
    """Give requests slots for `more` tokens, int64 [B], if enough pages are free; return (how many are free, chosen).

    If they are not, nothing changes, and the second number is -1. chosen: int64 [3, B], gets the rows that got pages,
    and the columns of these pages.
    """
    needed = np.int64(0)
    for at in range(len(rows)):
        length = data[running.LENGTH, rows[at]]
        needed += (length + more[at] + page - 1) // page - (length + page - 1) // page
    if needed > free:
        return free, -1
    count = 0
    for at in range(len(rows)):
        row = rows[at]
        length = data[running.LENGTH, row]
        begin, end = (length + page - 1) // page, (length + more[at] + page - 1) // page
        for column in range(begin, end):
            free -= 1
            pages[row, column] = stack[free]
        if end > begin:
            chosen[0, count], chosen[1, count], chosen[2, count] = row, begin, end
            count += 1
        data[running.LENGTH, row] = length + more[at]
        data[running.MISSING, row] = 0
    return free, count


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
