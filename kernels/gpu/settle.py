"""The second launch of an insert: who owns what is new, which edges are cut, and where everything goes.

Rounds among the queries of the batch, on the GPU alone: one where all that is new differs, two or three mostly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix import meta
from flatradix.kernels.gpu.children import page_at, tag_of
from flatradix.kernels.gpu.cut import column, compare_cuts, get, list_cuts, number_cuts, put
from flatradix.kernels.gpu.finish import first_refusal, is_last, refuse, wait_for_all
from flatradix.kernels.gpu.launch import Bound, Kernel, resident
from flatradix.kernels.gpu.rows import row_number
from flatradix.kernels.gpu.walk import name_of
from flatradix.refusals import FREE_BITS, NO_CAPACITY, NO_ROOM

TOO_MUCH = tl.constexpr(NO_CAPACITY)
NO_POOL = tl.constexpr(NO_ROOM)
ROOM_BITS = tl.constexpr(FREE_BITS)
QUERIES = tl.constexpr(128)
COMPARED = tl.constexpr(1024)


@triton.jit
def _key_at(values, offsets, w, batch, query, at, SINGLE: tl.constexpr):
    """Pointer to the token of a key at path length `at`."""
    begin = tl.zeros([], tl.int64)
    if not SINGLE:
        begin = tl.load(offsets + query)
    return values + begin + (at - get(w, batch, query, meta.Q_BEGIN))


@triton.jit
def _equal_tokens(a, b, count, BLOCK: tl.constexpr):
    """Equal tokens at the beginning of two runs, scalar."""
    equal = tl.zeros([], tl.int64)
    going = count > 0
    while going:
        j = tl.arange(0, BLOCK)
        inside = equal + j < count
        different = tl.load(a + equal + j, mask=inside, other=0) != tl.load(b + equal + j, mask=inside, other=0)
        first = tl.min(tl.where(different, j, BLOCK)).to(tl.int64)
        equal = tl.minimum(equal + first, count)
        going = (first == BLOCK) & (equal < count)
    return equal


@triton.jit
def _claim(
    s, w, values, offsets, names, name, query, batch, claims, mask,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, SINGLE: tl.constexpr, NAMES: tl.constexpr,
):  # fmt: skip
    """Join the group of the keys that leave at the same place with the same page; the lowest query stands for it."""
    edge = get(w, batch, query, meta.Q_EDGE)
    at = get(w, batch, query, meta.Q_AT)
    code, _named = name_of(names, name, query, NAMES)
    key = _key_at(values, offsets, w, batch, query, at, SINGLE)
    parent = tl.where(edge > 0, edge, ~code.to(tl.int64)) ^ (at << 32)
    page = page_at(key, 0, PAGE, PAGE, WIDTH)
    place = tag_of(s, page, page_at(key + 1, 0, PAGE, PAGE, WIDTH), parent, PAGE, WIDTH, BIGRAM) & mask
    joined = False
    while not joined:
        other = tl.atomic_cas(claims + place, -1, query, sem="relaxed")
        joined = other == -1
        if not joined:
            their_code, _theirs = name_of(names, name, other, NAMES)
            alike = (get(w, batch, other, meta.Q_EDGE) == edge) & (get(w, batch, other, meta.Q_AT) == at)
            alike = alike & ((edge > 0) | (their_code == code))
            if alike:
                theirs = _key_at(values, offsets, w, batch, other, at, SINGLE)
                alike = _equal_tokens(key, theirs, at * 0 + PAGE + BIGRAM, WIDTH) == PAGE + BIGRAM
            if alike:
                tl.atomic_min(claims + place, query, sem="relaxed")
                joined = other >= 0
            else:
                place = (place + 1) & mask
    put(w, batch, query, place, meta.Q_GROUP)


@triton.jit
def _settle_one(
    w, values, offsets, query, batch, rows, claims,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """One key of a round: the owner's new leaf, or as far along it as the key goes; returns 1 if it is still open."""
    owner = tl.load(claims + get(w, batch, query, meta.Q_GROUP), volatile=True).to(tl.int64)
    at = get(w, batch, query, meta.Q_AT)
    end = get(w, batch, query, meta.Q_END)
    opens = tl.zeros([], tl.int64)
    if owner == query:
        put(w, batch, query, at * 0, meta.Q_LEAF)
    else:
        shorter = tl.minimum(end, get(w, batch, owner, meta.Q_END)) - at
        ours = _key_at(values, offsets, w, batch, query, at, SINGLE)
        theirs = _key_at(values, offsets, w, batch, owner, at, SINGLE)
        equal = tl.maximum(_equal_tokens(ours, theirs, shorter + BIGRAM, COMPARED) - BIGRAM, 0)
        at += equal - equal % PAGE
        put(w, batch, query, at, meta.Q_AT)
        put(w, batch, query, rows + owner, meta.Q_EDGE)
        opens = (at < end).to(tl.int64)
    put(w, batch, query, opens, meta.Q_OPEN)
    return opens


