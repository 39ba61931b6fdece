"""The third launch of an insert: write new leaves, cut edges, ticks and hits to the tree.

The launches before have checked that the whole batch is valid and fits. If the call is refused, this launch changes
nothing in the tree, sets the results to -1, and tells the host the refusal.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.children import enter, tags_of_lanes
from flatradix.kernels.gpu.climb import LEVELS, check_group, hint_leaf, hinted_group, next_group
from flatradix.kernels.gpu.cut import column, make_pieces, shorten_edges
from flatradix.kernels.gpu.finish import arrive, first_refusal, publish, wait_for_all
from flatradix.kernels.gpu.launch import Arrays, Kernel, Variant, cooperative_programs, device_function
from flatradix.kernels.gpu.rows import handle_of, take_rows
from flatradix.kernels.gpu.runs import outer_owners, owners, share
from flatradix.layout import dropped, mail, numbers, scratch
from flatradix.layout.queries import Output, PerQuery, Values

time_of = device_function(dropped.time_of)
made_below = device_function(dropped.made_below)

LANES = tl.constexpr(32)
QUERIES = tl.constexpr(128)
COPIED = tl.constexpr(1024)
MAX_HITS = tl.constexpr(numbers.MAX_HITS)
NEAR = tl.constexpr(1 << 30)  # more than a batch can add
NO_END = tl.constexpr(2**31 - 1)


@triton.jit
def _copy_new(
    s, w, values, offsets, slots, slot_offsets, pool, batch, units, programs,
    BIGRAM: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Copy this program's share of the new units to the pools, where units lie without a gap, in batch order."""
    cursor = tl.load(s.numbers + numbers.POOL_CURSOR)
    places = column(w, batch, scratch.Q_OFFSET)
    first, last = share(units, programs)
    begin = first.to(tl.int32)
    end = last.to(tl.int32)
    if begin < end:
        low, high = outer_owners(places, begin, end, batch, 0)
        while begin < end:
            unit = begin + tl.arange(0, COPIED)
            active = unit < end
            query = owners(places, tl.minimum(unit, end - 1), low, high, 0)
            known = tl.load(column(w, batch, scratch.Q_AT) + query) - tl.load(column(w, batch, scratch.Q_BEGIN) + query)
            known = (known + unit - tl.load(places + query)).to(tl.int64)
            token = known
            slot = known
            if not SINGLE:
                token = known + tl.load(offsets + query)
                slot = known + tl.load(slot_offsets + query)
            tokens = tl.load(values + token, mask=active, other=0).to(tl.int32)
            found = tl.load(slots + slot, mask=active, other=0).to(pool.dtype.element_ty)
            place = cursor + unit
            tl.store(s.tokens + place, tokens, mask=active)
            tl.store(pool + place, found, mask=active)
            if BIGRAM:
                second = tl.load(values + token + 1, mask=active, other=0)
                tl.store(s.seconds + place, second.to(tl.int32), mask=active)
            low = tl.max(query)
            begin += COPIED


@triton.jit
def _end_of(w, batch, query, rows, active):
    """Return for each lane the row at which the known part of its key ends after all cuts; 0 for the root. int64.

    The known part of a key is in the tree, or in the new leaf of another query of the batch.
    """
    edge = tl.load(column(w, batch, scratch.Q_EDGE) + query, mask=active, other=0)
    owner = tl.load(column(w, batch, scratch.Q_LEAF) + (edge - rows), mask=active & (edge >= rows), other=0)
    row = tl.where(edge >= rows, owner, edge)
    cut = active & (tl.load(column(w, batch, scratch.Q_CUT) + query, mask=active, other=0) > 0)
    place = tl.load(column(w, batch, scratch.Q_POSITION) + query, mask=cut, other=0)
    first = tl.load(column(w, batch, scratch.Q_FIRST) + place, mask=cut, other=0)
    piece = tl.load(column(w, batch, scratch.Q_NEW) + first, mask=cut, other=0)
    return tl.where(cut, piece, row).to(tl.int64)


@triton.jit
def _codes(names, name, query, active, NAMES: tl.constexpr):
    packed = tl.zeros_like(query).to(tl.int64) + name
    if NAMES:
        packed = tl.load(names + query, mask=active, other=0)
    return packed >> 1


