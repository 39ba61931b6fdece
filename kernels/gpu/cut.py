"""Cut edges: apply all cuts that a batch of locks or inserts makes to the edges on which its queries end.

Each query cuts at most one edge, at one point. The pieces of an edge lie between its cuts. The lowest piece keeps the
row of the edge; the other pieces get new rows. The pieces are those that a loop of single calls would leave, and they
have a closed form. The first query that cuts at the end of a piece makes the piece. The tick of a piece comes from the
first query that cuts at its beginning and from the last query that ends at or below its end. So it suffices to compare
the queries pair by pair: a million comparisons for 1,024 cuts.

Q_ROW holds the edge of a query: its row, or the row capacity plus a query of the insert for that query's new leaf.
Q_CUT holds the path length of the cut, 0 where the query cuts nothing. Q_LIST lists the cutting queries in batch order.
The columns from Q_FIRST to Q_NEW are indexed by positions in Q_LIST.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.children import enter, replace_row, tags_of_lanes
from flatradix.kernels.gpu.finish import wait_for_all
from flatradix.kernels.gpu.launch import device_function
from flatradix.kernels.gpu.rows import handle_of, row_number, take_rows
from flatradix.layout import dropped, scratch

made_above = device_function(dropped.made_above)
made_below = device_function(dropped.made_below)
left_below = device_function(dropped.left_below)

LANES = tl.constexpr(32)
OTHERS = tl.constexpr(128)
PAIRED = tl.constexpr(32)
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def column(w, batch, C: tl.constexpr):
    """Return a pointer to a column of `w.query`, which has one number for each query."""
    return w.query + C * batch


@triton.jit
def put(w, batch, query, value, C: tl.constexpr):
    """Store one query's number in a column; scalar."""
    tl.store(column(w, batch, C) + query, value.to(tl.int32))


@triton.jit
def get(w, batch, query, C: tl.constexpr):
    """Return one query's number in a column, int64."""
    return tl.load(column(w, batch, C) + query).to(tl.int64)


@triton.jit
def note_cut(w, batch, query, edge, at, cuts):
    """Store the edge on which a query of an insert ends, and whether the query cuts that edge."""
    put(w, batch, query, edge, scratch.Q_ROW)
    put(w, batch, query, tl.where(cuts, at, 0), scratch.Q_CUT)
    if cuts:
        tl.store(w.counters + scratch.CUTS, 1)


@triton.jit
def list_cuts(w, batch):
    """Fill Q_LIST, and Q_POSITION with each query's position in it. Return the length of Q_LIST.

    One program calls this.
    """
    count = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, OTHERS)
        cut = tl.load(column(w, batch, scratch.Q_CUT) + query, mask=query < batch, other=0)
        cuts = (cut > 0).to(tl.int32)
        place = count + tl.cumsum(cuts) - 1
        tl.store(column(w, batch, scratch.Q_LIST) + place, query, mask=cut > 0)
        tl.store(column(w, batch, scratch.Q_POSITION) + query, place, mask=cut > 0)
        count += tl.sum(cuts)
        first += OTHERS
    tl.debug_barrier()
    return count


