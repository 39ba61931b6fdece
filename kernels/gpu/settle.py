"""The second launch of an insert: decide which query owns which new units, which edges are cut, and where units go.

The queries are settled in rounds on the GPU, without the host: one round if all new parts differ, mostly two or three.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.claim import claim, claims_of, clear_claim, equal_tokens, key_at
from flatradix.kernels.gpu.cut import column, compare_cuts, get, list_cuts, note_cut, number_cuts, put
from flatradix.kernels.gpu.finish import arrive, first_refusal, refuse, wait_for_all
from flatradix.kernels.gpu.launch import Arrays, Kernel, Variant
from flatradix.kernels.gpu.rows import row_number
from flatradix.kernels.gpu.walk import name_of
from flatradix.layout import numbers, reasons, scratch
from flatradix.layout.queries import PerQuery, Values

NUMBERED = tl.constexpr(1024)
COMPARED = tl.constexpr(1024)


@triton.jit
def _settle_one(
    w, values, offsets, query, batch, rows, claims, PAGE: tl.constexpr, BIGRAM: tl.constexpr,
):  # fmt: skip
    """Settle one key in a round. Return 1 if the key is still open after it, else 0.

    The owner of a group gets a new leaf. Another key of the group follows that leaf as far as both are equal.
    """
    owner = tl.load(claims + get(w, batch, query, scratch.Q_GROUP), volatile=True).to(tl.int64)
    at = get(w, batch, query, scratch.Q_AT)
    end = get(w, batch, query, scratch.Q_END)
    opens = tl.zeros([], tl.int64)
    tl.debug_barrier()  # all warps have read what one of them is about to write
    if owner == query:
        put(w, batch, query, at * 0, scratch.Q_LEAF)
    else:
        their_end = get(w, batch, owner, scratch.Q_END)
        ours = key_at(values, offsets, w, batch, query, at)
        theirs = key_at(values, offsets, w, batch, owner, at)
        count = tl.minimum(end, their_end) - at + BIGRAM
        equal = tl.maximum(equal_tokens(ours, theirs, count, COMPARED) - BIGRAM, 0)
        at += equal - equal % PAGE
        opens = (at < end).to(tl.int64)
        put(w, batch, query, at, scratch.Q_AT)
        put(w, batch, query, rows + owner, scratch.Q_EDGE)
        note_cut(w, batch, query, rows + owner, at, at < their_end)
    put(w, batch, query, opens, scratch.Q_OPEN)
    return opens


@triton.jit
def _number_leaves(s, w, batch, made):
    """Assign rows to the new leaves, after the `made` rows of pieces, and set where the units of each leaf go.

    Returns (all new rows, all new units).
    """
    units = tl.zeros([], tl.int64)
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, NUMBERED)
        active = query < batch
        leads = active & (tl.load(column(w, batch, scratch.Q_LEAF) + query, mask=active, other=-1) >= 0)
        end = tl.load(column(w, batch, scratch.Q_END) + query, mask=active, other=0)
        at = tl.load(column(w, batch, scratch.Q_AT) + query, mask=active, other=0)
        own = tl.where(leads, end - at, 0).to(tl.int64)
        row = row_number(s, made + tl.cumsum(leads.to(tl.int64)) - 1, leads)
        tl.store(column(w, batch, scratch.Q_LEAF) + query, row.to(tl.int32), mask=leads)
        tl.store(column(w, batch, scratch.Q_OFFSET) + query, (units + tl.cumsum(own) - own).to(tl.int32), mask=active)
        made += tl.sum(leads.to(tl.int64))
        units += tl.sum(own)
        first += NUMBERED
    return made, units


@triton.jit
def _reserve(s, w, made, units, may_compact):
    """Check whether the new units fit into the tree, and whether the pools must be compacted first.

    Stores the numbers of new units and new rows for `build_kernel`.
    """
    total = tl.load(s.numbers + numbers.EVICTABLE) + tl.load(s.numbers + numbers.PROTECTED) + units
    if total > tl.load(s.numbers + numbers.MAX_TOKENS):
        free = tl.load(s.numbers + numbers.MAX_TOKENS) - (total - units)
        refuse(w, units * 0, reasons.NO_CAPACITY, (units << reasons.FREE_BITS) | free)
    elif tl.load(s.numbers + numbers.POOL_CURSOR) + units > tl.load(s.numbers + numbers.POOL_END):
        if may_compact > 0:
            tl.store(w.counters + scratch.COMPACT, 1)
        else:
            refuse(w, units * 0, reasons.NO_POOL_SPACE, units)
    tl.store(w.counters + scratch.NEW_UNITS, units)
    tl.store(w.counters + scratch.NEW_ROWS, made)


@triton.jit
def number_nodes(s, w, batch, cuts, may_compact):
    """Assign rows to all new nodes and positions to all new units, or refuse the call. cuts: as from `list_cuts`."""
    made = number_cuts(s, w, batch, cuts)
    made, units = _number_leaves(s, w, batch, made)
    _reserve(s, w, made, units, may_compact)


@triton.jit(do_not_specialize=["values", "offsets", "names", "name", "batch", "rows", "mask", "may_compact"])
def settle_kernel(
    s, w, values, offsets, names, name: tl.int64, batch: tl.int32, rows: tl.int32, mask: tl.int32,
    may_compact: tl.int32,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, NAMES: tl.constexpr,
):  # fmt: skip
    """Settle which query owns which new units, which edges are cut, and the rows and positions of all new nodes.

    `plan_kernel` has made the claims of the first round. Each round ends with a barrier.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    good = first_refusal(w) == scratch.NO_ERROR
    open_queries = tl.load(w.counters + scratch.OPEN, volatile=True)
    this_round = tl.zeros([], tl.int32)
    while good & (open_queries > 0):
        if this_round > 0:
            query = program.to(tl.int64)
            while query < batch:
                clear_claim(w, batch, query, this_round - 1, mask)
                if get(w, batch, query, scratch.Q_OPEN) > 0:
                    edge = get(w, batch, query, scratch.Q_EDGE)
                    at = get(w, batch, query, scratch.Q_AT)
                    code, _named = name_of(names, name, query, NAMES)
                    key = key_at(values, offsets, w, batch, query, at)
                    claim(
                        s, w, values, offsets, names, name, query.to(tl.int32), batch, key, edge, at, code, this_round,
                        mask, PAGE, WIDTH, BIGRAM, NAMES,
                    )  # fmt: skip
                query += programs
            wait_for_all(w, programs)
        query = program.to(tl.int64)
        still = tl.zeros([], tl.int64)
        while query < batch:
            if get(w, batch, query, scratch.Q_OPEN) > 0:
                still += _settle_one(
                    w, values, offsets, query, batch, rows, claims_of(w, this_round, mask), PAGE, BIGRAM
                )
            query += programs
        if still > 0:
            tl.atomic_add(w.counters + scratch.OPEN + 1 - this_round % 2, still, sem="relaxed")
        wait_for_all(w, programs)
        open_queries = tl.load(w.counters + scratch.OPEN + 1 - this_round % 2, volatile=True)
        if program == 0:
            tl.store(w.counters + scratch.OPEN + this_round % 2, 0)
        this_round += 1
    query = program.to(tl.int64)
    while query < batch:
        clear_claim(w, batch, query, tl.maximum(this_round - 1, 0), mask)
        query += programs
    if good:
        count = tl.zeros([], tl.int32)
        if tl.load(w.counters + scratch.CUTS, volatile=True) > 0:
            if program == 0:
                tl.store(w.counters + scratch.CUT_COUNT, list_cuts(w, batch).to(tl.int64))
            wait_for_all(w, programs)
            count = tl.load(w.counters + scratch.CUT_COUNT, volatile=True).to(tl.int32)
            compare_cuts(w, batch, count, program, programs)
            wait_for_all(w, programs)
        if program == 0:
            number_nodes(s, w, batch, count, may_compact)
    last, _bad = arrive(w, programs)
    if last:
        tl.store(w.counters + scratch.ARRIVED, 0)
        tl.store(w.counters + scratch.WAITING, 0)
        tl.store(w.counters + scratch.OPEN, 0)
        tl.store(w.counters + scratch.OPEN + 1, 0)


_settle = Kernel(settle_kernel, ["*w", "*i64", "*i64", "i64", "i32", "i32", "i32", "i32"], cooperative=True)


def settle_variant(page: int, width: int, bigram: bool, names: bool, wide: bool) -> Variant:
    """Return the variant of `settle_kernel`. page, width, bigram: as from `page_constants`."""
    return _settle.variant((page, width, bigram, names), (wide,))


def settle(
    arrays: Arrays, variant: Variant, programs: int, keys: Values, names: PerQuery, mask: int, may_compact: bool
) -> None:
    """Settle a batch that `plan_kernel` has walked. mask: of the tables of claims.

    may_compact: whether a compaction follows if the pools lack space. Without one, a batch that needs it is refused.
    """
    _settle(
        arrays, programs,
        (
            keys.address, keys.offsets, names.address, names.number, keys.batch, arrays.rows, mask, int(may_compact),
        ),
        variant.constants, variant.wide,
    )  # fmt: skip
