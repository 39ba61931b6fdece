"""Follow: match the prompts of a waiting queue again, each from where its match ended before. For queues on a GPU.

Most matches are where they were, so a program costs one chain of loads: the place, its row, the next page's child.
Where a row has been freed, the match goes on from the row above, of which each prompt keeps the place, too. A change is
also written to pinned memory, where the host reads it without a copy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.finish import arrive, publish_done
from flatradix.kernels.gpu.launch import Arrays, Kernel
from flatradix.kernels.gpu.rows import handle_of, resolve
from flatradix.kernels.gpu.walk import page_constants, walk
from flatradix.layout import numbers, scratch
from flatradix.layout.queries import PromptAddresses


@triton.jit
def _last_places(s, handles, lengths, query, capacity, units, PAGE: tl.constexpr):
    """Return (row, path length) of the prompt's place or of that above, whichever is there; the root if none is.

    What was dropped is not there.

    Also the handle and path length of the prompt's place as stored.
    """
    which = tl.arange(0, 2)
    handle = tl.load(handles + which * capacity + query)
    length = tl.load(lengths + which * capacity + query)
    row, reason = resolve(s, handle, length.to(tl.int64), which >= 0, PAGE)
    dropped = tl.load(s.created + row) < 0
    good = (reason == 0) & (row > 0) & (length <= units) & ~dropped
    chosen = which == tl.min(tl.where(good, which, 2))
    first = which == 0
    return (
        tl.max(tl.where(chosen, row, 0)).to(tl.int32),
        tl.max(tl.where(chosen, length, 0)),
        tl.sum(tl.where(first, handle, 0)),
        tl.sum(tl.where(first, length, 0)),
    )


@triton.jit
def _keep_place(s, w, handles, lengths, rows, told, query, capacity, row, length, handle):
    """Store the place at which a prompt's match ends now, and that above; write row and length for the host."""
    tl.store(handles + query, handle)
    tl.store(lengths + query, length)
    tl.store(rows + query, row)
    above = tl.where(row > 0, tl.maximum(tl.load(s.parent + row), 0), 0)
    tl.store(handles + capacity + query, handle_of(s, above))
    tl.store(lengths + capacity + query, tl.load(s.end + above))
    tl.store(told + query, length)
    tl.store(told + capacity + query, row)
    # The host must see these two before it sees that the call is done.
    tl.debug_barrier()
    tl.atomic_add(w.counters + scratch.TOLD, 1, sem="release", scope="sys")


@triton.jit(
    do_not_specialize=["pool", "begins", "units", "names", "handles", "lengths", "rows", "told", "capacity", "call"]
)
def follow_kernel(
    s, w, pool, begins, units, names, handles, lengths, rows, told, capacity: tl.int32, call: tl.int64,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    errors = tl.load(s.numbers + numbers.ERRORS)
    clock = tl.load(s.numbers + numbers.CLOCK)
    code = tl.load(names + query).to(tl.int32)
    begin = tl.load(begins + query)
    wanted = tl.load(units + query)
    row, start, old_handle, old_length = _last_places(s, handles, lengths, query, capacity, wanted, PAGE)
    row, done, _left, _newly, _old = walk(
        s, w, pool + begin + start, wanted - start, code, row, start, clock, clock, PAGE, WIDTH, BIGRAM, BLOCK, False,
        False,
    )  # fmt: skip
    handle = handle_of(s, row)
    if (handle != old_handle) | (start + done != old_length):
        _keep_place(s, w, handles, lengths, rows, told, query, capacity, row, start + done, handle)
    last, _bad = arrive(w, tl.num_programs(0))
    if last:
        publish_done(w, call, errors)


_follow = Kernel(follow_kernel, ["*i32", "*i64", "*i32", "*i64", "*i64", "*i32", "*i32", "*i32", "i32", "i64"], warps=1)


def follow(arrays: Arrays, prompts: PromptAddresses, entries: int, call: int) -> None:
    """Match the first `entries` prompts of a waiting queue from their places, which are replaced, in one launch."""
    # Most walks end at once, so what counts is how many programs fit on a multiprocessor.
    constants = page_constants(arrays.page, arrays.bigram, 256)
    _follow(arrays, entries, (*prompts, call), constants, (), 1, 64)
