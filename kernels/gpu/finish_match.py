"""The end of a match: cut edges for its locks and update the counters, or undo a refused match."""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.climb import take_back_locks
from flatradix.kernels.gpu.cut import column, cut_locked, finish_cuts
from flatradix.kernels.gpu.finish import first_refusal, move_protected, publish, publish_done
from flatradix.kernels.gpu.lock import row_or_above
from flatradix.kernels.gpu.walk import undo_touches
from flatradix.layout import mail, numbers, scratch

# What LOCK says of a match: to lock the places (1), only to split the edges on which they end (2), or neither (0).
LOCKS = tl.constexpr(1)
# Queries that are undone at once.
UNDONE = tl.constexpr(128)


@triton.jit
def _undo(s, w, lengths, handles, batch, clock, TOUCH: tl.constexpr, LOCK: tl.constexpr):
    """Undo all that a refused call did, and set its lengths and handles to -1."""
    first = tl.zeros([], tl.int32)
    while first < batch:
        query = first + tl.arange(0, UNDONE)
        if TOUCH or LOCK == LOCKS:
            row = tl.load(column(w, batch, scratch.Q_ROW) + query, mask=query < batch, other=0)
            if LOCK == LOCKS:
                cut = tl.load(column(w, batch, scratch.Q_CUT) + query, mask=query < batch, other=0)
                tl.atomic_add(s.own_locks + row, -1, mask=(row > 0) & (cut == 0), sem="relaxed")
                take_back_locks(s, row_or_above(s, row, cut), tl.zeros_like(row) + 1)
            if TOUCH:
                undo_touches(s, w, row, clock, row > 0)
        tl.store(lengths + query, -1, mask=query < batch)
        tl.store(handles + query, -1, mask=query < batch)
        first += UNDONE


@triton.jit
def finish_match(
    s, w, lengths, handles, batch, rows, call, clock, errors, bad,
    PAGE: tl.constexpr, BIGRAM: tl.constexpr, TOUCH: tl.constexpr, LOCK: tl.constexpr,
):  # fmt: skip
    """Finish a match: undo a refused call, or cut edges and update the counters. Only the last program calls this."""
    if bad:
        _undo(s, w, lengths, handles, batch, clock, TOUCH, LOCK)
        if LOCK != 0:
            tl.store(w.counters + scratch.MOVED_TOKENS, 0)
            tl.store(w.counters + scratch.CUTS, 0)
        publish(s, w, call, first_refusal(w), mail.MATCH)
    else:
        if LOCK != 0:
            if tl.load(w.counters + scratch.CUTS, volatile=True) > 0:
                cut_locked(s, w, handles, batch, rows, clock, 0, 1, PAGE, BIGRAM, 2 * TOUCH, LOCK == LOCKS)
                tl.debug_barrier()
                finish_cuts(s, w)
            if LOCK == LOCKS:
                move_protected(s, w, 1)
        if TOUCH:
            tl.store(s.numbers + numbers.CLOCK, clock + 2 * batch)
        if LOCK != 0:
            publish(s, w, call, tl.zeros([], tl.int64) + scratch.NO_ERROR, mail.MATCH)
        else:
            publish_done(w, call, errors)
