"""The walk of a key down the tree, one program a key. Match and insert share it.

Each step waits for only one load that depends on another: the child's entry in the child table. The entry holds the
edge, so the walk looks up the next child while it still compares the tokens of the edge. The next block of the key, and
the page for the next look-up, are loaded before the current block is compared. The walk enters a child by its tag
alone. It leaves the child again if the child's parent or first page turns out to differ.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from flatradix.kernels.gpu.children import page_at, probe, tag_of
from flatradix.kernels.gpu.rows import namespace_of, resolve
from flatradix.layout import numbers, reasons

MAX_TOKEN = tl.constexpr(numbers.MAX_TOKEN)
# A single key in host memory is read in pieces of this many tokens, with all loads of a piece in flight at once.
PIECE = tl.constexpr(4096)


@triton.jit
def bring(source, target, count):
    """Copy a key from pinned memory to the device. A walk in pinned memory would wait for PCIe at each step.

    source, target: addresses of int32, multiples of 16. Copies up to three tokens more, as each load takes four.
    """
    count = tl.multiple_of((count + 3) // 4 * 4, 4)
    at = tl.zeros([], tl.int64)
    while at < count:
        j = at + tl.arange(0, PIECE)
        token = tl.load(tl.multiple_of(source + j, 16), mask=j < count)
        tl.store(tl.multiple_of(target + j, 16), token, mask=j < count)
        at += PIECE
    tl.debug_barrier()


@triton.jit
def key_range(offsets, query, batch, total, SINGLE: tl.constexpr):
    """Return (begin of a query's key among `total` values, its number of tokens, whether its offsets are valid)."""
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
    """Return (namespace code, whether the caller gave a namespace) of a query.

    Both come from code * 2 + given: `names[query]` with NAMES, else `name` for all queries.
    """
    packed = name.to(tl.int64)
    if NAMES:
        packed = tl.load(names + query)
    return (packed >> 1).to(tl.int32), (packed & 1) != 0


@triton.jit
def begin_at(
    s, start_handles, start_lengths, query, key, count, code, named,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Return (row to walk from, path length there, reason): the root without START, else the start of the query.

    The reason is 0, or says why the start is refused.
    """
    row = tl.zeros([], tl.int32)
    length = tl.zeros([], tl.int32)
    reason = tl.zeros([], tl.int64)
    if START:
        one = tl.arange(0, 1)
        handle = tl.load(start_handles + query + one)
        length = tl.load(start_lengths + query)
        rows, why = resolve(s, handle, tl.load(start_lengths + query + one).to(tl.int64), one == 0, PAGE)
        row = tl.max(rows).to(tl.int32)
        reason = tl.min(why)
        if row > 0:
            if named & (namespace_of(s, row) != code):
                reason = reason * 0 + reasons.OTHER_NAMESPACE
            elif BIGRAM:
                if count > 0:
                    left = tl.load(s.end + row) - length
                    place = tl.load(s.start + row) + tl.load(s.length + row) - left - 1
                    if tl.load(s.seconds + place).to(tl.int64) != tl.load(key).to(tl.int64):
                        reason = reason * 0 + reasons.OTHER_TOKEN
    return row, length, reason


@triton.jit
def pages_at(key, at, units, PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr):
    """Return the first tokens of the units of a key's page and, with bigrams, their second tokens."""
    first = page_at(key, at, units, PAGE, WIDTH)
    second = first
    if BIGRAM:
        second = page_at(key + 1, at, units, PAGE, WIDTH)
    return first, second


@triton.jit
def visit(s, w, row, old, clock, tick, TOUCH: tl.constexpr):
    """Touch one row, scalar. Keep its tick from before the call, in case a query of the call is invalid.

    `old` may have been read after other programs touched the row; it is then later than `clock` and not kept. The
    program that touched the row first has read the tick from before the call.
    """
    if TOUCH:
        tl.store(w.old_tick + row, old, mask=old <= clock)
        tl.atomic_max(s.tick + row, tick, sem="relaxed")


@triton.jit
def _child(s, tag, place, mask, TOUCH: tl.constexpr):
    """Return (row, start and length of its edge, parent, tick) of the first entry with a tag from `place` on."""
    row, edge, place = probe(s, tag, place, mask)
    row = row.to(tl.int32)
    position = edge.to(tl.int32)
    length = tl.where(row > 0, edge >> 32, 0).to(tl.int32)
    above = tl.load(s.parent + row)
    old = tl.zeros([], tl.int64)
    if TOUCH:
        old = tl.load(s.tick + row)
    return row, position, length, above, old


@triton.jit
def walk(
    s, w, key, units, code, row, at, clock, tick,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr,
    TOUCH: tl.constexpr, LOCK: tl.constexpr,
):  # fmt: skip
    """Follow `units` units of `key`, which are whole pages, from (row, at); scalars, int32.

    Row 0 is the root of namespace `code`. Returns (last row, units matched, units left on its edge, newly protected
    tokens, tick of the last row if units are left on its edge). Visits each row that matches to its end, and with LOCK
    locks it, except the row on which the walk starts. The caller visits a last row that matches only in part. The
    registers of a program decide how many keys a multiprocessor walks at once. So the loop keeps rows and positions in
    32 bits, and loads again what is rarely needed.
    """
    j = tl.arange(0, BLOCK)
    mask = tl.load(s.numbers + numbers.TABLE_MASK)
    first_row = row
    parent = tl.where(row > 0, row, ~code)
    position = tl.zeros([], tl.int32)
    left = tl.zeros([], tl.int32)
    done = tl.zeros([], tl.int32)
    old = tl.zeros([], tl.int64)
    above = parent
    fresh = False
    ours = tl.load(key + j, mask=j < units, other=0)
    if row > 0:
        left = tl.load(s.end + row) - at
        position = tl.load(s.start + row) + tl.load(s.length + row) - left
    found = row
    found_left = left
    if (left == 0) & (units > 0) & ((row > 0) | (code >= 0)):
        page, second = pages_at(key, 0, units, PAGE, WIDTH, BIGRAM)
        tag = tag_of(s, page, second, parent.to(tl.int64), PAGE, WIDTH, BIGRAM)
        row, position, left, above, old = _child(s, tag, tag & mask, mask, TOUCH)
        fresh = True
    newly = tl.zeros([], tl.int64)
    before = tl.zeros([], tl.int32) + 1
    size = tl.zeros([], tl.int32)
    take = tl.minimum(tl.minimum(left, BLOCK), units)
    theirs = tl.load(s.tokens + position + j, mask=j < take, other=0)
    page, second = pages_at(key, take, units, PAGE, WIDTH, BIGRAM)
    going = take > 0
    while going:
        # Find where the walk is after this block if all of it is equal, and load the next block: its part of the key,
        # then the child to compare with, whose page was loaded with the block before, then that child's tokens.
        next_done = done + take
        next_left = left - take
        next_position = position + take
        next_ours = tl.load(key + next_done + j, mask=next_done + j < units, other=0)
        next_row = row
        next_above = parent
        next_old = old
        ends = next_left == 0
        more = ends & (next_done < units)
        if more:
            tag = tag_of(s, page, second, row.to(tl.int64), PAGE, WIDTH, BIGRAM)
            next_row, next_position, next_left, next_above, next_old = _child(s, tag, tag & mask, mask, TOUCH)
        next_take = tl.minimum(tl.minimum(next_left, BLOCK), units - next_done)
        next_theirs = tl.load(s.tokens + next_position + j, mask=j < next_take, other=0)
        page, second = pages_at(key, next_done + next_take, units, PAGE, WIDTH, BIGRAM)

        inside = j < take
        different = inside & (ours != theirs)
        if BIGRAM:
            ours_second = tl.load(key + done + 1 + j, mask=inside, other=0)
            different = different | (ours_second != tl.load(s.seconds + position + j, mask=inside, other=0))
        equal = tl.min(tl.where(different, j, BLOCK))
        all_equal = equal == BLOCK
        known = (not fresh) | ((above == parent) & (all_equal | (equal >= PAGE)))
        if known & all_equal:
            found = row
            found_left = left - take
            if ends & (row != first_row):
                visit(s, w, row, old, clock, tick, TOUCH)
                if LOCK:
                    newly += tl.where(before == 0, size, 0)
                    size = tl.load(s.length + row)
                    before = tl.atomic_add(s.lock_ref + row, 1, sem="relaxed")
            parent = tl.where(more, row, parent)
            done = next_done
            left = next_left
            position = next_position
            row = next_row
            above = next_above
            old = next_old
            fresh = more
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
            # Another child with the same tag: search further. This happens about once in 2**32 probes.
            tag = tl.load(s.tag + row).to(tl.int64) & 0xFFFFFFFF
            place = tl.load(w.entry + row).to(tl.int64)
            row, position, left, above, old = _child(s, tag, (place + 1) & mask, mask, TOUCH)
            take = tl.minimum(tl.minimum(left, BLOCK), units - done)
            theirs = tl.load(s.tokens + position + j, mask=j < take, other=0)
            page, second = pages_at(key, done + take, units, PAGE, WIDTH, BIGRAM)
            going = take > 0
    if LOCK:
        newly += tl.where(before == 0, size, 0)
    return found, done, found_left, newly, old


@triton.jit
def visit_up(s, w, row, clock, tick, TOUCH: tl.constexpr, LOCK: tl.constexpr):
    """Visit a row and all rows above it, and with LOCK lock them; scalar. Return the newly protected tokens."""
    newly = tl.zeros([], tl.int64)
    while row > 0:
        if TOUCH:
            visit(s, w, row, tl.load(s.tick + row), clock, tick, TOUCH)
        if LOCK:
            if tl.atomic_add(s.lock_ref + row, 1, sem="relaxed") == 0:
                newly += tl.load(s.length + row)
        row = tl.load(s.parent + row)
    return newly


@triton.jit
def first_outside(values, begin, count, limit, BLOCK: tl.constexpr):
    """Return the position of the first of `count` values from `begin` on that is not in [0, limit], or -1; scalar."""
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
    """Return the units in the whole pages of a key of `count` tokens, int32."""
    units = tl.maximum(count - BIGRAM, 0).to(tl.int32)
    return units - units % PAGE


@triton.jit
def undo_touches(s, w, row, clock, active):
    """Restore the ticks from before the call on the paths of the lanes' rows. Restoring a tick twice does no harm."""
    row = tl.where(active, row, 0)
    while tl.max(row) > 0:
        on = row > 0
        touched = on & (tl.load(s.tick + row, mask=on, other=0) > clock)
        tl.store(s.tick + row, tl.load(w.old_tick + row, mask=touched, other=0), mask=touched)
        row = tl.where(on, tl.maximum(tl.load(s.parent + row, mask=on, other=0), 0), 0)


@functools.cache
def page_constants(page: int, bigram: bool, block: int) -> tuple[int, int, bool, int]:
    """Return (PAGE, WIDTH, BIGRAM, BLOCK).

    WIDTH: a power of two, at least the tokens of a page. BLOCK: `block`, or more if the first page needs it.
    """
    width = 1 << (page + bigram - 1).bit_length()
    return page, width, bigram, max(block, width)
