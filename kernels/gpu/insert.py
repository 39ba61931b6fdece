"""Insert a batch, in three launches.

plan: walk and check every key, form groups. settle: find the owners of new units. build: write.

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
from flatradix.kernels.gpu.cut import put
from flatradix.kernels.gpu.launch import Arrays, Kernel, Variant, cooperative_programs, direct_stream, raise_driver
from flatradix.kernels.gpu.long import match_long, shares_of
from flatradix.kernels.gpu.plan import LARGEST_SLOTS, plan_key
from flatradix.kernels.gpu.settle import settle, settle_variant
from flatradix.kernels.gpu.walk import key_range, name_of, page_constants
from flatradix.layout import scratch
from flatradix.layout.queries import Output, PerQuery, PlaceAddresses, Values


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "start_handles", "start_lengths", "slots", "slot_offsets", "total", "slot_total",
        "limit", "name", "batch", "mask",
    ]
)  # fmt: skip
def plan_kernel(
    s, w, values, offsets, names, start_handles, start_lengths, slots, slot_offsets, total: tl.int64,
    slot_total: tl.int64, limit: tl.int64, name: tl.int64, batch: tl.int32, mask: tl.int32,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, NAMES: tl.constexpr,
    START: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Walk and check one key, and join a group. LONG: as for `plan_key`."""
    query = tl.program_id(0)
    place, count, good = key_range(offsets, query, batch, total, False)
    slot_place, slot_count, slots_good = key_range(slot_offsets, query, batch, slot_total, False)
    key = values + place
    code, named = name_of(names, name, query, NAMES)
    row, length, start, opens, _cuts = plan_key(
        s, w, key, slots + slot_place, count, slot_count, good & slots_good, query, batch, code, named, start_handles,
        start_lengths, limit, PAGE, WIDTH, BIGRAM, BLOCK, START, LONG,
    )  # fmt: skip
    put(w, batch, query, opens, scratch.Q_OPEN)
    put(w, batch, query, row * 0 - 1, scratch.Q_LEAF)
    put(w, batch, query, row * 0 - 1, scratch.Q_ROUND)
    if opens:
        claim(
            s, w, values, offsets, names, name, query, batch, key + (length - start), row.to(tl.int64),
            length.to(tl.int64), code, row * 0, mask, PAGE, WIDTH, BIGRAM, NAMES,
        )  # fmt: skip
        tl.atomic_add(w.counters + scratch.OPEN, 1, sem="relaxed")


_plan = Kernel(
    plan_kernel,
    ["*w", "*i64", "*i64", "*i64", "*i32", "*w", "*i64", "i64", "i64", "i64", "i64", "i32", "i32"],
)


class _Variants(NamedTuple):
    """The variants of the launches of an insert, in order."""

    plan: Variant
    settle: Variant
    compact: Variant
    build: Variant


@functools.cache
def _variants(
    page: int, bigram: bool, names: bool, starts: bool, long: bool, priorities: bool, inserted: bool, wide: bool,
    slots_wide: bool, pool_wide: bool,
) -> _Variants:  # fmt: skip
    sizes = page_constants(page, bigram, 512)
    return _Variants(
        _plan.variant((*sizes, names, starts, long), (wide, slots_wide)),
        settle_variant(*sizes[:3], names, wide),
        compact_variant(page, bigram, pool_wide),
        build_variant(page, bigram, names, priorities, inserted, (wide, slots_wide, pool_wide)),
    )


def insert(
    arrays: Arrays, keys: Values, slots: Values, names: PerQuery, starts: PlaceAddresses, priorities: PerQuery,
    inserted: PerQuery, out: Output, call: int, may_compact: bool,
) -> None:  # fmt: skip
    """Insert a batch, all or nothing, in three launches, one more for long keys, and one if a compaction may be needed.

    names: as for `match`. slots: as many sequences as `keys`, both on the device with offsets. inserted: the length up
    to which the same request has inserted before. Fills `out`, with -1 if the call is refused.
    """
    shares = None if starts.handles else shares_of(arrays, keys)
    if shares:
        match_long(arrays, keys, shares, names, out, call, False, 0, plan=True)
    variants = _variants(
        arrays.page, arrays.bigram, names.address != 0, starts.handles != 0, shares is not None,
        priorities.address != 0, inserted.address != 0, keys.wide, slots.wide, arrays.pool_wide,
    )  # fmt: skip
    records = _records(arrays, variants, may_compact)
    if records is None or (stream := direct_stream(arrays.device)) < 0:
        _insert(arrays, variants, keys, slots, names, starts, priorities, inserted, out, call, may_compact)
    elif code := native.start_insert.call(
        *records, cooperative_programs(arrays, keys.batch), compact_programs(arrays) if may_compact else 0,
        build_programs(arrays, keys.batch, keys.total), stream, keys.address, keys.offsets, slots.address,
        slots.offsets, names.address, names.number, starts.handles, starts.lengths, keys.total, slots.total,
        LARGEST_SLOTS[arrays.pool_wide], keys.batch, _mask(arrays), arrays.rows, arrays.pool, priorities.address,
        priorities.number, inserted.address, inserted.number, out.prefix_lengths, out.lengths, out.handles, call,
    ):  # fmt: skip
        raise_driver(code)


def _mask(arrays: Arrays) -> int:
    return 4 * arrays.batch - 1


def _records(arrays: Arrays, variants: _Variants, may_compact: bool) -> tuple[int, int, int, int] | None:
    """Return the records of the launches, 0 for a compaction that is not needed; None if one is not direct yet."""
    plan, settles, compacts, builds = map(arrays.direct.get, variants)
    if plan is None or settles is None or builds is None or (may_compact and compacts is None):
        return None
    return plan.record, settles.record, compacts.record if may_compact and compacts else 0, builds.record


def _insert(
    arrays: Arrays, variants: _Variants, keys: Values, slots: Values, names: PerQuery, starts: PlaceAddresses,
    priorities: PerQuery, inserted: PerQuery, out: Output, call: int, may_compact: bool,
) -> None:  # fmt: skip
    """Do what `insert` does, launch by launch."""
    mask = _mask(arrays)
    _plan(
        arrays, keys.batch,
        (
            keys.address, keys.offsets, names.address, starts.handles, starts.lengths, slots.address, slots.offsets,
            keys.total, slots.total, LARGEST_SLOTS[arrays.pool_wide], names.number, keys.batch, mask,
        ),
        variants.plan.constants, variants.plan.wide,
    )  # fmt: skip
    settle(arrays, variants.settle, cooperative_programs(arrays, keys.batch), keys, names, mask, may_compact)
    if may_compact:
        compact(arrays, False)
    programs = build_programs(arrays, keys.batch, keys.total)
    build(arrays, variants.build, programs, keys, slots, names, priorities, inserted, out, call)