@triton.jit
def compare_cuts(w, batch, count, program, programs):
    """Compare each cutting query with all others, and store for each position in Q_LIST what they say about its cut.

    Q_FIRST: the first position with the same cut. Q_ABOVE: the first position with the next cut above on the edge, or
    -1. Q_BELOW: 1 if the edge has a cut below, else 0. Q_SAME: how many queries have the same cut. Q_PASS, Q_LAST: how
    many queries cut the edge here or below, and the last of these queries.
    """
    first = program * LANES
    while first < count:
        i = first + tl.arange(0, LANES)
        query = tl.load(column(w, batch, scratch.Q_LIST) + i, mask=i < count, other=0)
        row = tl.load(column(w, batch, scratch.Q_ROW) + query, mask=i < count, other=-1)[:, None]
        cut = tl.load(column(w, batch, scratch.Q_CUT) + query, mask=i < count, other=0)[:, None]
        lowest = i
        above = tl.zeros([LANES], tl.int64) - 1
        below = tl.zeros([LANES], tl.int32)
        same = tl.zeros([LANES], tl.int32)
        passing = tl.zeros([LANES], tl.int32)
        last = tl.zeros([LANES], tl.int32)
        other = tl.zeros([], tl.int32)
        while other < count:
            k = other + tl.arange(0, PAIRED)
            inside = k < count
            their_query = tl.load(column(w, batch, scratch.Q_LIST) + k, mask=inside, other=0)
            their_row = tl.load(column(w, batch, scratch.Q_ROW) + their_query, mask=inside, other=-2)[None, :]
            their_cut = tl.load(column(w, batch, scratch.Q_CUT) + their_query, mask=inside, other=0)[None, :]
            on_edge = their_row == row
            equal = on_edge & (their_cut == cut)
            reach = on_edge & (their_cut >= cut)
            nearest = (their_cut.to(tl.int64) << 32) | (-k + FAR)[None, :].to(tl.int64)
            lowest = tl.minimum(lowest, tl.min(tl.where(equal, k[None, :], FAR), axis=1))
            above = tl.maximum(above, tl.max(tl.where(on_edge & (their_cut < cut), nearest, -1), axis=1))
            below = tl.maximum(below, tl.max((on_edge & (their_cut > cut)).to(tl.int32), axis=1))
            same += tl.sum(equal.to(tl.int32), axis=1)
            passing += tl.sum(reach.to(tl.int32), axis=1)
            last = tl.maximum(last, tl.max(tl.where(reach, their_query[None, :], 0), axis=1))
            other += PAIRED
        inside = i < count
        tl.store(column(w, batch, scratch.Q_FIRST) + i, lowest, mask=inside)
        higher = tl.where(above < 0, -1, -(above & FAR) + FAR).to(tl.int32)
        tl.store(column(w, batch, scratch.Q_ABOVE) + i, higher, mask=inside)
        tl.store(column(w, batch, scratch.Q_BELOW) + i, below, mask=inside)
        tl.store(column(w, batch, scratch.Q_SAME) + i, same, mask=inside)
        tl.store(column(w, batch, scratch.Q_PASS) + i, passing, mask=inside)
        tl.store(column(w, batch, scratch.Q_LAST) + i, last, mask=inside)
        first += programs * LANES


@triton.jit
def number_cuts(s, w, batch, count):
    """Assign rows to all pieces but the lowest of each edge, in batch order. Return the number of these pieces.

    One program calls this.
    """
    made = tl.zeros([], tl.int64)
    first = tl.zeros([], tl.int32)
    while first < count:
        i = first + tl.arange(0, OTHERS)
        is_first = (i < count) & (tl.load(column(w, batch, scratch.Q_FIRST) + i, mask=i < count, other=-1) == i)
        number = made + tl.cumsum(is_first.to(tl.int64)) - 1
        row = row_number(s, number, is_first)
        tl.store(column(w, batch, scratch.Q_NEW) + i, row.to(tl.int32), mask=is_first)
        made += tl.sum(is_first.to(tl.int64))
        first += OTHERS
    tl.debug_barrier()
    return made


@triton.jit
def _cut_of(w, batch, i, active, rows):
    """Return (query, row of its edge, its cut, position of the next cut above or -1) of positions in Q_LIST."""
    query = tl.load(column(w, batch, scratch.Q_LIST) + i, mask=active, other=0)
    row = tl.load(column(w, batch, scratch.Q_ROW) + query, mask=active, other=0)
    leaf = tl.load(column(w, batch, scratch.Q_LEAF) + (row - rows), mask=active & (row >= rows), other=0)
    row = tl.where(row >= rows, leaf, row)
    cut = tl.load(column(w, batch, scratch.Q_CUT) + query, mask=active, other=0)
    above = tl.load(column(w, batch, scratch.Q_ABOVE) + i, mask=active, other=-1)
    return query, row, cut.to(tl.int64), above


@triton.jit
def _first_ones(w, batch, i, count):
    return (i < count) & (tl.load(column(w, batch, scratch.Q_FIRST) + i, mask=i < count, other=-1) == i)


