"""The walk down a key, one program a key: what match and insert share.

A step costs two dependent loads, the first page of the next child's key and its entry in the child table: the entry
names the edge, so the child after it is looked for while the tokens of the edge are still being compared, and the
tokens of the next block are on their way before the last ones have been looked at. A child that was entered on the word
of its tag alone is left again if its parent or its first page turns out to be another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix import meta
from flatradix.kernels.gpu.children import probe, tag_of
from flatradix.kernels.gpu.rows import namespace_of, resolve
from flatradix.layout import MAX_UNITS
from flatradix.refusals import BAD_OFFSETS, OTHER_NAMESPACE, OTHER_TOKEN

MAX_TOKEN = tl.constexpr(MAX_UNITS)
WRONG_OFFSETS = tl.constexpr(BAD_OFFSETS)
WRONG_NAMESPACE = tl.constexpr(OTHER_NAMESPACE)
WRONG_TOKEN = tl.constexpr(OTHER_TOKEN)


@triton.jit
def key_range(offsets, query, batch, total, SINGLE: tl.constexpr):
    """(where the key of a query begins, its tokens, whether its offsets are good) among `total` values."""
    if SINGLE:
        begin = tl.zeros([], tl.int64)
        count = total.to(tl.int64)
        good = total >= 0
    else:
        begin = tl.load(offsets + query)
        count = tl.load(offsets + query + 1) - begin
        good = (begin >= 0) & (count >= 0) & (begin + count <= total) & ((query > 0) | (begin == 0))
        good = good & ((query < batch - 1) | (begin + count == total))
        count = tl.where(good, count, 0)
        begin = tl.where(good, begin, 0)
    return begin, count, good


@triton.jit
def name_of(names, name, query, NAMES: tl.constexpr):
    """(namespace code, whether the caller gave one) of a query, from `name` for all or `names`: code * 2 + given."""
    packed = name.to(tl.int64)
    if NAMES:
        packed = tl.load(names + query)
    return packed >> 1, (packed & 1) != 0


@triton.jit
def begin_at(
    s, start_handles, start_lengths, query, key, count, code, named,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """(row to walk from, path length there, reason): the root without START, else where the start lies."""
    row = tl.zeros([], tl.int64)
    length = tl.zeros([], tl.int64)
    reason = tl.zeros([], tl.int64)
    if START:
        one = tl.arange(0, 1)
        handle = tl.load(start_handles + query + one)
        length = tl.load(start_lengths + query).to(tl.int64)
        rows, reasons = resolve(s, handle, tl.load(start_lengths + query + one).to(tl.int64), one == 0, PAGE)
        row = tl.max(rows)
        reason = tl.min(reasons)
        if row > 0:
            if named & (namespace_of(s, row) != code):
                reason = reason * 0 + WRONG_NAMESPACE
            elif BIGRAM:
                if count > 0:
                    left = tl.load(s.end + row).to(tl.int64) - length
                    place = tl.load(s.start + row).to(tl.int64) + tl.load(s.length + row) - left - 1
                    if tl.load(s.seconds + place).to(tl.int64) != tl.load(key).to(tl.int64):
                        reason = reason * 0 + WRONG_TOKEN
    return row, length, reason


@triton.jit
def _block(s, key, position, done, take, BLOCK: tl.constexpr):
    """The next tokens of the key and of the edge; equal where there are none."""
    j = tl.arange(0, BLOCK)
    inside = j < take
    ours = tl.load(key + done + j, mask=inside, other=0)
    theirs = tl.load(s.tokens + position + j, mask=inside, other=0)
    return ours, theirs


@triton.jit
def visit(s, w, row, old, clock, tick, TOUCH: tl.constexpr):
    """Touch one row, scalar: its tick from before the call is kept, in case a query of the call turns out to be bad.

    `old` may have been read after others touched the row; whoever touched it first read the tick from before.
    """
    if TOUCH:
        if old <= clock:
            tl.store(w.undo + row, old)
        tl.atomic_max(s.tick + row, tick, sem="relaxed")


@triton.jit
def walk(
    s, w, key, units, code, row, at, clock, tick,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr,
    TOUCH: tl.constexpr, LOCK: tl.constexpr,
):  # fmt: skip
    """Follow `units` (whole pages) of `key` from (row, at), row 0 being the root of `code`.

    Returns (last row, units matched, units left on its edge, tokens newly protected). Visits, and with LOCK locks, each
    row that is matched whole, but for the row that it starts on; a last one that is matched in part is the caller's.
    """
    j = tl.arange(0, BLOCK)
    mask = tl.load(s.meta + meta.TABLE_MASK)
    first_row = row
    parent = tl.where(row > 0, row, ~code)
    place = tl.zeros([], tl.int64)
    tag = tl.zeros([], tl.int64)
    position = tl.zeros([], tl.int64)
    left = tl.zeros([], tl.int64)
    done = tl.zeros([], tl.int64)
    old = tl.zeros([], tl.int64)
    above = parent
    fresh = False
    if row > 0:
        left = tl.load(s.end + row).to(tl.int64) - at
        position = tl.load(s.start + row).to(tl.int64) + tl.load(s.length + row) - left
    found = row
    found_left = left
    if (left == 0) & (units > 0) & ((row > 0) | (code >= 0)):
        tag = tag_of(s, key, key + 1, parent, PAGE, WIDTH, BIGRAM)
        row, edge, place = probe(s, tag, tag & mask, mask)
        position = edge & 0xFFFFFFFF
        left = tl.where(row > 0, edge >> 32, 0)
        above = tl.load(s.parent + row).to(tl.int64)
        if TOUCH:
            old = tl.load(s.tick + row)
        fresh = True
    newly = tl.zeros([], tl.int64)
    before = tl.zeros([], tl.int32) + 1
    size = tl.zeros([], tl.int64)
    take = tl.minimum(tl.minimum(left, BLOCK), units)
    ours, theirs = _block(s, key, position, done, take, BLOCK)
    going = take > 0
    while going:
        # Where the walk is after this block if all of it is equal, and the block after that, on its way.
        next_done = done + take
        next_left = left - take
        next_position = position + take
        next_row = row
        next_parent = parent
        next_place = place
        next_tag = tag
        next_above = parent
        next_old = old
        next_fresh = False
        if (next_left == 0) & (next_done < units):
            next_parent = row
            next_tag = tag_of(s, key + next_done, key + next_done + 1, row, PAGE, WIDTH, BIGRAM)
            next_row, edge, next_place = probe(s, next_tag, next_tag & mask, mask)
            next_position = edge & 0xFFFFFFFF
            next_left = tl.where(next_row > 0, edge >> 32, 0)
            next_above = tl.load(s.parent + next_row).to(tl.int64)
            if TOUCH:
                next_old = tl.load(s.tick + next_row)
            next_fresh = True
        next_take = tl.minimum(tl.minimum(next_left, BLOCK), units - next_done)
        next_ours, next_theirs = _block(s, key, next_position, next_done, next_take, BLOCK)

        different = ours != theirs
        if BIGRAM:
            inside = j < take
            second = tl.load(key + done + 1 + j, mask=inside, other=0)
            different = different | (second != tl.load(s.seconds + position + j, mask=inside, other=0))
        equal = tl.min(tl.where(different, j, BLOCK)).to(tl.int64)
        all_equal = equal == BLOCK
        known = (not fresh) | ((above == parent) & (all_equal | (equal >= PAGE)))
        if known & all_equal:
            found = row
            found_left = left - take
            if (found_left == 0) & (row != first_row):
                visit(s, w, row, old, clock, tick, TOUCH)
                if LOCK:
                    newly += tl.where(before == 0, size, 0)
                    size = tl.load(s.length + row).to(tl.int64)
                    before = tl.atomic_add(s.lock_ref + row, 1, sem="relaxed")
            done = next_done
            left = next_left
            position = next_position
            row = next_row
            parent = next_parent
            place = next_place
            tag = next_tag
            above = next_above
            old = next_old
            fresh = next_fresh
            take = next_take
            ours = next_ours
            theirs = next_theirs
            going = next_take > 0
        elif known:
            matched = done + equal
            matched -= matched % PAGE
            found = row
            found_left = left - (matched - done)
            done = matched
            going = False
        else:
            # Another child with the same tag: look further. Seen about once in 2**32 probes.
            row, edge, place = probe(s, tag, (place + 1) & mask, mask)
            position = edge & 0xFFFFFFFF
            left = tl.where(row > 0, edge >> 32, 0)
            above = tl.load(s.parent + row).to(tl.int64)
            if TOUCH:
                old = tl.load(s.tick + row)
            take = tl.minimum(tl.minimum(left, BLOCK), units - done)
            ours, theirs = _block(s, key, position, done, take, BLOCK)
            going = take > 0
    if LOCK:
        newly += tl.where(before == 0, size, 0)
    return found, done, found_left, newly, old


@triton.jit
def visit_up(s, w, row, clock, tick, TOUCH: tl.constexpr, LOCK: tl.constexpr):
    """Visit, and with LOCK lock, a row and all above it; scalar. Returns the tokens newly protected."""
    newly = tl.zeros([], tl.int64)
    while row > 0:
        if TOUCH:
            visit(s, w, row, tl.load(s.tick + row), clock, tick, TOUCH)
        if LOCK:
            if tl.atomic_add(s.lock_ref + row, 1, sem="relaxed") == 0:
                newly += tl.load(s.length + row)
        row = tl.load(s.parent + row).to(tl.int64)
    return newly


@triton.jit
def first_outside(values, begin, count, limit, BLOCK: tl.constexpr):
    """Where the first of `count` values from `begin` on lies that is not in [0, limit], or -1; scalar."""
    bad = tl.zeros([], tl.int64) - 1
    at = tl.zeros([], tl.int64)
    while (at < count) & (bad < 0):
        j = tl.arange(0, BLOCK)
        found = tl.load(values + begin + at + j, mask=at + j < count, other=0).to(tl.int64)
        outside = (found < 0) | (found > limit)
        lowest = tl.min(tl.where(outside, j, BLOCK))
        if lowest < BLOCK:
            bad = begin + at + lowest
        at += BLOCK
    return bad


@triton.jit
def whole_pages(count, PAGE: tl.constexpr, BIGRAM: tl.constexpr):
    """Units in the whole pages of a key of so many tokens."""
    units = tl.maximum(count - BIGRAM, 0)
    return units - units % PAGE


@triton.jit
def undo_touches(s, w, row, clock, active):
    """Lanes of rows: give all on their paths the ticks from before the call; harmless where it is done twice."""
    row = tl.where(active, row, 0)
    while tl.max(row) > 0:
        on = row > 0
        touched = on & (tl.load(s.tick + row, mask=on, other=0) > clock)
        tl.store(s.tick + row, tl.load(w.undo + row, mask=touched, other=0), mask=touched)
        row = tl.where(on, tl.maximum(tl.load(s.parent + row, mask=on, other=0).to(tl.int64), 0), 0)