@triton.jit
def _find_cuts(s, w, batch, rows, program, programs):
    """Note which edges, old ones and new leaves, the keys cut."""
    first = program * QUERIES
    while first < batch:
        query = first + tl.arange(0, QUERIES)
        active = query < batch
        edge = tl.load(column(w, batch, meta.Q_EDGE) + query, mask=active, other=0)
        at = tl.load(column(w, batch, meta.Q_AT) + query, mask=active, other=0)
        is_new = edge >= rows
        old_end = tl.load(s.end + edge, mask=active & (edge > 0) & (edge < rows), other=0)
        new_end = tl.load(column(w, batch, meta.Q_END) + (edge - rows), mask=active & is_new, other=0)
        cuts = active & (edge > 0) & (at < tl.where(is_new, new_end, old_end))
        tl.store(column(w, batch, meta.Q_ROW) + query, edge, mask=active)
        tl.store(column(w, batch, meta.Q_CUT) + query, tl.where(cuts, at, 0), mask=active)
        first += programs * QUERIES


@triton.jit
def _number_leaves(s, w, batch, made):
    """Rows of the new leaves, after `made` others, and where each leaf's units go; returns (rows in all, units)."""
    units = tl.zeros([], tl.int64)
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, QUERIES)
        active = query < batch
        leads = active & (tl.load(column(w, batch, meta.Q_LEAF) + query, mask=active, other=-1) >= 0)
        end = tl.load(column(w, batch, meta.Q_END) + query, mask=leads, other=0)
        own = (end - tl.load(column(w, batch, meta.Q_AT) + query, mask=leads, other=0)).to(tl.int64)
        row = row_number(s, made + tl.cumsum(leads.to(tl.int64)) - 1, leads)
        tl.store(column(w, batch, meta.Q_LEAF) + query, row.to(tl.int32), mask=leads)
        tl.store(column(w, batch, meta.Q_OFFSET) + query, (units + tl.cumsum(own) - own).to(tl.int32), mask=active)
        made += tl.sum(leads.to(tl.int64))
        units += tl.sum(own)
        first += QUERIES
    return made, units


@triton.jit
def _reserve(s, w, made, units, may_compact):
    """See whether all of it fits, and whether the pools have to be compacted first."""
    total = tl.load(s.meta + meta.EVICTABLE) + tl.load(s.meta + meta.PROTECTED) + units
    if total > tl.load(s.meta + meta.MAX_TOKENS):
        free = tl.load(s.meta + meta.MAX_TOKENS) - (total - units)
        refuse(w, units * 0, TOO_MUCH, (units << ROOM_BITS) | free)
    elif tl.load(s.meta + meta.POOL_CURSOR) + units > tl.load(s.meta + meta.POOL_END):
        if may_compact > 0:
            tl.store(w.number + meta.COMPACT, 1)
        else:
            refuse(w, units * 0, NO_POOL, units)
    tl.store(w.number + meta.NEEDED, units)
    tl.store(w.number + meta.TOTAL, made)


