"""Match, and match with lock, in one launch.

Each program walks one key; the last program to finish updates the counters.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from flatradix.kernels import native
from flatradix.kernels.gpu.cut import column
from flatradix.kernels.gpu.finish import answer, arrive, refuse, tell_length
from flatradix.kernels.gpu.finish_match import LOCKS, finish_match
from flatradix.kernels.gpu.launch import Arrays, Kernel, Variant, direct_stream, raise_driver
from flatradix.kernels.gpu.long import is_long, match_long, match_long_one, shares_of
from flatradix.kernels.gpu.rows import handle_of
from flatradix.kernels.gpu.walk import (
    MAX_TOKEN,
    begin_at,
    bring,
    first_outside,
    key_range,
    name_of,
    page_constants,
    visit,
    visit_up,
    walk,
    whole_pages,
)
from flatradix.layout import numbers, reasons, scratch
from flatradix.layout.queries import Desk, Output, PerQuery, PlaceAddresses, Values


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "start_handles", "start_lengths", "lengths", "handles", "stage", "total", "name",
        "batch", "rows", "call", "told", "left_out",
    ]
)  # fmt: skip
def match_kernel(
    s, w, values, offsets, names, start_handles, start_lengths, lengths, handles, stage,
    total: tl.int64, name: tl.int64, batch: tl.int32, rows: tl.int32, call: tl.int64, told: tl.int32,
    left_out: tl.int64,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, TOUCH: tl.constexpr,
    LOCK: tl.constexpr, SINGLE: tl.constexpr, STAGED: tl.constexpr, NAMES: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    clock = tl.load(s.numbers + numbers.CLOCK)
    errors = tl.load(s.numbers + numbers.ERRORS)
    tick = clock + 2 * (query.to(tl.int64) + 1)
    call = call.to(tl.int64)
    place, count, good = key_range(offsets, query, batch, total, SINGLE)
    count = tl.maximum(count - left_out, 0)
    key = values + place
    if STAGED:
        bring(values, stage, count)
        key = stage
    code, named = name_of(names, name, query, NAMES)
    row, start, reason = begin_at(s, start_handles, start_lengths, query, key, count, code, named, PAGE, BIGRAM, START)
    if not good:
        reason = reason * 0 + reasons.BAD_OFFSETS
    first_row = row
    length = start
    left = tl.zeros([], tl.int32)
    newly = tl.zeros([], tl.int64)
    bad = reason < 0
    if bad:
        refuse(w, query, reason, start)
        row = row * 0
    else:
        units = whole_pages(count, PAGE, BIGRAM)
        row, done, left, newly, old = walk(
            s, w, key, units, code, row, start, clock, tick, PAGE, WIDTH, BIGRAM, BLOCK, TOUCH, LOCK == LOCKS
        )
        length = start + done
        if done < units:
            place = first_outside(key, done, PAGE + BIGRAM, MAX_TOKEN, WIDTH)
            if place >= 0:
                refuse(w, query, reasons.BAD_TOKEN, place)
                bad = place >= 0
        if LOCK:
            if left > 0:
                tl.atomic_add(w.counters + scratch.CUTS, 1, sem="relaxed")
            elif LOCK == LOCKS:
                tl.atomic_add(s.own_locks + row, 1, mask=row > 0, sem="relaxed")
        elif (left > 0) & (row != first_row):
            visit(s, w, row, old, clock, tick, TOUCH)
        if START and (TOUCH or LOCK == LOCKS):
            from_row = first_row
            if LOCK:
                if (row == first_row) & (left > 0):
                    from_row = tl.maximum(tl.load(s.parent + first_row), 0)
            newly += visit_up(s, w, from_row, clock, tick, TOUCH, LOCK == LOCKS)
    if LOCK == LOCKS:
        if newly > 0:
            tl.atomic_add(w.counters + scratch.MOVED_TOKENS, newly, sem="relaxed")
    if TOUCH or LOCK:
        tl.store(column(w, batch, scratch.Q_ROW) + query, row)
        tl.store(column(w, batch, scratch.Q_CUT) + query, tl.where(left > 0, length, 0))
    handle = handle_of(s, row)
    tl.store(lengths + query, length)
    tl.store(handles + query, handle)
    if SINGLE:
        tl.debug_barrier()  # one thread stores the refusal and the results, all threads read them
        finish_match(s, w, lengths, handles, batch, rows, call, clock, errors, bad, PAGE, BIGRAM, TOUCH, LOCK)
        if LOCK:
            tl.debug_barrier()
            handle = tl.load(handles)
        answer(w, call, tl.where(bad, -1, length), handle, length * 0)
    else:
        tell_length(w, call, told, query, length, bad)
        last, any_bad = arrive(w, tl.num_programs(0), bad)
        if last:
            finish_match(s, w, lengths, handles, batch, rows, call, clock, errors, any_bad, PAGE, BIGRAM, TOUCH, LOCK)


_match = Kernel(
    match_kernel,
    ["*w", "*i64", "*i64", "*i64", "*i32", "*i32", "*i64", "*w", "i64", "i64", "i32", "i32", "i64", "i32", "i64"],
)


def shape(batch: int, average: int, lock: int) -> tuple[int, int, int]:
    """Return (tokens a block, warps a program, registers a thread or 0 for no limit), as measured on an H200.

    A few long keys need many loads in flight; many keys need many programs on a multiprocessor. 8,192 keys of 4,096
    tokens take 103 us with blocks of 512, 2 warps and the compiler's 80 registers, but 75 us with the choice below
    (bench/RESULTS.md). The code that cuts edges needs 148 registers. Without a limit the walk would have to get as
    many, and fewer programs would fit on a multiprocessor.
    """
    if batch <= 512 and average >= 1 << 16:
        return 2048, 4, 0
    if lock:
        return 512, 4, 64
    if batch >= 4096:
        return 256, 1, 64
    return (512, 2, 64) if batch >= 1024 and average <= 1 << 14 else (512, 4, 0)


def match(
    arrays: Arrays,
    keys: Values,
    names: PerQuery,
    starts: PlaceAddresses,
    out: Output,
    call: int,
    touch: bool,
    lock: int,
) -> None:
    """Match a batch in one launch.

    lock: 1 to lock the places, 2 to split the edges on which they end, else 0.
    names: code * 2 + (1 if the caller gave a name). Fills the handles and lengths of `out`, with -1 if the call is
    refused. The last `keys.left_out` tokens of each key are not looked up. Tells the lengths in the mail from
    `out.told` on, if that is not negative and the call is not refused.
    """
    shares = shares_of(arrays, keys) if starts.handles == 0 else None
    if shares:
        match_long(arrays, keys, shares, names, out, call, touch, lock)
        return
    block, warps, registers = shape(keys.batch, keys.total // keys.batch, lock)
    variant = _variant(
        arrays.page, arrays.bigram, block, warps, registers, touch, lock, keys.offsets == 0, names.address != 0,
        starts.handles != 0, keys.wide,
    )  # fmt: skip
    direct = arrays.direct.get(variant)
    if direct is None or (stream := direct_stream(arrays.device)) < 0:
        _match(
            arrays, keys.batch,
            (
                keys.address, keys.offsets, names.address, starts.handles, starts.lengths, out.lengths, out.handles, 0,
                keys.total, names.number, keys.batch, arrays.rows, call, out.told, keys.left_out,
            ),
            variant.constants, variant.wide, warps, registers,
        )  # fmt: skip
    elif code := native.start_matches.call(
        direct.record, keys.batch, stream, keys.address, keys.offsets, names.address, starts.handles, starts.lengths,
        out.lengths, out.handles, keys.total, names.number, keys.batch, arrays.rows, call, out.told, keys.left_out,
    ):  # fmt: skip
        raise_driver(code)


@functools.cache
def _variant(
    page: int, bigram: bool, block: int, warps: int, registers: int, touch: bool, lock: int, single: bool,
    names: bool, starts: bool, wide: bool,
) -> Variant:  # fmt: skip
    constants = *page_constants(page, bigram, block), touch, lock, single, False, names, starts
    return _match.variant(constants, (wide, wide), warps, registers)


@functools.cache
def _single(page: int, bigram: bool, touch: bool, lock: int) -> Variant:
    """Return the variant of `match_kernel` for one key in pinned memory, where it has 32 bits a token."""
    constants = *page_constants(page, bigram, 512), touch, lock, True, True, False, False
    return _match.variant(constants, (False, False))


def match_one(
    arrays: Arrays, desk: Desk, key: tuple[int, int, bool, object], name: int, lengths: int, handles: int, call: int,
    touch: bool, lock: int, stream: int,
) -> bool:  # fmt: skip
    """Match one key in host memory from the root. Return False if no pinned buffer is free: nothing is launched then.

    key: (address, number of tokens, whether they are int64, their owner); the desk's buffers must suffice. name, lock:
    as for `match`. lengths, handles: addresses for the result. stream: torch's current stream if the tree's device is
    torch's current device; else, or where unknown, -1.
    """
    address, count, wide, _owner = key
    if is_long(count):
        return match_long_one(arrays, desk, key, name, lengths, handles, call, touch, lock, stream)
    variant = _single(arrays.page, arrays.bigram, touch, lock)
    direct = arrays.direct.get(variant)
    if direct is not None and stream >= 0:
        code = native.start_match.call(
            direct.record, stream, desk.address, address, count, wide, name, arrays.rows, call, lengths, handles
        )
        if code > 0:
            raise_driver(code)
        return code == 0
    staged = native.stage.call(desk.address, 0, address, count, wide)
    if staged == 0:
        return False
    _match(
        arrays, 1,
        (staged, 0, 0, 0, 0, lengths, handles, desk.staging, count, name, 1, arrays.rows, call, -1, 0),
        variant.constants, variant.wide,
    )  # fmt: skip
    native.commit.call(desk.address, call)
    return True