@triton.jit
def make_pieces(
    s, w, batch, count, rows, clock, program, programs,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, INSERT: tl.constexpr, STEP: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Write all pieces but the lowest of each edge. Return the newly protected tokens, in lanes.

    The rows of the edges are only read. STEP: by how much each query advances the clock: 2, or 0 if the call does not
    advance it.
    """
    newly = tl.zeros([LANES], tl.int64)
    first = program * LANES
    while first < count:
        i = first + tl.arange(0, LANES)
        active = _first_ones(w, batch, i, count)
        query, row, cut, above = _cut_of(w, batch, i, active, rows)
        higher = active & (above >= 0)
        their_query = tl.load(column(w, batch, scratch.Q_LIST) + above, mask=higher, other=0)
        their_cut = tl.load(column(w, batch, scratch.Q_CUT) + their_query, mask=higher, other=0).to(tl.int64)
        their_row = tl.load(column(w, batch, scratch.Q_NEW) + above, mask=higher, other=0)
        piece = tl.load(column(w, batch, scratch.Q_NEW) + i, mask=active, other=0)

        edge_begin = tl.load(s.end + row, mask=active, other=0) - tl.load(s.length + row, mask=active, other=0)
        begin = tl.where(higher, their_cut, edge_begin.to(tl.int64))
        start = tl.load(s.start + row, mask=active, other=0).to(tl.int64) + (begin - edge_begin)
        parent = tl.where(higher, their_row, tl.load(s.parent + row, mask=active, other=0))
        locks = tl.load(s.lock_ref + row, mask=active, other=0)
        tick = tl.load(s.tick + row, mask=active, other=0)
        time = clock + STEP * (query.to(tl.int64) + 1)
        their_time = clock + STEP * (their_query.to(tl.int64) + 1)
        own = tl.zeros_like(locks)
        created = time
        if INSERT:
            tick = tl.where(higher, tl.maximum(tick, their_time - 1), tick)
        else:
            created = time + 1
            if HOLD:
                own = tl.load(column(w, batch, scratch.Q_SAME) + i, mask=active, other=0)
                newly += tl.where(active & (locks == 0), cut - begin, 0)
                locks += tl.load(column(w, batch, scratch.Q_PASS) + i, mask=active, other=0)
            if STEP > 0:
                last = tl.load(column(w, batch, scratch.Q_LAST) + i, mask=active, other=0).to(tl.int64)
                tick = tl.maximum(tick, clock + STEP * (last + 1))
                tick = tl.where(higher, tl.maximum(tick, their_time), tick)

        tl.store(s.parent + piece, parent, mask=active)
        tl.store(s.start + piece, start.to(tl.int32), mask=active)
        tl.store(s.length + piece, (cut - begin).to(tl.int32), mask=active)
        tl.store(s.end + piece, cut.to(tl.int32), mask=active)
        tl.store(s.children + piece, tl.zeros_like(piece) + 1, mask=active)
        tl.store(s.lock_ref + piece, locks, mask=active)
        tl.store(s.own_locks + piece, own, mask=active)
        tl.store(s.wanted + piece, tl.load(s.wanted + row, mask=active, other=0), mask=active)
        tl.store(s.own_wants + piece, tl.zeros_like(piece), mask=active)
        tl.store(s.hit_count + piece, tl.load(s.hit_count + row, mask=active, other=0), mask=active)
        tl.store(s.tick + piece, tick, mask=active)
        before = tl.load(s.created + row, mask=active, other=0)
        created = tl.where(higher, made_below(before, created), made_above(before, created))
        tl.store(s.created + piece, created, mask=active)
        tl.store(s.priority + piece, tl.load(s.priority + row, mask=active, other=0), mask=active)
        replace_row(s, w, row, piece.to(tl.int64), start, cut - begin, active & (above < 0))
        tag = tags_of_lanes(s, s.tokens + start, s.seconds + start, parent.to(tl.int64), higher, PAGE, BIGRAM)
        enter(s, w, piece.to(tl.int64), tag, start, cut - begin, higher)
        first += programs * LANES
    return newly


@triton.jit
def shorten_edges(
    s, w, batch, count, rows, clock, program, programs,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, INSERT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Shorten the row of each cut edge to its lowest piece. All programs must have finished `make_pieces` before."""
    first = program * LANES
    while first < count:
        i = first + tl.arange(0, LANES)
        active = _first_ones(w, batch, i, count)
        active = active & (tl.load(column(w, batch, scratch.Q_BELOW) + i, mask=active, other=1) == 0)
        query, row, cut, _above = _cut_of(w, batch, i, active, rows)
        piece = tl.load(column(w, batch, scratch.Q_NEW) + i, mask=active, other=0)
        end = tl.load(s.end + row, mask=active, other=0).to(tl.int64)
        length = end - cut
        edge = tl.load(s.length + row, mask=active, other=0).to(tl.int64)
        start = tl.load(s.start + row, mask=active, other=0).to(tl.int64) + edge - length
        time = clock + STEP * (query.to(tl.int64) + 1)
        if INSERT:
            time = time - 1
        tick = tl.load(s.tick + row, mask=active, other=0)
        created = tl.load(s.created + row, mask=active, other=0)
        tl.debug_barrier()  # every warp has read what one of them is about to write
        if STEP > 0:
            tl.store(s.tick + row, tl.maximum(tick, time), mask=active)
        tl.store(s.created + row, left_below(created), mask=active & (created < 0))
        tl.store(s.parent + row, piece, mask=active)
        tl.store(s.start + row, start.to(tl.int32), mask=active)
        tl.store(s.length + row, length.to(tl.int32), mask=active)
        tag = tags_of_lanes(s, s.tokens + start, s.seconds + start, piece.to(tl.int64), active, PAGE, BIGRAM)
        enter(s, w, row.to(tl.int64), tag, start, length, active)
        first += programs * LANES


@triton.jit
def cut_locked(
    s, w, handles, batch, rows, clock, program, programs,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, STEP: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """Cut the edges on which places lie, and with HOLD lock the pieces above. All programs of a launch call this.

    Replaces the handles of the queries that cut. Adds the newly protected tokens to the counter MOVED_TOKENS.
    `finish_cuts` must follow when all programs have finished.
    """
    if program == 0:
        tl.store(w.counters + scratch.CUT_COUNT, list_cuts(w, batch).to(tl.int64))
    wait_for_all(w, programs)
    count = tl.load(w.counters + scratch.CUT_COUNT, volatile=True).to(tl.int32)
    compare_cuts(w, batch, count, program, programs)
    wait_for_all(w, programs)
    if program == 0:
        tl.store(w.counters + scratch.NEW_ROWS, number_cuts(s, w, batch, count))
    wait_for_all(w, programs)
    newly = make_pieces(s, w, batch, count, rows, clock, program, programs, PAGE, BIGRAM, False, STEP, HOLD)
    tl.atomic_add(w.counters + scratch.MOVED_TOKENS, tl.sum(newly), sem="relaxed")
    wait_for_all(w, programs)
    shorten_edges(s, w, batch, count, rows, clock, program, programs, PAGE, BIGRAM, False, STEP)
    first = program * OTHERS
    while first < count:
        i = first + tl.arange(0, OTHERS)
        query = tl.load(column(w, batch, scratch.Q_LIST) + i, mask=i < count, other=0)
        leader = tl.load(column(w, batch, scratch.Q_FIRST) + i, mask=i < count, other=0)
        piece = tl.load(column(w, batch, scratch.Q_NEW) + leader, mask=i < count, other=0)
        tl.store(handles + query, handle_of(s, piece), mask=i < count)
        first += programs * OTHERS


@triton.jit
def finish_cuts(s, w):
    """Mark the rows of the pieces as used, and reset the counters of the cuts. One program calls this."""
    take_rows(s, tl.load(w.counters + scratch.NEW_ROWS))
    tl.store(w.counters + scratch.CUT_COUNT, 0)
    tl.store(w.counters + scratch.CUTS, 0)