@triton.jit
def _add_leaves(
    s, w, values, offsets, names, name, priorities, priority, batch, rows, clock, program, programs,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, SINGLE: tl.constexpr, NAMES: tl.constexpr, PRIORITIES: tl.constexpr,
):  # fmt: skip
    """Write the rows and the table entries of the new leaves.

    The edges above are not cut yet, and other programs may still copy the tokens to the pools. So the tags come from
    the keys, and the parents from the rows that are reserved for pieces of cut edges.
    """
    cursor = tl.load(s.numbers + numbers.POOL_CURSOR)
    first = program * LANES
    while first < batch:
        query = first + tl.arange(0, LANES)
        row = tl.load(column(w, batch, scratch.Q_LEAF) + query, mask=query < batch, other=-1).to(tl.int64)
        active = row >= 0
        row = tl.where(active, row, 0)
        above = _end_of(w, batch, query, rows, active)
        parent = tl.where(above > 0, above, ~_codes(names, name, query, active, NAMES))
        at = tl.load(column(w, batch, scratch.Q_AT) + query, mask=active, other=0).to(tl.int64)
        end = tl.load(column(w, batch, scratch.Q_END) + query, mask=active, other=0).to(tl.int64)
        start = cursor + tl.load(column(w, batch, scratch.Q_OFFSET) + query, mask=active, other=0)
        time = clock + 2 * (query.to(tl.int64) + 1)
        zero = tl.zeros([LANES], tl.int32)
        tl.store(s.parent + row, parent.to(tl.int32), mask=active)
        tl.store(s.start + row, start.to(tl.int32), mask=active)
        tl.store(s.length + row, (end - at).to(tl.int32), mask=active)
        tl.store(s.end + row, end.to(tl.int32), mask=active)
        tl.store(s.children + row, zero, mask=active)
        tl.store(s.lock_ref + row, zero, mask=active)
        tl.store(s.own_locks + row, zero, mask=active)
        tl.store(s.wanted + row, zero, mask=active)
        tl.store(s.own_wants + row, zero, mask=active)
        tl.store(s.hit_count + row, zero, mask=active)
        tl.store(s.tick + row, time, mask=active)
        dropped = tl.load(column(w, batch, scratch.Q_DROPPED) + query, mask=active, other=0).to(tl.int64)
        tl.store(s.created + row, made_below(-dropped, time), mask=active)
        tl.store(s.priority + row, _numbers(priorities, priority, query, active, PRIORITIES), mask=active)
        key = values + at - tl.load(column(w, batch, scratch.Q_BEGIN) + query, mask=active, other=0)
        if not SINGLE:
            key += tl.load(offsets + query, mask=active, other=0)
        tag = tags_of_lanes(s, key, key + 1, parent, active, PAGE, BIGRAM)
        enter(s, w, row, tag, start, end - at, active)
        first += programs * LANES


@triton.jit
def _numbers(many, one, query, active, MANY: tl.constexpr):
    """Return a number for each lane: `many[query]` if MANY, else `one`."""
    number = tl.zeros_like(query).to(tl.int64) + one
    if MANY:
        number = tl.load(many + query, mask=active, other=0)
    return number


@triton.jit
def _count_hits(s, row, on):
    """Add a hit to the rows of lanes that are `on`, up to MAX_HITS.

    The sum of a row near the limit may pass the limit. As a number without a sign it does not overflow, and each lane
    that may have passed the limit then lowers it to the limit.
    """
    hits = (s.hit_count + row).to(tl.pointer_type(tl.uint32))
    near = on & (tl.load(hits, mask=on, other=0) >= MAX_HITS - NEAR)
    tl.atomic_add(hits, tl.zeros_like(row).to(tl.uint32) + 1, mask=on, sem="relaxed")
    tl.atomic_min(hits, tl.zeros_like(row).to(tl.uint32) + MAX_HITS, mask=near, sem="relaxed")


@triton.jit
def _use_path(s, w, row, end, time, priority, inserted):
    """Update the ticks, priorities and hits of the nodes on each lane's path, from `row` up.

    A loop of single inserts counts a hit on a node that ends beyond `inserted` at the time of the query. If a later
    query of the batch has cut that node, the upper piece is created after `time`. The piece then counts with the end
    of the next node below that existed at `time`. end: of the new leaf below `row`, or NO_END.
    """
    level = tl.arange(0, LEVELS)
    below = (level[None, :] <= level[:, None])[None, :, :]
    time = time[:, None]
    going = row > 0
    rows, after = hinted_group(w, row)
    while tl.max(going.to(tl.int32)) > 0:
        rows, after, _parents, ends, _lengths = check_group(s, w, rows, after)
        on = rows > 0
        existed = on & (time_of(tl.load(s.created + rows, mask=on, other=0)) <= time)
        own = tl.where(existed, ends, NO_END)
        nearest = tl.minimum(tl.min(tl.where(below, own[:, None, :], NO_END), axis=2), end[:, None])
        hit = (nearest < NO_END) & (nearest > inserted[:, None])
        tl.atomic_max(s.tick + rows, time + tl.zeros_like(rows).to(tl.int64), mask=on, sem="relaxed")
        tl.atomic_max(s.priority + rows, priority[:, None] + tl.zeros_like(rows), mask=on, sem="relaxed")
        _count_hits(s, rows, on & hit)
        end = tl.min(nearest, axis=1)
        going = going & (tl.max(after, axis=1) > 0)
        rows, after = next_group(w, after, going)


