"""Match of long keys in one launch, with many programs a key: none walks more than its chunks, however deep a path is.

Each program hashes chunks of a key. The fingerprint of the prefix up to the end of a chunk may have an anchor: a row of
the tree (`anchors`). From there the program climbs to the nearest anchored boundary before, and compares the tokens on
its way. If they are equal, and the climb ends where that boundary stands, then the prefix is on the path of the row if
it is so up to that boundary. So the chunks from the root to the first that fails are the match, and one program walks
on from there, for up to a chunk if all anchors were there. Then each program touches and locks the rows of its chunks.

A key of 131,072 tokens on 256 edges waits for some ten dependent loads instead of 512.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from flatradix.kernels import native
from flatradix.kernels.gpu.anchors import (
    FEET,
    FOUND,
    HASHES,
    LOOK,
    LOW32,
    await_words,
    find_anchors,
    hash_chunks,
    note_anchors,
    stand_on,
    sum_before,
    weight_of,
)
from flatradix.kernels.gpu.climb import LEVELS, check_group, hinted_group, next_group
from flatradix.kernels.gpu.cut import column, put
from flatradix.kernels.gpu.finish import answer, arrive, refuse, tell_length
from flatradix.kernels.gpu.finish_match import LOCKS, finish_match
from flatradix.kernels.gpu.launch import INTERPRETED, Arrays, Kernel, cooperative_programs, raise_driver
from flatradix.kernels.gpu.rows import FREE, handle_of
from flatradix.kernels.gpu.walk import (
    MAX_TOKEN,
    bring,
    first_outside,
    key_range,
    name_of,
    page_constants,
    visit,
    walk,
    whole_pages,
)
from flatradix.layout import handles, numbers, reasons, scratch
from flatradix.layout.queries import Desk, Output, PerQuery, Values

# Tokens a chunk, or the pages of one that fit.
TOKENS_A_CHUNK = 512
# Keys are matched by anchors if there are at most MOST_KEYS, of LEAST_TOKENS or more on average, or of twice as many
# where there are more than a few keys.
LEAST_TOKENS = 8192
FEW_KEYS = 32
MOST_KEYS = 128
# Bits of a tag that are compared. Tests compare fewer, so that anchors are wrong.
TAG_MASK = 0xFFFFFFFF
# Warps a program, programs on a multiprocessor, and the registers a thread with which they fit.
WARPS, PROGRAMS, REGISTERS = 4, 4, 128

# Boundaries before a program's chunks at which their climb may end.
WINDOW = tl.constexpr(4)
# What FOUND says of a chunk without a row.
WRONG = tl.constexpr(0)
UNANCHORED = tl.constexpr(0xFFFFFFFF)
FAR = tl.constexpr(2**31 - 1)
KEYS = tl.constexpr(MOST_KEYS)
CLEARED = tl.constexpr(1024)


@triton.jit
def _differ(s, key, begin, end, begins, ends, starts, depth, BIGRAM: tl.constexpr, PART: tl.constexpr):
    """Return of each path whether a unit from `begin` to `end` differs from the key; lanes.

    begins, ends, starts: of the `depth` first rows of each path, [N, LEVELS], which hold these units.
    """
    j = tl.arange(0, PART)[None, :]
    level = tl.arange(0, LEVELS)[None, :]
    differs = begin < 0
    while tl.max((~differs & (begin < end)).to(tl.int32)) > 0:
        unit = begin[:, None] + j
        inside = (unit < end[:, None]) & ~differs[:, None]
        place = unit
        row = depth * 0
        while row < depth:
            own_begin = tl.sum(tl.where(level == row, begins, 0), axis=1)[:, None]
            own_end = tl.sum(tl.where(level == row, ends, 0), axis=1)[:, None]
            own_start = tl.sum(tl.where(level == row, starts, 0), axis=1)[:, None]
            place += tl.where((unit >= own_begin) & (unit < own_end), own_start - own_begin, 0)
            row += 1
        ours = tl.load(key + unit, mask=inside, other=0)
        different = inside & (ours != tl.load(s.tokens + place, mask=inside, other=0))
        if BIGRAM:
            second = tl.load(key + 1 + unit, mask=inside, other=0)
            different = different | (inside & (second != tl.load(s.seconds + place, mask=inside, other=0)))
        differs = differs | (tl.max(different.to(tl.int32), axis=1) > 0)
        begin += PART
    return differs


@triton.jit
def _climb_to(s, w, key, row, high, foot, low, BIGRAM: tl.constexpr, PART: tl.constexpr):
    """Return of each path whether its units from `low` to `high` equal the key's, and `low` stands on `foot`; lanes.

    row: it holds the path length `high`; 0 for no path. foot: a row, or ~namespace for the root.
    """
    going = row > 0
    same = going
    rows, after = hinted_group(w, row)
    while tl.max(going.to(tl.int32)) > 0:
        rows, after, parents, ends, lengths = check_group(s, w, rows, after)
        begins = ends - lengths
        on = (rows > 0) & (ends > low[:, None])
        starts = tl.load(s.start + rows, mask=on, other=0)
        end = tl.minimum(tl.max(tl.where(on, ends, 0), axis=1), high)
        begin = tl.minimum(tl.maximum(tl.min(tl.where(on, begins, FAR), axis=1), low), end)
        depth = tl.max(tl.sum(on.to(tl.int32), axis=1))
        differs = _differ(s, key, begin, end, begins, tl.where(on, ends, 0), starts, depth, BIGRAM, PART)
        lands = on & (begins <= low[:, None])
        landed = tl.max(lands.to(tl.int32), axis=1) > 0
        stand = tl.max(tl.where(lands, tl.where(begins == low[:, None], parents, rows), FREE), axis=1)
        same = same & (~going | (~differs & (~landed | (stand == foot))))
        ended = tl.max(after, axis=1) <= 0
        same = same & ~(going & ~landed & ended)
        going = going & same & ~landed
        rows, after = next_group(w, after, going)
    return same


@triton.jit
def _rows_at(s, w, total, chunk, there, mask, CHUNK: tl.constexpr, TAG: tl.constexpr):
    """Return the rows on which the ends of chunks stand, according to anchors; 0 where there is none. Lanes."""
    return stand_on(s, find_anchors(w, total, there, mask, TAG), (chunk + 1) * CHUNK)


@triton.jit
def _weights(words, chunk, there, epoch):
    return tl.where(there, weight_of(await_words(words + HASHES + chunk, there, epoch), chunk), 0)


@triton.jit
def _look_at(
    s, w, key, stage, words, first, chunks, code, epoch, mask,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr, BIGRAM: tl.constexpr,
    TAG: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """Write what is known of the GROUP chunks from `first` on. STAGED: this program has copied them to `stage`.

    In FOUND: (how many chunks back its tokens were compared << ROW_BITS | the row at its end), UNANCHORED or WRONG. In
    FEET: the row at that boundary, on which it relies, or 0 for the root.
    """
    lane = tl.arange(0, GROUP)
    chunk = first + lane
    there = chunk < chunks
    earlier = first - 1 - tl.arange(0, WINDOW)
    before = sum_before(words, first, code, epoch)
    weight = _weights(words, earlier, earlier >= 0, epoch)
    rows_before = _rows_at(s, w, before + weight - tl.cumsum(weight), earlier, earlier >= 0, mask, CHUNK, TAG)
    total = before + tl.cumsum(_weights(words, chunk, there, epoch))
    row = _rows_at(s, w, total, chunk, there, mask, CHUNK, TAG)

    nearest = tl.max(tl.where((rows_before > 0) | (earlier == -1), earlier, -2))
    foot = tl.max(tl.where(earlier == nearest, rows_before, 0))
    foot = tl.where(foot > 0, foot, ~code)
    leads = (row > 0)[None, :] & (lane[None, :] < lane[:, None])
    previous = tl.max(tl.where(leads, lane[None, :], -1), axis=1)
    their_row = tl.sum(tl.where(lane[None, :] == previous[:, None], row[None, :], 0), axis=1)
    foot = tl.where(previous >= 0, their_row, foot)
    back = tl.where(previous >= 0, lane - previous, chunk - nearest)
    low = (chunk + 1 - back) * CHUNK

    source = key
    if STAGED and not BIGRAM:
        if tl.min(tl.where(there, low, FAR)) >= first * CHUNK:
            source = stage
    same = _climb_to(s, w, source, tl.where(low >= 0, row, 0), (chunk + 1) * CHUNK, foot, low, BIGRAM, PART)
    told = (back.to(tl.int64) << handles.ROW_BITS) | row
    found = tl.where(row == 0, UNANCHORED, tl.where(same, told, WRONG))
    tl.store(words + FEET + chunk, (epoch << 32) | tl.maximum(foot, 0).to(tl.int64), mask=there)
    tl.store(words + FOUND + chunk, (epoch << 32) | found, mask=there)


@triton.jit
def _is_proved(words, j, back, foot, on):
    """Return which chunks rely on what FOUND says of the chunks before; lanes that are `on`.

    Anchors change while programs look: a batch has other keys, which note theirs. So programs may have seen different
    rows at one boundary. A chunk relies on the nearest chunk before with a row, on that row, or on the root.
    """
    before = j - back
    base = tl.load(words + FOUND + before, mask=on & (before >= 0), other=0, volatile=True) & LOW32
    on_row = (base != UNANCHORED) & (foot > 0) & ((base & handles.ROW_MASK) == foot)
    proved = tl.where(before >= 0, on_row, foot == 0)
    most = tl.max(tl.where(on, back, 0))
    step = most * 0 + 1
    while step < most:
        between = tl.load(words + FOUND + j - step, mask=on & (step < back), other=UNANCHORED, volatile=True) & LOW32
        proved = proved & (between == UNANCHORED)
        step += 1
    return proved


@triton.jit
def _verified(words, count, epoch):
    """Return how many of `count` chunks the tree holds for sure: all up to the last that is proved from the root."""
    wrong = count
    last = count * 0
    first = count * 0
    while first < count:
        j = first + tl.arange(0, LOOK)
        there = j < count
        found = await_words(words + FOUND + j, there, epoch)
        foot = await_words(words + FEET + j, there, epoch)
        has_row = there & (found != UNANCHORED) & (found != WRONG)
        back = tl.where(has_row, found >> handles.ROW_BITS, 0).to(tl.int32)
        proved = has_row & _is_proved(words, j, back, foot, has_row)
        wrong = tl.minimum(wrong, tl.min(tl.where(there & (found != UNANCHORED) & ~proved, j, count)))
        last = tl.maximum(last, tl.max(tl.where(proved & (j < wrong), j + 1, 0)))
        first += LOOK
    return last


@triton.jit
def _all_rise(offsets, batch, total):
    """Return whether all offsets of a batch are valid: else the words of its keys might be the same."""
    j = tl.arange(0, KEYS)
    begin = tl.load(offsets + j, mask=j < batch, other=0)
    end = tl.load(offsets + j + 1, mask=j < batch, other=0)
    good = (begin <= end) & ((j > 0) | (begin == 0)) & ((j < batch - 1) | (end == total))
    return tl.min(tl.where(j < batch, good, True).to(tl.int32)) > 0


@triton.jit
def _use_rows(
    s, w, words, first, chunks, epoch, clock, tick,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, TOUCH: tl.constexpr, LOCK: tl.constexpr,
):  # fmt: skip
    """Touch and lock the rows that end in the chunks of the match from `first` on, GROUP chunks.

    Returns the newly protected tokens. A chunk with an anchor stands for those without before it.
    """
    newly = tl.zeros([GROUP, LEVELS], tl.int64)
    chunk = first + tl.arange(0, GROUP)
    there = chunk < chunks
    found = await_words(words + FOUND + chunk, there, epoch)
    row = tl.where(found == UNANCHORED, 0, found & handles.ROW_MASK).to(tl.int32)
    low = ((chunk + 1 - (found >> handles.ROW_BITS).to(tl.int32)) * CHUNK)[:, None]
    high = ((chunk + 1) * CHUNK)[:, None]
    going = row > 0
    rows, after = hinted_group(w, row)
    while tl.max(going.to(tl.int32)) > 0:
        rows, after, _parents, ends, lengths = check_group(s, w, rows, after)
        on = (rows > 0) & (ends > low) & (ends <= high)
        if TOUCH:
            old = tl.load(s.tick + rows, mask=on, other=0)
            tl.store(w.old_tick + rows, old, mask=on & (old <= clock))
            tl.atomic_max(s.tick + rows, tl.zeros_like(old) + tick, mask=on, sem="relaxed")
        if LOCK:
            before = tl.atomic_add(s.lock_ref + rows, tl.zeros_like(rows) + 1, mask=on, sem="relaxed")
            newly += tl.where(on & (before == 0), lengths, 0)
        lowest = tl.min(tl.where(rows > 0, ends - lengths, 0), axis=1)
        going = going & (lowest > tl.max(low, axis=1)) & (tl.max(after, axis=1) > 0)
        rows, after = next_group(w, after, going)
    return tl.sum(newly)


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
        first = (tl.load(words + FOUND + chunks - 1, volatile=True) & handles.ROW_MASK).to(tl.int32)
    open_units = tl.where(first > 0, tl.load(s.end + first) - at, 0)
    row, done, left, newly, old = walk(
        s, w, key + at, units - at, code, first, at, clock, tick, PAGE, WIDTH, BIGRAM, BLOCK, TOUCH, LOCK == LOCKS
    )
    if (left > 0) & (row != first) & (not LOCK):
        visit(s, w, row, old, clock, tick, TOUCH)
    if open_units > 0:
        passed = (row != first) | (left == 0)
        if passed | (not LOCK):
            visit(s, w, first, tl.load(s.tick + first), clock, tick, TOUCH)
        if LOCK == LOCKS:
            if passed:
                if tl.atomic_add(s.lock_ref + first, 1, sem="relaxed") == 0:
                    newly += tl.load(s.length + first)
    return row, at + done, left, newly


@triton.jit
def _next_epoch(w, epoch):
    """Count this launch. When the count begins anew, clear the words, so that none of them is taken for a new one."""
    if epoch == scratch.EPOCH_MASK:
        first = tl.zeros([], tl.int32)
        while first < 4 * scratch.CHUNK_WORDS:
            tl.store(w.words + first + tl.arange(0, CLEARED), tl.zeros([CLEARED], tl.int64))
            first += CLEARED
    tl.store(w.counters + scratch.EPOCH, epoch % scratch.EPOCH_MASK)


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "lengths", "handles", "stage", "total", "name", "batch", "rows", "call", "told",
        "left_out", "share", "mask",
    ]
)  # fmt: skip
def long_kernel(
    s, w, values, offsets, names, lengths, handles, stage, total: tl.int64, name: tl.int64, batch: tl.int32,
    rows: tl.int32, call: tl.int64, told: tl.int32, left_out: tl.int64, share: tl.int32, mask: tl.int64,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    GROUP: tl.constexpr, PART: tl.constexpr, TAG: tl.constexpr, TOUCH: tl.constexpr,
    LOCK: tl.constexpr, SINGLE: tl.constexpr, NAMES: tl.constexpr, PLAN: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    """Match keys with `share` programs each. PLAN: store only where each key ends, for the plan of an insert.

    STAGED: the only key is in pinned memory. Each program copies its chunks to `stage`, and the program that walks on
    copies the rest. Only where the match ends elsewhere are tokens read over PCIe again.
    """
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
    if not SINGLE:
        if not _all_rise(offsets, batch, total):
            chunks = chunks * 0
    words = w.words + begin // CHUNK + query

    first = lane * GROUP
    while first < chunks:
        chunk = first + tl.arange(0, GROUP)
        there = chunk < chunks
        hashed = hash_chunks(s, key, stage, chunk, there, CHUNK, PART, STAGED)
        tl.store(words + HASHES + chunk, (epoch << 32) | hashed, mask=there)
        first += share * GROUP
    walks_on = lane == share - 1
    if STAGED:
        if walks_on & (code >= 0):
            left = chunks * CHUNK // 4 * 4  # `bring` takes multiples of 16 bytes; a CHUNK of pages of 3 is none
            bring(key + left, stage + left, count - left)
        tl.debug_barrier()
    first = lane * GROUP
    while first < chunks:
        _look_at(s, w, key, stage, words, first, chunks, code, epoch, mask, CHUNK, GROUP, PART, BIGRAM, TAG, STAGED)
        first += share * GROUP

    newly = tl.zeros([], tl.int64)
    sure = chunks * 0
    if TOUCH or LOCK == LOCKS or walks_on:
        sure = _verified(words, chunks, epoch)
    if TOUCH or LOCK == LOCKS:
        first = lane * GROUP
        while first < sure:
            newly += _use_rows(s, w, words, first, sure, epoch, clock, tick, CHUNK, GROUP, TOUCH, LOCK == LOCKS)
            first += share * GROUP
    bad = False
    if walks_on:
        if not good:
            if not PLAN:
                refuse(w, query, tl.zeros([], tl.int64) + reasons.BAD_OFFSETS, tl.zeros([], tl.int64))
                bad = True
        if STAGED:
            if (sure == chunks) & (code >= 0):
                key = stage
        row, length, left, more = _walk_on(
            s, w, key, units, code, words, sure, clock, tick, epoch, PAGE, WIDTH, BIGRAM, BLOCK, CHUNK, TOUCH, LOCK
        )
        newly += more
        if (sure < length // CHUNK) & (chunks > 0):  # else nothing was hashed
            note_anchors(s, w, words, row, sure, length // CHUNK, code, epoch, mask, CHUNK)
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
                elif LOCK == LOCKS:
                    tl.atomic_add(s.own_locks + row, 1, mask=row > 0, sem="relaxed")
            if TOUCH or LOCK:
                tl.store(column(w, batch, scratch.Q_ROW) + query, row)
                tl.store(column(w, batch, scratch.Q_CUT) + query, tl.where(left > 0, length, 0))
            tl.store(lengths + query, length)
            tl.store(handles + query, handle_of(s, row))
            if not SINGLE:
                tell_length(w, call, told, query, length, bad)
    if LOCK == LOCKS:
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
    ["*w", "*i64", "*i64", "*i32", "*i64", "*i32", "i64", "i64", "i32", "i32", "i64", "i32", "i64", "i32", "i64"],
    cooperative=True,
)


class Shares(NamedTuple):
    """How the programs of a launch share its keys.

    share: programs a key. group: chunks that a program handles at once. part: tokens of each that it reads at once.
    """

    share: int
    group: int
    part: int


def group_of(chunks: int, programs: int) -> tuple[int, int]:
    """Return (group, part) for a launch of so many chunks, of which so many programs may run at once.

    Four chunks at once take 1.4 times as long as one. Eight need more registers than there are (bench/RESULTS.md).
    """
    if chunks <= programs:
        return 1, TOKENS_A_CHUNK
    return 4, TOKENS_A_CHUNK


def _chunk_of(page: int) -> int:
    """Return the units of a chunk: whole pages."""
    return max(TOKENS_A_CHUNK // page, 1) * page


def _shares(arrays: Arrays, batch: int, longest: int, chunks: int) -> Shares | None:
    chunk = _chunk_of(arrays.page)
    most = cooperative_programs(arrays, batch * -(-longest // chunk), PROGRAMS)
    group, part = group_of(chunks, most)
    programs = cooperative_programs(arrays, batch * -(-longest // (chunk * group)), PROGRAMS)
    share = 1 if INTERPRETED else programs // batch
    return Shares(share, group, part) if share else None


def shares_of(arrays: Arrays, keys: Values) -> Shares | None:
    """Return how to match a batch by anchors; None if walks are faster (bench/RESULTS.md).

    Interpreted programs run one after another, so each key gets one that waits for no other.
    """
    least = LEAST_TOKENS if keys.batch <= FEW_KEYS else 2 * LEAST_TOKENS
    chunks = keys.total // _chunk_of(arrays.page) + keys.batch
    if keys.batch > MOST_KEYS or keys.total < least * keys.batch or chunks > scratch.CHUNK_WORDS:
        return None
    longest = keys.total // keys.batch if keys.counts is None else int(keys.counts.max())
    return _shares(arrays, keys.batch, longest, chunks)


def _constants(
    arrays: Arrays, shares: Shares, touch: bool, lock: int, single: bool, names: bool, plan: bool, staged: bool
) -> tuple[int | bool, ...]:
    page, width, bigram, block = page_constants(arrays.page, arrays.bigram, TOKENS_A_CHUNK)
    chunk = _chunk_of(arrays.page)
    return page, width, bigram, block, chunk, *shares[1:], TAG_MASK, touch, lock, single, names, plan, staged


def _mask(arrays: Arrays) -> int:
    return arrays.scratch.anchors.shape[0] // scratch.ANCHOR_WAYS - 1


def match_long(
    arrays: Arrays, keys: Values, shares: Shares, names: PerQuery, out: Output, call: int, touch: bool, lock: int,
    plan: bool = False,
) -> None:  # fmt: skip
    """Match a batch of long keys in one launch: arguments and results as for `match`, without starts.

    shares: as from `shares_of`. plan: store only the row and the path length at which each key ends, in the columns
    Q_EDGE and Q_AT of `scratch.query`, and refuse nothing: the plan of an insert goes on from there.
    """
    _long(
        arrays, keys.batch * shares.share,
        (
            keys.address, keys.offsets, names.address, out.lengths, out.handles, 0, keys.total, names.number,
            keys.batch, arrays.rows, call, out.told, keys.left_out, shares.share, _mask(arrays),
        ),
        _constants(arrays, shares, touch, lock, keys.offsets == 0, names.address != 0, plan, False),
        (keys.wide,), WARPS, REGISTERS,
    )  # fmt: skip


def is_long(tokens: int) -> bool:
    """Return whether `match_long_one` matches a single key in host memory faster than one program."""
    return tokens >= LEAST_TOKENS


def match_long_one(
    arrays: Arrays, desk: Desk, key: tuple[int, int, bool, object], name: int, lengths: int, handles: int, call: int,
    touch: bool, lock: int, stream: int,
) -> bool:  # fmt: skip
    """Match one key in host memory by anchors: arguments and result as for `match_one`.

    The programs read the key from pinned memory side by side.
    """
    address, count, wide, _owner = key
    shares = _shares(arrays, 1, count, -(-count // _chunk_of(arrays.page)))
    assert shares is not None
    variant = _long.variant(
        _constants(arrays, shares, touch, lock, True, False, False, True), (False,), WARPS, REGISTERS
    )
    direct, mask = arrays.direct.get(variant), _mask(arrays)
    if direct is not None and stream >= 0:
        code = native.start_long.call(
            direct.record, shares.share, stream, desk.address, address, count, wide, name, arrays.rows, call, lengths,
            handles, mask,
        )  # fmt: skip
        if code > 0:
            raise_driver(code)
        return code == 0
    staged = native.stage.call(desk.address, 0, address, count, wide)
    if staged == 0:
        return False
    arguments = (
        staged, 0, 0, lengths, handles, desk.staging, count, name, 1, arrays.rows, call, -1, 0, shares.share, mask
    )  # fmt: skip
    _long(arrays, shares.share, arguments, variant.constants, variant.wide, WARPS, REGISTERS)
    native.commit.call(desk.address, call)
    return True
