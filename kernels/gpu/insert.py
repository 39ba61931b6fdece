"""Insert, in three launches: plan (walk and check every key, form groups), settle (owners of new units), build (write).

Several keys of a batch may share a part that the tree does not have. The first query with the part owns it. Ownership
is settled in rounds. The keys that leave the tree at the same point with the same next page form a group. The lowest
query of the group takes the rest of its key as a new leaf. The other queries compare their keys with that leaf, token
by token. Each ends in the leaf, or leaves it further on and takes part in the next round. One round suffices if all new
parts differ; most batches take two or three. Nothing is written to the tree before the whole batch is known to be valid
and to fit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from flatradix.kernels import native
from flatradix.kernels.gpu.build import build, build_programs, build_variant
from flatradix.kernels.gpu.claim import claim
from flatradix.kernels.gpu.compact import compact, compact_programs, compact_variant
from flatradix.kernels.gpu.cut import column, note_cut, put
from flatradix.kernels.gpu.finish import refuse
from flatradix.kernels.gpu.launch import Arrays, Kernel, Variant, cooperative_programs, direct_stream, raise_driver
from flatradix.kernels.gpu.long import match_long, shares_of
from flatradix.kernels.gpu.settle import settle, settle_variant
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
from flatradix.layout.queries import Desk, Output, PerQuery, PlaceAddresses, Values

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
    dropped = row * 0
    if START:
        dropped = (tl.load(s.created + row) < 0).to(tl.int32)
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
    put(w, batch, query, dropped, scratch.Q_DROPPED)
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


class _Variants(NamedTuple):
    """The variants of the launches of an insert, in order."""

    plan: Variant
    settle: Variant
    compact: Variant
    build: Variant


@functools.cache
def _variants(
    page: int, bigram: bool, single: bool, staged: bool, names: bool, starts: bool, long: bool, priorities: bool,
    inserted: bool, wide: bool, slots_wide: bool, pool_wide: bool,
) -> _Variants:  # fmt: skip
    sizes = page_constants(page, bigram, 512)
    return _Variants(
        _plan.variant((*sizes, single, staged, names, starts, long), (wide, slots_wide, wide)),
        settle_variant(*sizes[:3], single, names, wide),
        compact_variant(page, bigram, pool_wide),
        build_variant(page, bigram, single, names, priorities, inserted, (wide, slots_wide, pool_wide)),
    )


def insert(
    arrays: Arrays, desk: Desk, keys: Values, slots: Values, names: PerQuery, starts: PlaceAddresses,
    priorities: PerQuery, inserted: PerQuery, out: Output, call: int, may_compact: bool,
) -> bool:  # fmt: skip
    """Insert a batch, all or nothing, in three launches, one more for long keys, and one if a compaction may be needed.

    Returns False if too few pinned buffers are free for a single key, or slots, in host memory: nothing is launched
    then. names: as for `match`. slots: as many sequences as `keys`. inserted: the length up to which the same request
    has inserted before. Fills `out`, with -1 if the call is refused.
    """
    shares = None if starts.handles or keys.on_host else shares_of(arrays, keys)
    if shares:
        match_long(arrays, keys, shares, names, out, call, False, 0, plan=True)
    variants = _variants(
        arrays.page, arrays.bigram, keys.offsets == 0, keys.on_host, names.address != 0, starts.handles != 0,
        shares is not None, priorities.address != 0, inserted.address != 0, keys.wide and not keys.on_host,
        slots.wide and not slots.on_host, arrays.pool_wide,
    )  # fmt: skip
    records = _records(arrays, variants, may_compact)
    if records is None or (stream := direct_stream(arrays.device)) < 0:
        return _insert(arrays, variants, desk, keys, slots, names, starts, priorities, inserted, out, call, may_compact)
    code = native.start_insert.call(
        *records, cooperative_programs(arrays, keys.batch), compact_programs(arrays) if may_compact else 0,
        build_programs(arrays, keys.batch, keys.total), stream, desk.address, desk.staging if keys.on_host else 0,
        keys.address, keys.wide, keys.offsets, slots.address, slots.on_host, slots.wide, slots.offsets,
        names.address, names.number, starts.handles, starts.lengths, keys.total, slots.total,
        _LARGEST[arrays.pool_wide], keys.batch, _mask(arrays), arrays.rows, arrays.pool, priorities.address,
        priorities.number, inserted.address, inserted.number, out.prefix_lengths, out.lengths, out.handles, call,
    )  # fmt: skip
    if code > 0:
        raise_driver(code)
    return code == 0


def _mask(arrays: Arrays) -> int:
    return 4 * arrays.batch - 1


def _records(arrays: Arrays, variants: _Variants, may_compact: bool) -> tuple[int, int, int, int] | None:
    """Return the records of the launches, 0 for a compaction that is not needed; None if one is not direct yet."""
    plan, settles, compacts, builds = map(arrays.direct.get, variants)
    if plan is None or settles is None or builds is None or (may_compact and compacts is None):
        return None
    return plan.record, settles.record, compacts.record if may_compact and compacts else 0, builds.record


def _staged(desk: Desk, ahead: int, values: Values) -> Values:
    """Return values in host memory in a pinned buffer, at address 0 if none is free; other values as they are."""
    if not values.on_host:
        return values
    address = native.stage.call(desk.address, ahead, values.address, values.total, values.wide)
    return values._replace(address=address, wide=False)


def _insert(
    arrays: Arrays, variants: _Variants, desk: Desk, keys: Values, slots: Values, names: PerQuery,
    starts: PlaceAddresses, priorities: PerQuery, inserted: PerQuery, out: Output, call: int, may_compact: bool,
) -> bool:  # fmt: skip
    """Do what `insert` does, launch by launch."""
    keys, slots = _staged(desk, 0, keys), _staged(desk, int(keys.on_host), slots)
    if any(one.on_host and one.address == 0 for one in (keys, slots)):
        return False
    stage, mask = desk.staging if keys.on_host else 0, _mask(arrays)
    _plan(
        arrays, keys.batch,
        (
            keys.address, keys.offsets, names.address, starts.handles, starts.lengths, slots.address, slots.offsets,
            stage, keys.total, slots.total, _LARGEST[arrays.pool_wide], names.number, keys.batch, mask,
        ),
        variants.plan.constants, variants.plan.wide,
    )  # fmt: skip
    key = keys._replace(address=stage) if stage else keys
    settle(arrays, variants.settle, cooperative_programs(arrays, keys.batch), key, names, mask, may_compact)
    if may_compact:
        compact(arrays, False)
    programs = build_programs(arrays, keys.batch, keys.total)
    build(arrays, variants.build, programs, key, slots, names, priorities, inserted, out, call)
    for _ in range(keys.on_host + slots.on_host):
        native.commit.call(desk.address, call)
    return True