@triton.jit
def _use(
    s, w, names, name, priorities, priority, inserteds, inserted, prefix_lengths, lengths, handles, batch, rows, clock,
    program, programs, NAMES: tl.constexpr, PRIORITIES: tl.constexpr, INSERTEDS: tl.constexpr,
):  # fmt: skip
    """Count the new children, update ticks, priorities and hits on the paths of all keys, and write the results."""
    first = program * LANES
    while first < batch:
        query = first + tl.arange(0, LANES)
        active = query < batch
        leaf = tl.load(column(w, batch, scratch.Q_LEAF) + query, mask=active, other=-1).to(tl.int64)
        above = _end_of(w, batch, query, rows, active)
        code = _codes(names, name, query, active, NAMES)
        one = tl.zeros([LANES], tl.int32) + 1
        tl.atomic_add(s.children + above, one, mask=(leaf >= 0) & (above > 0), sem="relaxed")
        tl.atomic_add(s.namespace_children + code, one, mask=(leaf >= 0) & (above == 0), sem="relaxed")
        end = tl.load(column(w, batch, scratch.Q_END) + query, mask=active, other=0)
        inserted_here = _numbers(inserteds, inserted, query, active, INSERTEDS)
        is_new = active & (leaf >= 0)
        tl.atomic_add(s.hit_count + leaf, one, mask=is_new & (end > inserted_here), sem="relaxed")
        # Another query of the batch may have cut the new leaf: pieces then lie between the leaf and the known part.
        parent = tl.maximum(tl.load(s.parent + leaf, mask=is_new, other=0), 0)
        next_above = tl.where(is_new, parent, tl.where(active, above, 0).to(tl.int32))
        hint_leaf(w, leaf, next_above, is_new)
        _use_path(
            s, w, next_above, tl.where(is_new, end, NO_END), clock + 2 * (query.to(tl.int64) + 1),
            _numbers(priorities, priority, query, active, PRIORITIES), inserted_here,
        )  # fmt: skip
        row = tl.where(active, tl.where(leaf >= 0, leaf, above), 0)
        at = tl.load(column(w, batch, scratch.Q_AT) + query, mask=active, other=0)
        tl.store(prefix_lengths + query, at, mask=active)
        tl.store(lengths + query, end, mask=active)
        tl.store(handles + query, handle_of(s, row), mask=active)
        first += programs * LANES


@triton.jit
def _refused(prefix_lengths, lengths, handles, batch, program, programs):
    first = program * QUERIES
    while first < batch:
        query = first + tl.arange(0, QUERIES)
        tl.store(prefix_lengths + query, -1, mask=query < batch)
        tl.store(lengths + query, -1, mask=query < batch)
        tl.store(handles + query, -1, mask=query < batch)
        first += programs * QUERIES


@triton.jit
def _update_counters(s, w, batch, clock):
    """Update the tree's counters and its clock. Only the last program to finish calls this."""
    units = tl.load(w.counters + scratch.NEW_UNITS)
    evictable = tl.load(s.numbers + numbers.EVICTABLE)
    cursor = tl.load(s.numbers + numbers.POOL_CURSOR)
    take_rows(s, tl.load(w.counters + scratch.NEW_ROWS))
    tl.debug_barrier()
    tl.store(s.numbers + numbers.EVICTABLE, evictable + units)
    tl.store(s.numbers + numbers.POOL_CURSOR, cursor + units)
    tl.store(s.numbers + numbers.CLOCK, clock + 2 * batch)


