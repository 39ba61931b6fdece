"""Insert, in three launches: plan (walk and check every key), settle (who owns what is new), build.

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
from flatradix.kernels.gpu.children import enter, page_at, tag_of, tags_of_lanes
from flatradix.kernels.gpu.compact import compact
from flatradix.kernels.gpu.cut import column, compare_cuts, list_cuts, make_pieces, number_cuts, shorten_edges
from flatradix.kernels.gpu.finish import first_refusal, is_last, publish, refuse, wait_for_all
from flatradix.kernels.gpu.launch import Bound, Kernel, resident
from flatradix.kernels.gpu.rows import book_rows, handle_of, row_number
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
from flatradix.refusals import BAD_SLOT, BAD_TOKEN, FREE_BITS, NO_CAPACITY, NO_ROOM
from flatradix.refusals import UNEQUAL as UNEQUAL_COUNTS

WRONG_TOKEN_VALUE = tl.constexpr(BAD_TOKEN)
WRONG_SLOT = tl.constexpr(BAD_SLOT)
UNEQUAL = tl.constexpr(UNEQUAL_COUNTS)
TOO_MUCH = tl.constexpr(NO_CAPACITY)
NO_POOL = tl.constexpr(NO_ROOM)
ROOM_BITS = tl.constexpr(FREE_BITS)
LANES = tl.constexpr(32)
QUERIES = tl.constexpr(128)
CHECKED = tl.constexpr(2048)
COPIED = tl.constexpr(1024)
COMPARED = tl.constexpr(1024)


@triton.jit
def _put(w, batch, query, value, C: tl.constexpr):
    tl.store(column(w, batch, C) + query, value.to(tl.int32))


@triton.jit
def _get(w, batch, query, C: tl.constexpr):
    return tl.load(column(w, batch, C) + query).to(tl.int64)


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "start_handles", "start_lengths", "slots", "slot_offsets", "total", "slot_total",
        "limit", "name", "batch",
    ]
)  # fmt: skip
def plan_kernel(
    s, w, values, offsets, names, start_handles, start_lengths, slots, slot_offsets, total: tl.int64,
    slot_total: tl.int64, limit: tl.int64, name: tl.int64, batch: tl.int32,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    NAMES: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Walk and check one key: where it leaves the tree, and whether its tokens and slots are good."""
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
    units = whole_pages(count, PAGE, BIGRAM)
    if reason < 0:
        refuse(w, query, reason, value)
        units = units * 0
        row = row * 0
    else:
        row, done, _left, _newly, _old = walk(
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
    _put(w, batch, query, row, meta.Q_EDGE)
    _put(w, batch, query, length, meta.Q_AT)
    _put(w, batch, query, start, meta.Q_BEGIN)
    _put(w, batch, query, start + units, meta.Q_END)
    _put(w, batch, query, opens, meta.Q_OPEN)
    _put(w, batch, query, row * 0 - 1, meta.Q_LEAF)
    if opens:
        tl.atomic_add(w.number + meta.OPEN, 1, sem="relaxed")


@triton.jit
def _key_at(values, offsets, w, batch, query, at, SINGLE: tl.constexpr):
    """Pointer to the token of a key at path length `at`."""
    begin = tl.zeros([], tl.int64)
    if not SINGLE:
        begin = tl.load(offsets + query)
    return values + begin + (at - _get(w, batch, query, meta.Q_BEGIN))


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
    edge = _get(w, batch, query, meta.Q_EDGE)
    at = _get(w, batch, query, meta.Q_AT)
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
            alike = (_get(w, batch, other, meta.Q_EDGE) == edge) & (_get(w, batch, other, meta.Q_AT) == at)
            alike = alike & ((edge > 0) | (their_code == code))
            if alike:
                theirs = _key_at(values, offsets, w, batch, other, at, SINGLE)
                alike = _equal_tokens(key, theirs, at * 0 + PAGE + BIGRAM, WIDTH) == PAGE + BIGRAM
            if alike:
                tl.atomic_min(claims + place, query, sem="relaxed")
                joined = other >= 0
            else:
                place = (place + 1) & mask
    _put(w, batch, query, place, meta.Q_GROUP)


@triton.jit
def _settle_one(
    w, values, offsets, query, batch, rows, claims,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """One key of a round: the owner's new leaf, or as far along it as the key goes; returns 1 if it is still open."""
    owner = tl.load(claims + _get(w, batch, query, meta.Q_GROUP), volatile=True).to(tl.int64)
    at = _get(w, batch, query, meta.Q_AT)
    end = _get(w, batch, query, meta.Q_END)
    opens = tl.zeros([], tl.int64)
    if owner == query:
        _put(w, batch, query, at * 0, meta.Q_LEAF)
    else:
        shorter = tl.minimum(end, _get(w, batch, owner, meta.Q_END)) - at
        ours = _key_at(values, offsets, w, batch, query, at, SINGLE)
        theirs = _key_at(values, offsets, w, batch, owner, at, SINGLE)
        equal = tl.maximum(_equal_tokens(ours, theirs, shorter + BIGRAM, COMPARED) - BIGRAM, 0)
        at += equal - equal % PAGE
        _put(w, batch, query, at, meta.Q_AT)
        _put(w, batch, query, rows + owner, meta.Q_EDGE)
        opens = (at < end).to(tl.int64)
    _put(w, batch, query, opens, meta.Q_OPEN)
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
                if _get(w, batch, query, meta.Q_PLACE) == turn - 1:
                    tl.store(last_claims + _get(w, batch, query, meta.Q_GROUP), -1)
            tl.debug_barrier()
            if _get(w, batch, query, meta.Q_OPEN) > 0:
                _claim(
                    s, w, values, offsets, names, name, query.to(tl.int32), batch, claims, mask,
                    PAGE, WIDTH, BIGRAM, SINGLE, NAMES,
                )  # fmt: skip
                _put(w, batch, query, turn, meta.Q_PLACE)
            elif turn == 0:
                _put(w, batch, query, turn - 1, meta.Q_PLACE)
            query += programs
        wait_for_all(w, programs)
        query = program.to(tl.int64)
        still = tl.zeros([], tl.int64)
        while query < batch:
            if _get(w, batch, query, meta.Q_OPEN) > 0:
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
                if _get(w, batch, query, meta.Q_PLACE) == turn - 1:
                    place = _get(w, batch, query, meta.Q_GROUP)
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


@triton.jit
def _query_of(w, batch, unit, active, steps):
    """The query that owns each new unit: the last whose offset is not beyond it. Lanes; a search by halves."""
    query = tl.zeros_like(unit)
    step = tl.zeros([], tl.int64) + (1 << steps)
    while step > 0:
        offset = tl.load(column(w, batch, meta.Q_OFFSET) + query + step, mask=active & (query + step < batch), other=0)
        query = tl.where((query + step < batch) & (offset <= unit), query + step, query)
        step = step // 2
    return query


@triton.jit
def _copy_new(
    s, w, values, offsets, slots, slot_offsets, pool, batch, units, steps, program, programs,
    BIGRAM: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Bring all that is new to the pools, where it lies without a gap, in batch order."""
    cursor = tl.load(s.meta + meta.POOL_CURSOR)
    at = program.to(tl.int64) * COPIED
    while at < units:
        unit = at + tl.arange(0, COPIED)
        active = unit < units
        query = _query_of(w, batch, unit, active, steps)
        known = tl.load(column(w, batch, meta.Q_AT) + query, mask=active, other=0).to(tl.int64)
        known -= tl.load(column(w, batch, meta.Q_BEGIN) + query, mask=active, other=0)
        known += unit - tl.load(column(w, batch, meta.Q_OFFSET) + query, mask=active, other=0)
        token = known
        slot = known
        if not SINGLE:
            token = known + tl.load(offsets + query, mask=active, other=0)
            slot = known + tl.load(slot_offsets + query, mask=active, other=0)
        tl.store(s.tokens + cursor + unit, tl.load(values + token, mask=active, other=0).to(tl.int32), mask=active)
        if BIGRAM:
            second = tl.load(values + token + 1, mask=active, other=0)
            tl.store(s.seconds + cursor + unit, second.to(tl.int32), mask=active)
        tl.store(
            pool + cursor + unit, tl.load(slots + slot, mask=active, other=0).to(pool.dtype.element_ty), mask=active
        )
        at += programs * COPIED


@triton.jit
def _end_of(w, batch, query, rows, active):
    """The row on which each key's known part ends, once all is cut: (row, 0 for the root)."""
    edge = tl.load(column(w, batch, meta.Q_EDGE) + query, mask=active, other=0)
    owner = tl.load(column(w, batch, meta.Q_LEAF) + (edge - rows), mask=active & (edge >= rows), other=0)
    row = tl.where(edge >= rows, owner, edge)
    cut = active & (tl.load(column(w, batch, meta.Q_CUT) + query, mask=active, other=0) > 0)
    place = tl.load(column(w, batch, meta.Q_PLACE) + query, mask=cut, other=0)
    first = tl.load(column(w, batch, meta.Q_FIRST) + place, mask=cut, other=0)
    piece = tl.load(column(w, batch, meta.Q_NEW) + first, mask=cut, other=0)
    return tl.where(cut, piece, row).to(tl.int64)


@triton.jit
def _codes(names, name, query, active, NAMES: tl.constexpr):
    packed = tl.zeros_like(query).to(tl.int64) + name
    if NAMES:
        packed = tl.load(names + query, mask=active, other=0)
    return packed >> 1


@triton.jit
def _add_leaves(
    s, w, names, name, priorities, priority, batch, rows, clock, program, programs,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, NAMES: tl.constexpr, PRIORITIES: tl.constexpr,
):  # fmt: skip
    """Make the new leaves, on edges that are not cut yet."""
    cursor = tl.load(s.meta + meta.POOL_CURSOR)
    first = program * LANES
    while first < batch:
        query = first + tl.arange(0, LANES)
        row = tl.load(column(w, batch, meta.Q_LEAF) + query, mask=query < batch, other=-1).to(tl.int64)
        active = row >= 0
        row = tl.where(active, row, 0)
        above = _end_of(w, batch, query, rows, active)
        parent = tl.where(above > 0, above, ~_codes(names, name, query, active, NAMES))
        at = tl.load(column(w, batch, meta.Q_AT) + query, mask=active, other=0).to(tl.int64)
        end = tl.load(column(w, batch, meta.Q_END) + query, mask=active, other=0).to(tl.int64)
        start = cursor + tl.load(column(w, batch, meta.Q_OFFSET) + query, mask=active, other=0)
        time = clock + 2 * (query.to(tl.int64) + 1)
        zero = tl.zeros([LANES], tl.int32)
        tl.store(s.parent + row, parent.to(tl.int32), mask=active)
        tl.store(s.start + row, start.to(tl.int32), mask=active)
        tl.store(s.length + row, (end - at).to(tl.int32), mask=active)
        tl.store(s.end + row, end.to(tl.int32), mask=active)
        tl.store(s.children + row, zero, mask=active)
        tl.store(s.lock_ref + row, zero, mask=active)
        tl.store(s.own_locks + row, zero, mask=active)
        tl.store(s.hit_count + row, zero, mask=active)
        tl.store(s.tick + row, time, mask=active)
        tl.store(s.created + row, time, mask=active)
        tl.store(s.priority + row, _numbers(priorities, priority, query, active, PRIORITIES), mask=active)
        tag = tags_of_lanes(s, start, parent, active, PAGE, BIGRAM)
        enter(s, w, row, tag, start, end - at, active)
        first += programs * LANES


@triton.jit
def _numbers(many, one, query, active, MANY: tl.constexpr):
    """A number for each lane: its own, or one for all."""
    number = tl.zeros_like(query).to(tl.int64) + one
    if MANY:
        number = tl.load(many + query, mask=active, other=0)
    return number


@triton.jit
def _use_path(s, row, time, priority, inserted):
    """What an insert does to each node of its path, lanes.

    A hit is counted on a node that ends beyond `inserted`, as it was when the query's turn came: where a later query
    has cut it since, which its time of creation tells, it then ended where the next node below does that was there.
    """
    end = tl.zeros_like(row)
    while tl.max(row) > 0:
        on = row > 0
        created = tl.load(s.created + row, mask=on, other=0)
        end = tl.where(on & (created <= time), tl.load(s.end + row, mask=on, other=0).to(tl.int64), end)
        parent = tl.load(s.parent + row, mask=on, other=0).to(tl.int64)
        tl.atomic_max(s.tick + row, time, mask=on, sem="relaxed")
        tl.atomic_max(s.priority + row, priority, mask=on, sem="relaxed")
        tl.atomic_add(s.hit_count + row, 1, mask=on & (end > inserted), sem="relaxed")
        row = tl.where(on, tl.maximum(parent, 0), 0)


@triton.jit
def _use(
    s, w, names, name, priorities, priority, inserteds, inserted, prefix_lengths, lengths, handles, batch, rows, clock,
    program, programs, NAMES: tl.constexpr, PRIORITIES: tl.constexpr, INSERTEDS: tl.constexpr,
):  # fmt: skip
    """Give the paths of all keys their ticks, priorities and hits, and the caller the results."""
    first = program * LANES
    while first < batch:
        query = first + tl.arange(0, LANES)
        active = query < batch
        leaf = tl.load(column(w, batch, meta.Q_LEAF) + query, mask=active, other=-1).to(tl.int64)
        above = _end_of(w, batch, query, rows, active)
        code = _codes(names, name, query, active, NAMES)
        one = tl.zeros([LANES], tl.int32) + 1
        tl.atomic_add(s.children + above, one, mask=(leaf >= 0) & (above > 0), sem="relaxed")
        tl.atomic_add(s.namespace_children + code, one, mask=(leaf >= 0) & (above == 0), sem="relaxed")
        row = tl.where(active, tl.where(leaf >= 0, leaf, above), 0)
        _use_path(
            s, row, clock + 2 * (query.to(tl.int64) + 1),
            _numbers(priorities, priority, query, active, PRIORITIES),
            _numbers(inserteds, inserted, query, active, INSERTEDS),
        )  # fmt: skip
        at = tl.load(column(w, batch, meta.Q_AT) + query, mask=active, other=0)
        end = tl.load(column(w, batch, meta.Q_END) + query, mask=active, other=0)
        tl.store(prefix_lengths + query, at, mask=active)
        tl.store(lengths + query, end, mask=active)
        tl.store(handles + query, handle_of(s, row), mask=active)
        first += programs * LANES


@triton.jit
def _answer(w, call, prefix_length, length, handle):
    """Leave the result of a single key where the host looks for it."""
    tag = (call.to(tl.int64) & meta.CALL_MASK) << 32
    place = w.mail + meta.MAIL_ANSWERS + (call % meta.ANSWERS) * meta.ANSWER_WORDS
    tl.store(place, tag | (length & 0xFFFFFFFF))
    tl.store(place + 1, tag | (handle & 0xFFFFFFFF))
    tl.store(place + 2, tag | ((handle >> 32) & 0xFFFFFFFF))
    tl.store(place + 3, tag | (prefix_length & 0xFFFFFFFF))


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
def _book(s, w, batch, clock):
    """The tree's numbers, by the program that is done last."""
    units = tl.load(w.number + meta.NEEDED)
    evictable = tl.load(s.meta + meta.EVICTABLE)
    cursor = tl.load(s.meta + meta.POOL_CURSOR)
    book_rows(s, tl.load(w.number + meta.TOTAL))
    tl.debug_barrier()
    tl.store(s.meta + meta.EVICTABLE, evictable + units)
    tl.store(s.meta + meta.POOL_CURSOR, cursor + units)
    tl.store(s.meta + meta.CLOCK, clock + 2 * batch)


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "slots", "slot_offsets", "priorities", "inserteds", "pool", "prefix_lengths",
        "lengths", "handles", "name", "priority", "inserted", "batch", "rows", "steps", "call",
    ]
)  # fmt: skip
def build_kernel(
    s, w, values, offsets, names, slots, slot_offsets, priorities, inserteds, pool, prefix_lengths, lengths, handles,
    name: tl.int64, priority: tl.int64, inserted: tl.int64, batch: tl.int32, rows: tl.int32, steps: tl.int32,
    call: tl.int64,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, SINGLE: tl.constexpr, NAMES: tl.constexpr, PRIORITIES: tl.constexpr,
    INSERTEDS: tl.constexpr,
):  # fmt: skip
    """Write what `settle_kernel` found to the tree."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    error = first_refusal(w)
    good = error == meta.NO_ERROR
    clock = tl.load(s.meta + meta.CLOCK)
    if good:
        units = tl.load(w.number + meta.NEEDED)
        cuts = tl.load(w.number + meta.CUTS).to(tl.int32)
        _copy_new(
            s, w, values, offsets, slots, slot_offsets, pool, batch, units, steps, program, programs, BIGRAM, SINGLE
        )
        wait_for_all(w, programs)
        _add_leaves(
            s, w, names, name, priorities, priority, batch, rows, clock, program, programs,
            PAGE, BIGRAM, NAMES, PRIORITIES,
        )  # fmt: skip
        if cuts > 0:
            wait_for_all(w, programs)
            make_pieces(s, w, batch, cuts, rows, clock, program, programs, PAGE, BIGRAM, True, 2)
            wait_for_all(w, programs)
            shorten_edges(s, w, batch, cuts, rows, clock, program, programs, PAGE, BIGRAM, True, 2)
        wait_for_all(w, programs)
        _use(
            s, w, names, name, priorities, priority, inserteds, inserted, prefix_lengths, lengths, handles, batch,
            rows, clock, program, programs, NAMES, PRIORITIES, INSERTEDS,
        )  # fmt: skip
    else:
        _refused(prefix_lengths, lengths, handles, batch, program, programs)
    last, _bad = is_last(w, programs)
    if last:
        if good:
            _book(s, w, batch, clock)
        tl.store(w.number + meta.CUTS, 0)
        publish(s, w, call.to(tl.int64), error, meta.INSERT)
        if SINGLE:
            length = tl.load(lengths).to(tl.int64)
            _answer(w, call.to(tl.int64), tl.load(prefix_lengths).to(tl.int64), length, tl.load(handles))


_plan = Kernel(
    plan_kernel,
    ["*w", "*i64", "*i64", "*i64", "*i32", "*w", "*i64", "i64", "i64", "i64", "i64", "i32"],
)
_settle = Kernel(settle_kernel, ["*w", "*i64", "*i64", "i64", "i32", "i32", "i32", "i32"], cooperative=True)
_build = Kernel(
    build_kernel,
    [
        "*w", "*i64", "*i64", "*w", "*i64", "*i64", "*i64", "*w", "*i32", "*i32", "*i64",
        "i64", "i64", "i64", "i32", "i32", "i32", "i64",
    ],
    cooperative=True,
)  # fmt: skip


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
    single, many_names = offsets == 0, names != 0
    rows = bound.rows
    _plan(
        bound, batch,
        (
            values, offsets, names, start_handles, start_lengths, slots, slot_offsets, total, slot_total, limit, name,
            batch,
        ),
        (*sizes, single, many_names, start_handles != 0), (wide, slots_wide),
    )  # fmt: skip
    mask = bound.workspace.claims.shape[1] - 1
    _settle(
        bound, resident(bound, batch), (values, offsets, names, name, batch, rows, mask, int(may_compact)),
        (*sizes[:3], single, many_names), (wide,),
    )  # fmt: skip
    if may_compact:
        compact(bound, pool, pool_wide, False)
    programs = resident(bound, max(-(-batch // LANES.value), -(-total // COPIED.value)))
    _build(
        bound, programs,
        (
            values, offsets, names, slots, slot_offsets, priorities, inserteds, pool, prefix_lengths, lengths, handles,
            name, priority, inserted, batch, rows, batch.bit_length(), call,
        ),
        (page, bigram, single, many_names, priorities != 0, inserteds != 0), (wide, slots_wide, pool_wide),
    )  # fmt: skip
