"""Insert one short key in one launch: a single program does what the three launches of a batch do.

A single key is the only one of its group, so there are no claims to settle.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from flatradix.kernels import native
from flatradix.kernels.gpu.build import build_nodes, finish_insert
from flatradix.kernels.gpu.cut import compare_cuts, list_cuts, put
from flatradix.kernels.gpu.finish import answer, first_refusal
from flatradix.kernels.gpu.launch import Arrays, Kernel, Variant, direct_stream, raise_driver
from flatradix.kernels.gpu.plan import LARGEST_SLOTS, plan_key
from flatradix.kernels.gpu.settle import number_nodes
from flatradix.kernels.gpu.walk import bring, name_of, page_constants
from flatradix.layout import numbers, scratch
from flatradix.layout.desk import STAGED_TOKENS
from flatradix.layout.queries import Desk, Output, PerQuery, PlaceAddresses, Values


@triton.jit(
    do_not_specialize=[
        "values", "start_handles", "start_lengths", "slots", "stage", "pool", "prefix_lengths", "lengths", "handles",
        "total", "slot_total", "limit", "name", "priority", "inserted", "rows", "call",
    ]
)  # fmt: skip
def insert_one_kernel(
    s, w, values, start_handles, start_lengths, slots, stage, pool, prefix_lengths, lengths, handles, total: tl.int64,
    slot_total: tl.int64, limit: tl.int64, name: tl.int64, priority: tl.int64, inserted: tl.int64, rows: tl.int32,
    call: tl.int64,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr, STAGED: tl.constexpr,
    START: tl.constexpr,
):  # fmt: skip
    """STAGED: the key is in pinned memory, and is copied to `stage` first."""
    call = call.to(tl.int64)
    total = total.to(tl.int64)
    clock = tl.load(s.numbers + numbers.CLOCK)
    query = tl.program_id(0)
    batch = tl.num_programs(0)  # one key, one program; Triton 3.6 cannot compile the kernel with a constant here
    if STAGED:
        bring(values, stage, total)
        values = stage
    code, named = name_of(lengths, name, query, False)
    _row, _length, _start, opens, cuts = plan_key(
        s, w, values, slots, total, slot_total.to(tl.int64), total >= 0, query, batch, code, named, start_handles,
        start_lengths, limit, PAGE, WIDTH, BIGRAM, BLOCK, START, False,
    )  # fmt: skip
    put(w, batch, query, tl.where(opens, 0, -1), scratch.Q_LEAF)
    tl.debug_barrier()  # all threads read what one of them has stored
    count = query * 0
    if first_refusal(w) == scratch.NO_ERROR:
        if cuts:
            count = list_cuts(w, batch)
            compare_cuts(w, batch, count, query, batch)
            tl.debug_barrier()
        number_nodes(s, w, batch, count, 0)
        tl.debug_barrier()
    error = first_refusal(w)
    build_nodes(
        s, w, values, lengths, lengths, slots, lengths, lengths, lengths, pool, prefix_lengths, lengths, handles, name,
        priority, inserted, batch, rows, clock, error, count, query, batch, PAGE, BIGRAM, True, False, False, False,
    )  # fmt: skip
    tl.debug_barrier()
    finish_insert(s, w, batch, clock, call, error)
    length = tl.load(lengths).to(tl.int64)
    answer(w, call, length, tl.load(handles), tl.load(prefix_lengths))


_insert_one = Kernel(
    insert_one_kernel,
    [
        "*w", "*i64", "*i32", "*w", "*i32", "*w", "*i32", "*i32", "*i64",
        "i64", "i64", "i64", "i64", "i64", "i64", "i32", "i64",
    ],
)  # fmt: skip


@functools.cache
def _variant(page: int, bigram: bool, staged: bool, starts: bool, wide: tuple[bool, bool, bool]) -> Variant:
    return _insert_one.variant((*page_constants(page, bigram, 512), staged, starts), wide)


def is_one(keys: Values, names: PerQuery, priorities: PerQuery, inserted: PerQuery) -> bool:
    """Return whether `insert_one` takes an insert: one key, not too long for one program, and a number of each kind."""
    plain = keys.offsets == 0 and keys.total <= STAGED_TOKENS
    return plain and not (names.address or priorities.address or inserted.address)


def insert_one(
    arrays: Arrays, desk: Desk, keys: Values, slots: Values, name: int, starts: PlaceAddresses, priority: int,
    inserted: int, out: Output, call: int,
) -> bool:  # fmt: skip
    """Insert one key, of which the pools have room for all tokens.

    Returns False if too few pinned buffers are free for a key, or slots, in host memory: nothing is launched then.
    name: as for `match`. inserted: the length up to which the same request has inserted before. Fills `out`, with -1 if
    the call is refused.
    """
    wide = keys.wide and not keys.on_host, slots.wide and not slots.on_host, arrays.pool_wide
    variant = _variant(arrays.page, arrays.bigram, keys.on_host, starts.handles != 0, wide)
    direct = arrays.direct.get(variant)
    numbers_of_key = keys.total, slots.total, LARGEST_SLOTS[arrays.pool_wide], name, priority, inserted
    results = out.prefix_lengths, out.lengths, out.handles
    if direct is not None and (stream := direct_stream(arrays.device)) >= 0:
        code = native.start_insert_one.call(
            direct.record, stream, desk.address, keys.address, keys.on_host, keys.wide, starts.handles, starts.lengths,
            slots.address, slots.on_host, slots.wide, arrays.pool, *results, *numbers_of_key, arrays.rows, call,
        )  # fmt: skip
        if code > 0:
            raise_driver(code)
        return code == 0
    key, slot = _staged(desk, 0, keys), _staged(desk, int(keys.on_host), slots)
    if (keys.on_host and key == 0) or (slots.on_host and slot == 0):
        return False
    _insert_one(
        arrays, 1,
        (
            key, starts.handles, starts.lengths, slot, desk.staging if keys.on_host else 0, arrays.pool, *results,
            *numbers_of_key, arrays.rows, call,
        ),
        variant.constants, variant.wide,
    )  # fmt: skip
    for _ in range(keys.on_host + slots.on_host):
        native.commit.call(desk.address, call)
    return True


def _staged(desk: Desk, ahead: int, values: Values) -> int:
    """Return the address of values: of a pinned buffer for those in host memory, 0 if none is free."""
    if not values.on_host:
        return values.address
    return int(native.stage.call(desk.address, ahead, values.address, values.total, values.wide))
