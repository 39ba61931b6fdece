"""Match of long keys in one launch, with many programs a key: none walks more than its chunks, however deep a path is.

Each program hashes chunks of a key. The fingerprint of the prefix up to the end of a chunk may have an anchor: a row of
the tree (`anchors`). From there the program climbs to the nearest anchored boundary before, and compares the tokens on
its way. If they are equal, and the climb ends where that boundary stands, then the prefix is on the path of the row if
it is so up to that boundary. So the chunks from the root to the first that fails are the match, and one program walks
on from there, for up to a chunk if all anchors were there. Then each program touches and locks the rows of its chunks.

A key of 131,072 tokens on 256 edges waits for some ten dependent loads instead of 512.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.anchors import (
    FOUND,
    HASHES,
    LOOK,
    await_words,
    check_group,
    find_anchors,
    first_group,
    hash_chunk,
    note_anchors,
    stand_on,
    sum_before,
    weight_of,
    write_word,
)
from flatradix.kernels.gpu.climb import LEVELS, hints_of
from flatradix.kernels.gpu.cut import column, put
from flatradix.kernels.gpu.finish import answer, arrive, refuse
from flatradix.kernels.gpu.finish_match import finish_match
from flatradix.kernels.gpu.launch import INTERPRETED, Arrays, Kernel, cooperative_programs
from flatradix.kernels.gpu.rows import FREE, handle_of
from flatradix.kernels.gpu.walk import (
    MAX_TOKEN,
    first_outside,
    key_range,
    name_of,
    page_constants,
    visit,
    walk,
    whole_pages,
)
from flatradix.layout import mail, numbers, reasons, scratch
from flatradix.layout.queries import Output, PerQuery, Values

# Tokens a chunk, or the pages of one that fit.
TOKENS_A_CHUNK = 512
# Keys on average at least this long, and at most this many, are matched by anchors.
LEAST_TOKENS = 8192
MOST_KEYS = 128
# Bits of a tag that are compared. Tests compare fewer, so that anchors are wrong.
TAG_MASK = 0xFFFFFFFF
# Warps a program, programs a multiprocessor, registers a thread or 0 for no limit.
SHAPE = (4, 4, 0)

# Boundaries before a chunk at which its climb may end.
WINDOW = tl.constexpr(4)
# What is known of a chunk: the row at its end if its tokens are equal from the boundary before, else one of these.
WRONG = tl.constexpr(0)
UNANCHORED = tl.constexpr(0xFFFFFFFF)
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _differ(s, key, at, end, rows, begins, ends, starts, BIGRAM: tl.constexpr, BLOCK: tl.constexpr):
    """Return whether a unit from `at` to `end` differs from the key; the rows hold these units; [1, LEVELS]."""
    differs = False
    while at < end:
        unit = at + tl.arange(0, BLOCK)
        inside = unit < end
        holds = (rows > 0) & (begins <= unit[:, None]) & (unit[:, None] < ends)
        place = unit + tl.sum(tl.where(holds, starts - begins, 0), axis=1)
        ours = tl.load(key + unit, mask=inside, other=0)
        different = inside & (ours != tl.load(s.tokens + place, mask=inside, other=0))
        if BIGRAM:
            second = tl.load(key + 1 + unit, mask=inside, other=0)
            different = different | (inside & (second != tl.load(s.seconds + place, mask=inside, other=0)))
        differs = differs | (tl.max(different.to(tl.int32)) > 0)
        at = tl.where(differs, end, at + BLOCK)
    return differs


@triton.jit
def _climbs_to(s, w, key, row, high, foot, low, BIGRAM: tl.constexpr, BLOCK: tl.constexpr):
    """Return whether the units from `low` to `high` above a row equal the key's, and `foot` is where `low` stands.

    row: it holds the path length `high`. foot: a row, or ~namespace for the root.
    """
    same = True
    going = row > 0
    rows, after = first_group(w, row)
    while going:
        rows, after, parents, ends, lengths = check_group(s, w, rows, after)
        begins = ends - lengths
        rows = tl.where(ends > low, rows, 0)
        starts = tl.load(s.start + rows, mask=rows > 0, other=0)
        begin = tl.maximum(tl.min(tl.where(rows > 0, begins, FAR)), low)
        end = tl.minimum(tl.max(tl.where(rows > 0, ends, 0)), high)
        same = not _differ(s, key, begin, end, rows, begins, ends, starts, BIGRAM, BLOCK)
        lands = (rows > 0) & (begins <= low)
        landed = tl.max(lands.to(tl.int32)) > 0
        if landed:
            found = tl.max(tl.where(lands, tl.where(begins == low, parents, rows), FREE))
            same = same & (found == foot)
        going = same & (not landed) & (tl.max(after) > 0)
        same = same & (landed | going)
        rows, after = hints_of(w, after)
    return same


@triton.jit
def _look_at(s, w, key, words, chunk, code, epoch, mask, CHUNK: tl.constexpr, BIGRAM: tl.constexpr,
             BLOCK: tl.constexpr, TAG: tl.constexpr):  # fmt: skip
    """Return what is known of a chunk: the row at its end, UNANCHORED or WRONG; int64."""
    back = tl.arange(0, WINDOW)
    before = chunk - back
    weight = weight_of(await_words(words + HASHES + before, before >= 0, epoch), before)
    weight = tl.where(before >= 0, weight, 0)
    total = sum_before(words, chunk + 1, code, epoch) - (tl.cumsum(weight) - weight)
    anchors = find_anchors(w, total, before >= 0, mask, TAG)
    rows = stand_on(s, anchors, (before + 1) * CHUNK)
    row = tl.max(tl.where(back == 0, rows, 0))
    known = (back > 0) & ((rows > 0) | (before == -1))
    nearest = tl.min(tl.where(known, back, WINDOW))
    found = tl.zeros([], tl.int64) + UNANCHORED
    if row > 0:
        found = tl.zeros([], tl.int64) + WRONG
        if nearest < WINDOW:
            foot = tl.max(tl.where(back == nearest, rows, 0))
            foot = tl.where(foot > 0, foot, ~code)
            low = (chunk + 1 - nearest) * CHUNK
            if _climbs_to(s, w, key, row, (chunk + 1) * CHUNK, foot, low, BIGRAM, BLOCK):
                found = row.to(tl.int64)
    return found


@triton.jit
def _verified(words, count, epoch):
    """Return (how many of `count` chunks the tree holds for sure, the first chunk without an anchor or `count`)."""
    wrong = count
    hole = count
    last = count * 0
    first = tl.zeros([], tl.int32)
    while first < count:
        j = first + tl.arange(0, LOOK)
        there = j < count
        found = await_words(words + FOUND + j, there, epoch)
        wrong = tl.minimum(wrong, tl.min(tl.where(there & (found == WRONG), j, count)))
        hole = tl.minimum(hole, tl.min(tl.where(found == UNANCHORED, j, count)))
        sure = there & (j < wrong) & (found != UNANCHORED)
        last = tl.maximum(last, tl.max(tl.where(sure, j + 1, 0)))
        first += LOOK
    return last, hole


@triton.jit
def _use_rows(s, w, row, low, high, clock, tick, TOUCH: tl.constexpr, LOCK: tl.constexpr):
    """Touch and lock the rows that end above path length `low`, up to `high`, on the path of a row.

    Returns the newly protected tokens, in lanes.
    """
    newly = tl.zeros([1, LEVELS], tl.int64)
    rows, after = first_group(w, row)
    going = row > 0
    while going:
        rows, after, _parents, ends, lengths = check_group(s, w, rows, after)
        on = (rows > 0) & (ends > low) & (ends <= high)
        if TOUCH:
            old = tl.load(s.tick + rows, mask=on, other=0)
            tl.store(w.old_tick + rows, old, mask=on & (old <= clock))
            tl.atomic_max(s.tick + rows, tl.zeros_like(old) + tick, mask=on, sem="relaxed")
        if LOCK:
            before = tl.atomic_add(s.lock_ref + rows, 1, mask=on, sem="relaxed")
            newly += tl.where(on & (before == 0), lengths, 0)
        going = (tl.min(tl.where(rows > 0, ends - lengths, 0)) > low) & (tl.max(after) > 0)
        rows, after = hints_of(w, after)
    return newly


@triton.jit
def _use_chunk(
    s, w, words, chunk, epoch, clock, tick, CHUNK: tl.constexpr, TOUCH: tl.constexpr, LOCK: tl.constexpr
):  # fmt: skip
    """Touch and lock the rows that end in a chunk of the match, or in chunks without anchors before."""
    back = tl.arange(0, WINDOW)
    before = chunk - back
    found = await_words(words + FOUND + before, before >= 0, epoch)
    row = tl.max(tl.where(back == 0, found, 0))
    newly = tl.zeros([1, LEVELS], tl.int64)
    if row != UNANCHORED:
        known = (back > 0) & (found != UNANCHORED)
        low = (chunk + 1 - tl.min(tl.where(known, back, WINDOW))) * CHUNK
        newly = _use_rows(s, w, row.to(tl.int32), low, (chunk + 1) * CHUNK, clock, tick, TOUCH, LOCK)
    return newly


@triton.jit
def _walk_on(
    s, w, key, units, code, words, chunks, clock, tick, epoch,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    TOUCH: tl.constexpr, LOCK: tl.constexpr,
):  # fmt: skip
    """Walk on from the end of the verified chunks. Return (row, path length, units left on its edge, newly protected).

    Visits all rows but those that end in the verified chunks, as a walk from the root would.
    """
    at = chunks * CHUNK
    first = tl.zeros([], tl.int32)
    if chunks > 0:
        first = tl.load(words + FOUND + chunks - 1, volatile=True).to(tl.int32)
    open_units = tl.where(first > 0, tl.load(s.end + first) - at, 0)
    row, done, left, newly, old = walk(
        s, w, key + at, units - at, code, first, at, clock, tick, PAGE, WIDTH, BIGRAM, BLOCK, TOUCH, LOCK
    )
    if (left > 0) & (row != first) & (not LOCK):
        visit(s, w, row, old, clock, tick, TOUCH)
    if open_units > 0:
        passed = (row != first) | (left == 0)
        if passed | (not LOCK):
            visit(s, w, first, tl.load(s.tick + first), clock, tick, TOUCH)
        if LOCK:
            if passed:
                if tl.atomic_add(s.lock_ref + first, 1, sem="relaxed") == 0:
                    newly += tl.load(s.length + first)
    return row, at + done, left, newly


@triton.jit
def _next_epoch(w, epoch):
    """Count this launch. When the count begins anew, clear the words, so that none of them is taken for a new one."""
    if epoch == scratch.EPOCH_MASK:
        first = tl.zeros([], tl.int32)
        while first < 3 * scratch.CHUNK_WORDS:
            j = first + tl.arange(0, LOOK)
            tl.store(w.words + j, tl.zeros([LOOK], tl.int64))
            first += LOOK
    tl.store(w.counters + scratch.EPOCH, epoch % scratch.EPOCH_MASK)


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "lengths", "handles", "total", "name", "batch", "rows", "call", "told",
        "left_out", "share", "mask",
    ]
)  # fmt: skip
def long_kernel(
    s, w, values, offsets, names, lengths, handles, total: tl.int64, name: tl.int64, batch: tl.int32, rows: tl.int32,
    call: tl.int64, told: tl.int32, left_out: tl.int64, share: tl.int32, mask: tl.int64,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    TAG: tl.constexpr, TOUCH: tl.constexpr, LOCK: tl.constexpr, SINGLE: tl.constexpr, NAMES: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Match keys with `share` programs each. PLAN: store only where each key ends, for the plan of an insert."""
    query = tl.program_id(0) // share
    lane = tl.program_id(0) % share
    clock = tl.load(s.numbers + numbers.CLOCK)
    errors = tl.load(s.numbers + numbers.ERRORS)
    epoch = tl.load(w.counters + scratch.EPOCH) + 1
    tick = clock + 2 * (query.to(tl.int64) + 1)
    call = call.to(tl.int64)
    begin, count, good = key_range(offsets, query, batch, total, SINGLE)
    count = tl.maximum(count - left_out, 0)
    key = values + begin
    code, _named = name_of(names, name, query, NAMES)
    units = whole_pages(count, PAGE, BIGRAM)
    chunks = tl.where(code >= 0, units // CHUNK, 0)
    words = w.words + begin // CHUNK + query

    chunk = lane
    while chunk < chunks:
        write_word(words + HASHES + chunk, epoch, hash_chunk(s, key + chunk * CHUNK, CHUNK, BLOCK))
        chunk += share
    chunk = lane
    while chunk < chunks:
        found = _look_at(s, w, key, words, chunk, code, epoch, mask, CHUNK, BIGRAM, BLOCK, TAG)
        write_word(words + FOUND + chunk, epoch, found)
        chunk += share

    newly = tl.zeros([], tl.int64)
    walks_on = lane == share - 1
    sure = chunks * 0
    hole = chunks
    if TOUCH or LOCK or walks_on:
        sure, hole = _verified(words, chunks, epoch)
    if TOUCH or LOCK:
        chunk = lane
        while chunk < sure:
            newly += tl.sum(_use_chunk(s, w, words, chunk, epoch, clock, tick, CHUNK, TOUCH, LOCK))
            chunk += share
    bad = False
    if walks_on:
        if not good:
            if not PLAN:
                refuse(w, query, tl.zeros([], tl.int64) + reasons.BAD_OFFSETS, tl.zeros([], tl.int64))
                bad = True
        row, length, left, more = _walk_on(
            s, w, key, units, code, words, sure, clock, tick, epoch, PAGE, WIDTH, BIGRAM, BLOCK, CHUNK, TOUCH, LOCK
        )
        newly += more
        ends = length // CHUNK
        noted = tl.minimum(sure, hole)
        if (noted < ends) & (code >= 0):
            note_anchors(s, w, words, row, noted, ends, code, epoch, mask, CHUNK)
        if PLAN:
            put(w, batch, query, row, scratch.Q_EDGE)
            put(w, batch, query, length, scratch.Q_AT)
        else:
            if length < units:
                place = first_outside(key, length, PAGE + BIGRAM, MAX_TOKEN, WIDTH)
                if place >= 0:
                    refuse(w, query, tl.zeros([], tl.int64) + reasons.BAD_TOKEN, place)
                    bad = True
            if LOCK:
                if left > 0:
                    tl.atomic_add(w.counters + scratch.CUTS, 1, sem="relaxed")
                elif row > 0:
                    tl.atomic_add(s.own_locks + row, 1, sem="relaxed")
            if TOUCH or LOCK:
                tl.store(column(w, batch, scratch.Q_ROW) + query, row)
                tl.store(column(w, batch, scratch.Q_CUT) + query, tl.where(left > 0, length, 0))
            tl.store(lengths + query, length)
            tl.store(handles + query, handle_of(s, row))
            if not SINGLE:
                word = ((call & mail.CALL_MASK) << 32) | length.to(tl.int64)
                tl.store(w.mail + mail.FIRST_TOLD + told + query, word, mask=told >= 0)
    if LOCK:
        if newly > 0:
            tl.atomic_add(w.counters + scratch.MOVED_TOKENS, newly, sem="relaxed")
    last, any_bad = arrive(w, tl.num_programs(0), bad)
    if last:
        _next_epoch(w, epoch)
        if PLAN:
            tl.store(w.counters + scratch.ARRIVED, 0)
        else:
            length = tl.load(lengths)
            finish_match(s, w, lengths, handles, batch, rows, call, clock, errors, any_bad, PAGE, BIGRAM, TOUCH, LOCK)
            if SINGLE:
                tl.debug_barrier()
                answer(w, call, tl.where(any_bad, -1, length), tl.load(handles), length * 0)


_long = Kernel(
    long_kernel,
    ["*w", "*i64", "*i64", "*i32", "*i64", "i64", "i64", "i32", "i32", "i64", "i32", "i64", "i32", "i64"],
    cooperative=True,
)


def is_long(keys: Values) -> bool:
    """Return whether anchors match keys from the root faster than a walk would, as measured (bench/RESULTS.md)."""
    return (
        keys.batch <= MOST_KEYS
        and keys.total >= LEAST_TOKENS * keys.batch
        and keys.total // TOKENS_A_CHUNK + keys.batch < scratch.CHUNK_WORDS
    )


def _programs(arrays: Arrays, keys: Values, chunk: int) -> int:
    """Return how many programs match each key. Interpreted programs run one after another, so none may wait."""
    if INTERPRETED:
        return 1
    longest = keys.total // keys.batch if keys.counts is None else int(keys.counts.max())
    fitting = cooperative_programs(arrays, keys.batch * -(-longest // chunk), SHAPE[1])
    return max(fitting // keys.batch, 1)


def match_long(
    arrays: Arrays, keys: Values, names: PerQuery, out: Output, call: int, touch: bool, lock: bool, plan: bool = False
) -> None:
    """Match a batch of long keys in one launch: arguments and results as for `match`, without starts.

    plan: store only the row and the path length at which each key ends, in the columns Q_EDGE and Q_AT of
    `scratch.query`, and refuse nothing: the plan of an insert goes on from there.
    """
    page, width, bigram, block = page_constants(arrays.page, arrays.bigram, TOKENS_A_CHUNK)
    chunk = max(TOKENS_A_CHUNK // page, 1) * page
    share = _programs(arrays, keys, chunk)
    mask = arrays.scratch.anchors.shape[0] // scratch.ANCHOR_WAYS - 1
    _long(
        arrays, keys.batch * share,
        (
            keys.address, keys.offsets, names.address, out.lengths, out.handles, keys.total, names.number, keys.batch,
            arrays.rows, call, out.told, keys.left_out, share, mask,
        ),
        (
            page, width, bigram, max(block, 1 << (chunk - 1).bit_length()), chunk, TAG_MASK, touch, lock,
            keys.offsets == 0, names.address != 0, plan,
        ),
        (keys.wide,), SHAPE[0], SHAPE[2],
    )  # fmt: skip
