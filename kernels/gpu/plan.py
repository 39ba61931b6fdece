"""The plan of one key of an insert: where the key leaves the tree, and whether its tokens and slots are valid."""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.cut import column, note_cut, put
from flatradix.kernels.gpu.finish import refuse
from flatradix.kernels.gpu.walk import MAX_TOKEN, begin_at, first_outside, walk, whole_pages
from flatradix.layout import reasons, scratch

CHECKED = tl.constexpr(2048)
LARGEST_SLOTS = (2**31 - 1, 2**63 - 1)  # of 32 and of 64 bits


@triton.jit
def plan_key(
    s, w, key, slots, count, slot_count, good, query, batch, code, named, start_handles, start_lengths, limit,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, START: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """Walk and check a key of `count` tokens; store what its columns of `w.query` say of it, or refuse it.

    good: whether the offsets of the key and its slots are valid. LONG: `match_long` has stored where the key leaves the
    tree. Returns (row, path length there, path length at which the key begins, whether the key has a new part, whether
    it cuts an edge).
    """
    row, start, reason = begin_at(s, start_handles, start_lengths, query, key, count, code, named, PAGE, BIGRAM, START)
    dropped = row * 0
    if START:
        dropped = (tl.load(s.created + row) < 0).to(tl.int32)
    value = start.to(tl.int64)
    if not good:
        reason = reason * 0 + reasons.BAD_OFFSETS
    elif count != slot_count:
        reason = reason * 0 + reasons.UNEQUAL
        value = (count << 32) | slot_count
    length = start
    left = start * 0
    units = whole_pages(count, PAGE, BIGRAM)
    if reason < 0:
        refuse(w, query, reason, value)
        units = units * 0
        row = row * 0
    else:
        known = units * 0
        if LONG:
            row = tl.load(column(w, batch, scratch.Q_EDGE) + query)
            known = tl.load(column(w, batch, scratch.Q_AT) + query)
            tl.debug_barrier()  # all warps have read the columns that are set below
        row, done, left, _newly, _old = walk(
            s, w, key + known, units - known, code, row, start + known, value, value, PAGE, WIDTH, BIGRAM, BLOCK,
            False, False,
        )  # fmt: skip
        done += known
        length = start + done
        bad = first_outside(key, done, count - done, MAX_TOKEN, CHECKED)
        if bad >= 0:
            refuse(w, query, reasons.BAD_TOKEN, bad)
        else:
            bad = first_outside(slots, units * 0, count, limit, CHECKED)
            if bad >= 0:
                refuse(w, query, reasons.BAD_SLOT, bad)
    opens = length < start + units
    put(w, batch, query, row, scratch.Q_EDGE)
    put(w, batch, query, length, scratch.Q_AT)
    put(w, batch, query, start, scratch.Q_BEGIN)
    put(w, batch, query, start + units, scratch.Q_END)
    put(w, batch, query, dropped, scratch.Q_DROPPED)
    note_cut(w, batch, query, row, length, left > 0)
    return row, length, start, opens, left > 0
