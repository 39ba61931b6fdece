"""Insert, in three launches: plan (walk and check every key, form groups), settle (owners of new units), build (write).

Several keys of a batch may share a part that the tree does not have. The first query with the part owns it. Ownership
is settled in rounds. The keys that leave the tree at the same point with the same next page form a group. The lowest
query of the group takes the rest of its key as a new leaf. The other queries compare their keys with that leaf, token
by token. Each ends in the leaf, or leaves it further on and takes part in the next round. One round suffices if all new
parts differ; most batches take two or three. Nothing is written to the tree before the whole batch is known to be valid
and to fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.build import build
from flatradix.kernels.gpu.claim import claim
from flatradix.kernels.gpu.compact import compact
from flatradix.kernels.gpu.cut import column, note_cut, put
from flatradix.kernels.gpu.finish import refuse
from flatradix.kernels.gpu.launch import Arrays, Kernel
from flatradix.kernels.gpu.long import match_long, shares_of
from flatradix.kernels.gpu.settle import settle
from flatradix.kernels.gpu.walk import (
    MAX_TOKEN,
    begin_at,
    bring,
    first_outside,
    key_range,
    name_of,
    page_constants,
    walk,
    whole_pages,
)
from flatradix.layout import reasons, scratch
from flatradix.layout.queries import Output, PerQuery, PlaceAddresses, Values

CHECKED = tl.constexpr(2048)
_LARGEST = (2**31 - 1, 2**63 - 1)  # the largest slot of 32 and of 64 bits


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "start_handles", "start_lengths", "slots", "slot_offsets", "stage", "total",
        "slot_total", "limit", "name", "batch", "mask",
    ]
)  # fmt: skip
def plan_kernel(
    s, w, values, offsets, names, start_handles, start_lengths, slots, slot_offsets, stage, total: tl.int64,
    slot_total: tl.int64, limit: tl.int64, name: tl.int64, batch: tl.int32, mask: tl.int32,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    STAGED: tl.constexpr, NAMES: tl.constexpr, START: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Walk and check one key: where it leaves the tree, whether its tokens and slots are valid; and join a group.

    STAGED: the key is in pinned memory, and this kernel copies it to `stage` for itself and for the next launches.
    LONG: `match_long` has stored where the key leaves the tree.
    """
    query = tl.program_id(0)
    place, count, good = key_range(offsets, query, batch, total, SINGLE)
    if STAGED:
        bring(values, stage, count)
        values = stage
    slot_place, slot_count, slots_good = key_range(slot_offsets, query, batch, slot_total, SINGLE)
    key = values + place
    code, named = name_of(names, name, query, NAMES)
    row, start, reason = begin_at(s, start_handles, start_lengths, query, key, count, code, named, PAGE, BIGRAM, START)
    value = start.to(tl.int64)
    if not (good & slots_good):
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
            bad = first_outside(slots + slot_place, units * 0, count, limit, CHECKED)
            if bad >= 0:
                refuse(w, query, reasons.BAD_SLOT, bad)
    opens = length < start + units
    put(w, batch, query, row, scratch.Q_EDGE)
    put(w, batch, query, length, scratch.Q_AT)
    put(w, batch, query, start, scratch.Q_BEGIN)
    put(w, batch, query, start + units, scratch.Q_END)
    put(w, batch, query, opens, scratch.Q_OPEN)
    put(w, batch, query, row * 0 - 1, scratch.Q_LEAF)
    put(w, batch, query, row * 0 - 1, scratch.Q_ROUND)
    note_cut(w, batch, query, row, length, left > 0)
    if opens:
        claim(
            s, w, values, offsets, names, name, query, batch, key + (length - start), row.to(tl.int64),
            length.to(tl.int64), code, row * 0, mask, PAGE, WIDTH, BIGRAM, SINGLE, NAMES,
        )  # fmt: skip
        tl.atomic_add(w.counters + scratch.OPEN, 1, sem="relaxed")


_plan = Kernel(
    plan_kernel,
    ["*w", "*i64", "*i64", "*i64", "*i32", "*w", "*i64", "*w", "i64", "i64", "i64", "i64", "i32", "i32"],
)


def insert(
    arrays: Arrays, keys: Values, slots: Values, names: PerQuery, starts: PlaceAddresses, priorities: PerQuery,
    inserted: PerQuery, out: Output, call: int, may_compact: bool,
) -> None:  # fmt: skip
    """Insert a batch, all or nothing, in three launches, one more for long keys, and one if a compaction may be needed.

    names: as for `match`. slots: as many sequences as `keys`. inserted: the length up to which the same request has
    inserted before. Fills `out`, with -1 if the call is refused.
    """
    sizes = page_constants(arrays.page, arrays.bigram, 512)
    single = keys.offsets == 0
    shares = shares_of(arrays, keys) if starts.handles == 0 else None
    if shares:
        match_long(arrays, keys, shares, names, out, call, False, 0, plan=True)
    _plan(
        arrays, keys.batch,
        (
            keys.address, keys.offsets, names.address, starts.handles, starts.lengths, slots.address,
            0 if single else slots.offsets, keys.stage, keys.total, slots.total, _LARGEST[arrays.pool_wide],
            names.number, keys.batch, arrays.scratch.claims.shape[1] - 1,
        ),
        (*sizes, single, keys.stage != 0, names.address != 0, starts.handles != 0, shares is not None),
        (keys.wide, slots.wide, keys.wide),
    )  # fmt: skip
    if keys.stage:
        keys = keys._replace(address=keys.stage)
    settle(arrays, keys, names, may_compact, *sizes[:3])
    if may_compact:
        compact(arrays, False)
    build(arrays, keys, slots, names, priorities, inserted, out, call)