@triton.jit(do_not_specialize=["values", "offsets", "names", "name", "batch", "rows", "mask", "may_compact"])
def settle_kernel(
    s, w, values, offsets, names, name: tl.int64, batch: tl.int32, rows: tl.int32, mask: tl.int32,
    may_compact: tl.int32,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, SINGLE: tl.constexpr, NAMES: tl.constexpr,
):  # fmt: skip
    """Settle who owns what is new, which edges are cut, and what everything is called and where it goes."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    good = first_refusal(w) == meta.NO_ERROR
    open_queries = tl.load(w.number + meta.OPEN, volatile=True)
    turn = tl.zeros([], tl.int32)
    while good & (open_queries > 0):
        claims = w.claims + (turn % 2) * (mask + 1)
        last_claims = w.claims + ((turn + 1) % 2) * (mask + 1)
        query = program.to(tl.int64)
        while query < batch:
            if turn > 0:
                if get(w, batch, query, meta.Q_PLACE) == turn - 1:
                    tl.store(last_claims + get(w, batch, query, meta.Q_GROUP), -1)
            tl.debug_barrier()
            if get(w, batch, query, meta.Q_OPEN) > 0:
                _claim(
                    s, w, values, offsets, names, name, query.to(tl.int32), batch, claims, mask,
                    PAGE, WIDTH, BIGRAM, SINGLE, NAMES,
                )  # fmt: skip
                put(w, batch, query, turn, meta.Q_PLACE)
            elif turn == 0:
                put(w, batch, query, turn - 1, meta.Q_PLACE)
            query += programs
        wait_for_all(w, programs)
        query = program.to(tl.int64)
        still = tl.zeros([], tl.int64)
        while query < batch:
            if get(w, batch, query, meta.Q_OPEN) > 0:
                still += _settle_one(w, values, offsets, query, batch, rows, claims, PAGE, BIGRAM, SINGLE)
            query += programs
        if still > 0:
            tl.atomic_add(w.number + meta.OPEN + 1 - turn % 2, still, sem="relaxed")
        wait_for_all(w, programs)
        open_queries = tl.load(w.number + meta.OPEN + 1 - turn % 2, volatile=True)
        if program == 0:
            tl.store(w.number + meta.OPEN + turn % 2, 0)
        turn += 1
    if good:
        if turn > 0:
            query = program.to(tl.int64)
            while query < batch:
                if get(w, batch, query, meta.Q_PLACE) == turn - 1:
                    place = get(w, batch, query, meta.Q_GROUP)
                    tl.store(w.claims + ((turn + 1) % 2) * (mask + 1) + place, -1)
                query += programs
        _find_cuts(s, w, batch, rows, program, programs)
        wait_for_all(w, programs)
        if program == 0:
            tl.store(w.number + meta.CUTS, list_cuts(w, batch).to(tl.int64))
        wait_for_all(w, programs)
        count = tl.load(w.number + meta.CUTS, volatile=True).to(tl.int32)
        if count > 0:
            compare_cuts(w, batch, count, program, programs)
            wait_for_all(w, programs)
        if program == 0:
            made = number_cuts(s, w, batch, count)
            made, units = _number_leaves(s, w, batch, made)
            _reserve(s, w, made, units, may_compact)
    last, _bad = is_last(w, programs)
    if last:
        tl.store(w.number + meta.ARRIVED, 0)
        tl.store(w.number + meta.WAITING, 0)
        tl.store(w.number + meta.OPEN, 0)
        tl.store(w.number + meta.OPEN + 1, 0)


_settle = Kernel(settle_kernel, ["*w", "*i64", "*i64", "i64", "i32", "i32", "i32", "i32"], cooperative=True)


def settle(
    bound: Bound, values: int, wide: bool, offsets: int, batch: int, names: int, name: int, may_compact: bool,
    page: int, width: int, bigram: bool,
) -> None:  # fmt: skip
    """Settle a batch that `plan_kernel` has walked; arguments as for `insert`, width as from `page_constants`.

    may_compact: whether a compaction follows where the pools have no room; without it such a batch is refused.
    """
    mask = bound.workspace.claims.shape[1] - 1
    _settle(
        bound, resident(bound, batch), (values, offsets, names, name, batch, bound.rows, mask, int(may_compact)),
        (page, width, bigram, offsets == 0, names != 0), (wide,),
    )  # fmt: skip
