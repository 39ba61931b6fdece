"""Rematch: match whole keys from where they ended before, without a touch."""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.finish import arrive, first_refusal, publish, publish_done, refuse
from flatradix.kernels.gpu.launch import Arrays, Kernel
from flatradix.kernels.gpu.match import shape
from flatradix.kernels.gpu.rows import handle_of, namespace_of, resolve
from flatradix.kernels.gpu.walk import (
    MAX_TOKEN,
    first_outside,
    key_range,
    name_of,
    page_constants,
    walk,
    whole_pages,
)
from flatradix.layout import mail, numbers, reasons
from flatradix.layout.queries import Output, PerQuery, PlaceAddresses, Values

LANES = tl.constexpr(128)


@triton.jit
def _old_place(s, handles, lengths, query, units, code, named, PAGE: tl.constexpr):
    """Return (row, path length) of a place from which a whole key can be walked on.

    That is the root if the place is gone, or was dropped.
    """
    one = tl.arange(0, 1)
    handle = tl.load(handles + query + one)
    length = tl.load(lengths + query)
    rows, why = resolve(s, handle, tl.load(lengths + query + one).to(tl.int64), one == 0, PAGE)
    row = tl.max(rows).to(tl.int32)
    good = (tl.min(why) == 0) & (row > 0) & (length <= units) & (tl.load(s.created + row) >= 0)
    if good & named:
        good = namespace_of(s, row) == code
    return tl.where(good, row, 0), tl.where(good, length, 0)


@triton.jit
def _undo(lengths, handles, batch):
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, LANES)
        tl.store(lengths + query, -1, mask=query < batch)
        tl.store(handles + query, -1, mask=query < batch)
        first += LANES


@triton.jit(
    do_not_specialize=[
        "values", "offsets", "names", "old_handles", "old_lengths", "lengths", "handles", "total", "name", "batch",
        "call",
    ]
)  # fmt: skip
def rematch_kernel(
    s, w, values, offsets, names, old_handles, old_lengths, lengths, handles,
    total: tl.int64, name: tl.int64, batch: tl.int32, call: tl.int64,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, SINGLE: tl.constexpr,
    NAMES: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    errors = tl.load(s.numbers + numbers.ERRORS)
    clock = tl.load(s.numbers + numbers.CLOCK)
    code, named = name_of(names, name, query, NAMES)
    begin, count, good = key_range(offsets, query, batch, total, SINGLE)
    wanted = whole_pages(count, PAGE, BIGRAM)
    row, start = _old_place(s, old_handles, old_lengths, query, wanted, code, named, PAGE)
    key = values + begin + start
    left = wanted - start
    row, done, _left, _newly, _old = walk(
        s, w, key, left, code, row, start, clock, clock, PAGE, WIDTH, BIGRAM, BLOCK, False, False
    )
    bad = False
    if not good:
        refuse(w, query, tl.zeros([], tl.int64) + reasons.BAD_OFFSETS, start)
        bad = True
    elif done < left:
        place = first_outside(key, done, PAGE + BIGRAM, MAX_TOKEN, WIDTH)
        if place >= 0:
            refuse(w, query, tl.zeros([], tl.int64) + reasons.BAD_TOKEN, start + place)
            bad = True
    tl.store(lengths + query, start + done)
    tl.store(handles + query, handle_of(s, row))
    last, any_bad = arrive(w, tl.num_programs(0), bad)
    if last:
        if any_bad:
            _undo(lengths, handles, batch)
            publish(s, w, call, first_refusal(w), mail.REMATCH)
        else:
            publish_done(w, call, errors)


_rematch = Kernel(rematch_kernel, ["*w", "*i64", "*i64", "*i64", "*i32", "*i32", "*i64", "i64", "i64", "i32", "i64"])


def rematch(arrays: Arrays, keys: Values, names: PerQuery, places: PlaceAddresses, out: Output, call: int) -> None:
    """Match whole keys from old places, in one launch. names, out: as for `match`."""
    block, warps, registers = shape(keys.batch, keys.total // keys.batch, False)
    arguments = (
        keys.address, keys.offsets, names.address, places.handles, places.lengths, out.lengths, out.handles, keys.total,
        names.number, keys.batch, call,
    )  # fmt: skip
    constants = *page_constants(arrays.page, arrays.bigram, block), keys.offsets == 0, names.address != 0
    _rematch(arrays, keys.batch, arguments, constants, (keys.wide,), warps, registers)
