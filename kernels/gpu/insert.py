"""Insert, in three launches: plan (walk and check every key, and form groups), settle (who owns what is new), build.

What several keys of a batch have in common and the tree has not is owned by the first of them. That is settled in
rounds: of the keys that leave the tree at the same place with the same next page, the lowest takes the rest of its key
as a new leaf; the others compare themselves with it, token by token, and end there or leave it further on, for the next
round. One round where all that is new differs, two or three mostly. Nothing is written to the tree before all of it is
known to be good and to fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix import meta
from flatradix.kernels.gpu.build import build
from flatradix.kernels.gpu.claim import claim
from flatradix.kernels.gpu.compact import compact
from flatradix.kernels.gpu.cut import note_cut, put
from flatradix.kernels.gpu.finish import refuse
from flatradix.kernels.gpu.launch import Bound, Kernel
from flatradix.kernels.gpu.settle import settle
from flatradix.kernels.gpu.walk import (
    MAX_TOKEN,
    WRONG_OFFSETS,
    begin_at,
    first_outside,
    key_range,
    name_of,
    page_constants,
    walk,
    whole_pages,
)
from flatradix.refusals import BAD_SLOT, BAD_TOKEN
from flatradix.refusals import UNEQUAL as UNEQUAL_COUNTS

WRONG_TOKEN_VALUE = tl.constexpr(BAD_TOKEN)
WRONG_SLOT = tl.constexpr(BAD_SLOT)
UNEQUAL = tl.constexpr(UNEQUAL_COUNTS)
CHECKED = tl.constexpr(2048)


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "start_handles", "start_lengths", "slots", "slot_offsets", "total", "slot_total",
        "limit", "name", "batch", "mask",
    ]
)  # fmt: skip
def plan_kernel(
    s, w, values, offsets, names, start_handles, start_lengths, slots, slot_offsets, total: tl.int64,
    slot_total: tl.int64, limit: tl.int64, name: tl.int64, batch: tl.int32, mask: tl.int32,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    NAMES: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Walk and check one key: where it leaves the tree, whether tokens and slots are good, and whom it goes with."""
    query = tl.program_id(0)
    place, count, good = key_range(offsets, query, batch, total, SINGLE)
    slot_place, slot_count, slots_good = key_range(slot_offsets, query, batch, slot_total, SINGLE)
    key = values + place
    code, named = name_of(names, name, query, NAMES)
    row, start, reason = begin_at(s, start_handles, start_lengths, query, key, count, code, named, PAGE, BIGRAM, START)
    value = start.to(tl.int64)
    if not (good & slots_good):
        reason = reason * 0 + WRONG_OFFSETS
    elif count != slot_count:
        reason = reason * 0 + UNEQUAL
        value = (count << 32) | slot_count
    length = start
    left = start * 0
    units = whole_pages(count, PAGE, BIGRAM)
    if reason < 0:
        refuse(w, query, reason, value)
        units = units * 0
        row = row * 0
    else:
        row, done, left, _newly, _old = walk(
            s, w, key, units, code, row, start, value, value, PAGE, WIDTH, BIGRAM, BLOCK, False, False
        )
        length = start + done
        bad = first_outside(key, done, count - done, MAX_TOKEN, CHECKED)
        if bad >= 0:
            refuse(w, query, WRONG_TOKEN_VALUE, bad)
        else:
            bad = first_outside(slots + slot_place, units * 0, count, limit, CHECKED)
            if bad >= 0:
                refuse(w, query, WRONG_SLOT, bad)
    opens = length < start + units
    put(w, batch, query, row, meta.Q_EDGE)
    put(w, batch, query, length, meta.Q_AT)
    put(w, batch, query, start, meta.Q_BEGIN)
    put(w, batch, query, start + units, meta.Q_END)
    put(w, batch, query, opens, meta.Q_OPEN)
    put(w, batch, query, row * 0 - 1, meta.Q_LEAF)
    put(w, batch, query, row * 0 - 1, meta.Q_ROUND)
    note_cut(w, batch, query, row, length, left > 0)
    if opens:
        claim(
            s, w, values, offsets, names, name, query, batch, key + (length - start), row.to(tl.int64),
            length.to(tl.int64), code, row * 0, mask, PAGE, WIDTH, BIGRAM, SINGLE, NAMES,
        )  # fmt: skip
        tl.atomic_add(w.number + meta.OPEN, 1, sem="relaxed")


_plan = Kernel(
    plan_kernel,
    ["*w", "*i64", "*i64", "*i64", "*i32", "*w", "*i64", "i64", "i64", "i64", "i64", "i32", "i32"],
)


def insert(
    bound: Bound, values: int, wide: bool, offsets: int, total: int, batch: int, names: int, name: int,
    start_handles: int, start_lengths: int, slots: int, slots_wide: bool, slot_offsets: int, slot_total: int,
    limit: int, pool: int, pool_wide: bool, priorities: int, priority: int, inserteds: int, inserted: int,
    prefix_lengths: int, lengths: int, handles: int, call: int, page: int, bigram: bool, may_compact: bool,
) -> None:  # fmt: skip
    """Insert a batch, all of it or nothing, in three launches (and those of a compaction, if one may be needed).

    Arguments as for `match`; slots, slot_offsets: addresses of the slots (int64 if `slots_wide`) and int64 [B + 1],
    0 for a single key of `slot_total` slots; limit: the greatest slot. pool: address of the slot pool. priorities,
    inserteds: addresses of int64 [B], or 0 and one number for all. Fills prefix_lengths and lengths int32 [B] and
    handles int64 [B], with -1 where the call is refused.
    """
    sizes = page_constants(page, bigram, 512)
    _plan(
        bound, batch,
        (
            values, offsets, names, start_handles, start_lengths, slots, slot_offsets, total, slot_total, limit, name,
            batch, bound.workspace.claims.shape[1] - 1,
        ),
        (*sizes, offsets == 0, names != 0, start_handles != 0), (wide, slots_wide),
    )  # fmt: skip
    settle(bound, values, wide, offsets, batch, names, name, may_compact, *sizes[:3])
    if may_compact:
        compact(bound, pool, pool_wide, False)
    build(
        bound, values, wide, offsets, total, batch, names, name, slots, slots_wide, slot_offsets, pool, pool_wide,
        priorities, priority, inserteds, inserted, prefix_lengths, lengths, handles, call, page, bigram,
    )  # fmt: skip