@triton.jit
def build_nodes(
    s, w, values, offsets, names, slots, slot_offsets, priorities, inserteds, pool, prefix_lengths, lengths, handles,
    name, priority, inserted, batch, rows, clock, error, cuts, program, programs,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, SINGLE: tl.constexpr, NAMES: tl.constexpr, PRIORITIES: tl.constexpr,
    INSERTEDS: tl.constexpr,
):  # fmt: skip
    """Write what `number_nodes` has numbered to the tree, or the refusal to the results. All programs call this.

    SINGLE: the batch is one key, without offsets.
    """
    if error == scratch.NO_ERROR:
        units = tl.load(w.counters + scratch.NEW_UNITS)
        _add_leaves(
            s, w, values, offsets, names, name, priorities, priority, batch, rows, clock, program, programs,
            PAGE, BIGRAM, SINGLE, NAMES, PRIORITIES,
        )  # fmt: skip
        _copy_new(s, w, values, offsets, slots, slot_offsets, pool, batch, units, programs, BIGRAM, SINGLE)
        if cuts > 0:
            wait_for_all(w, programs)
            make_pieces(s, w, batch, cuts, rows, clock, program, programs, PAGE, BIGRAM, True, 2, False)
            wait_for_all(w, programs)
            shorten_edges(s, w, batch, cuts, rows, clock, program, programs, PAGE, BIGRAM, True, 2)
        wait_for_all(w, programs)
        _use(
            s, w, names, name, priorities, priority, inserteds, inserted, prefix_lengths, lengths, handles, batch,
            rows, clock, program, programs, NAMES, PRIORITIES, INSERTEDS,
        )  # fmt: skip
    else:
        _refused(prefix_lengths, lengths, handles, batch, program, programs)


@triton.jit
def finish_insert(s, w, batch, clock, call, error):
    """Update the tree's counters and tell the host the sizes, or the refusal. The last program to finish calls this."""
    if error == scratch.NO_ERROR:
        _update_counters(s, w, batch, clock)
    tl.store(w.counters + scratch.CUTS, 0)
    tl.store(w.counters + scratch.CUT_COUNT, 0)
    publish(s, w, call, error, mail.INSERT)


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "slots", "slot_offsets", "priorities", "inserteds", "pool", "prefix_lengths",
        "lengths", "handles", "name", "priority", "inserted", "batch", "rows", "call",
    ]
)  # fmt: skip
def build_kernel(
    s, w, values, offsets, names, slots, slot_offsets, priorities, inserteds, pool, prefix_lengths, lengths, handles,
    name: tl.int64, priority: tl.int64, inserted: tl.int64, batch: tl.int32, rows: tl.int32, call: tl.int64,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, NAMES: tl.constexpr, PRIORITIES: tl.constexpr, INSERTEDS: tl.constexpr,
):  # fmt: skip
    """Write the result of `settle_kernel` to the tree, or the refusal to the results."""
    programs = tl.num_programs(0)
    error = first_refusal(w)
    clock = tl.load(s.numbers + numbers.CLOCK)
    cuts = tl.load(w.counters + scratch.CUT_COUNT).to(tl.int32)
    build_nodes(
        s, w, values, offsets, names, slots, slot_offsets, priorities, inserteds, pool, prefix_lengths, lengths,
        handles, name, priority, inserted, batch, rows, clock, error, cuts, tl.program_id(0), programs,
        PAGE, BIGRAM, False, NAMES, PRIORITIES, INSERTEDS,
    )  # fmt: skip
    last, _bad = arrive(w, programs)
    if last:
        finish_insert(s, w, batch, clock, call.to(tl.int64), error)


_build = Kernel(
    build_kernel,
    [
        "*w", "*i64", "*i64", "*w", "*i64", "*i64", "*i64", "*w", "*i32", "*i32", "*i64",
        "i64", "i64", "i64", "i32", "i32", "i64",
    ],
    cooperative=True,
)  # fmt: skip


def build_variant(
    page: int, bigram: bool, names: bool, priorities: bool, inserted: bool, wide: tuple[bool, bool, bool]
) -> Variant:
    """Return the variant of `build_kernel`. wide: of the keys, the slots, and the pool."""
    return _build.variant((page, bigram, names, priorities, inserted), wide)


def build_programs(arrays: Arrays, batch: int, total: int) -> int:
    return cooperative_programs(arrays, max(-(-batch // LANES.value), -(-total // COPIED.value)))


def build(
    arrays: Arrays, variant: Variant, programs: int, keys: Values, slots: Values, names: PerQuery,
    priorities: PerQuery, inserted: PerQuery, out: Output, call: int,
) -> None:  # fmt: skip
    """Write the result of `settle` to the tree. Arguments as for `insert`."""
    _build(
        arrays, programs,
        (
            keys.address, keys.offsets, names.address, slots.address, slots.offsets, priorities.address,
            inserted.address, arrays.pool, out.prefix_lengths, out.lengths, out.handles, names.number,
            priorities.number, inserted.number, keys.batch, arrays.rows, call,
        ),
        variant.constants, variant.wide,
    )  # fmt: skip
