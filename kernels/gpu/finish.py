"""What the programs of a launch have in common: refusing, waiting for one another, and telling the host.

A launch does its work at once and undoes it if a query turns out to be bad; whether one did is known to the program
that is done last, which also leaves the tree's numbers in pinned memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.launch import Arrays, Kernel
from flatradix.layout import mail, numbers, scratch

# What a program with a bad query adds to the count of those that are done.
BAD = tl.constexpr(1 << 32)


@triton.jit
def refuse(w, query, reason, value):
    """Note that one query is bad. The lowest query of a call is the one that is told."""
    tl.store(w.value + query, value)
    tl.atomic_min(w.counters + scratch.ERROR, query * 64 - reason, sem="relaxed")


@triton.jit
def refuse_lanes(w, queries, reasons, values):
    """The same for lanes; `reasons` int64, 0 where nothing is wrong."""
    tl.store(w.value + queries, values, mask=reasons < 0)
    lowest = tl.min(tl.where(reasons < 0, queries * 64 - reasons, scratch.NO_ERROR))
    if lowest < scratch.NO_ERROR:
        tl.atomic_min(w.counters + scratch.ERROR, lowest, sem="relaxed")


@triton.jit
def acquire(word, least):
    """From here on all is seen that was written before `word` came to `least`, which it has by now.

    The result must be looked at: Triton 3.6 leaves out an atomic addition of 0 that nobody looks at, and with it what
    throws stale lines out of the L1 cache.
    """
    seen = tl.atomic_add(word, 0, sem="acquire")
    while seen < least:
        seen = tl.atomic_add(word, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def wait_for_all(w, programs):
    """A barrier across the programs of a cooperative launch.

    0.9 us for 132 or 264 of them on an H200 when Triton 3.6 left out its acquire; by estimate 0.7 us more since.
    """
    tl.debug_barrier()
    if programs > 1:
        before = tl.atomic_add(w.counters + scratch.WAITING, 1, sem="release")
        target = (before // programs + 1) * programs
        seen = before + 1
        while seen < target:
            seen = tl.load(w.counters + scratch.WAITING, volatile=True)
        acquire(w.counters + scratch.WAITING, target)


@triton.jit
def is_last(w, programs, bad=False):
    """(whether this program is the last of its launch, whether it or another was told to be `bad`).

    Only the last one sees what the others wrote: an acquire of every program would throw away the whole L1 cache of its
    multiprocessor, where its neighbours still walk.
    """
    tl.debug_barrier()
    mine = tl.where(bad, BAD, 0) + 1
    before = tl.atomic_add(w.counters + scratch.ARRIVED, mine, sem="release")
    last = (before & (BAD - 1)) == programs - 1
    if last:
        acquire(w.counters + scratch.ARRIVED, programs)
    return last, before + mine >= BAD


@triton.jit
def first_refusal(w):
    """The refusal of this call, scratch.NO_ERROR if there is none."""
    return tl.load(w.counters + scratch.ERROR, volatile=True)


@triton.jit
def _tell_refusal(s, w, call, error, OPERATION: tl.constexpr):
    count = tl.load(s.numbers + numbers.ERRORS) + 1
    value = tl.load(w.value + error // 64)
    tag = (count & mail.CALL_MASK) << 32
    place = w.mail + mail.FIRST_REFUSAL + (count % mail.REFUSALS) * mail.REFUSAL_WORDS
    tl.store(place + 4, tag | (call & mail.CALL_MASK))
    tl.store(place, tag | (error % 64) | (OPERATION << 8))
    tl.store(place + 1, tag | (error // 64))
    tl.store(place + 2, tag | (value & 0xFFFFFFFF))
    tl.store(place + 3, tag | ((value >> 32) & 0xFFFFFFFF))
    tl.debug_barrier()
    tl.store(s.numbers + numbers.ERRORS, count)
    tl.store(w.counters + scratch.ERROR, scratch.NO_ERROR)


@triton.jit
def publish_done(w, call, errors):
    """By the last program, where nothing was refused and no size has changed: only that the call is done."""
    tl.store(w.mail + mail.ERRORS, ((call.to(tl.int64) & mail.CALL_MASK) << 32) | (errors & 0xFFFFFFFF))
    tl.store(w.counters + scratch.ARRIVED, 0)


@triton.jit
def publish(s, w, call, error, OPERATION: tl.constexpr):
    """By the last program, after all else: the refusal, if any, and the sizes, for the host to read."""
    tl.debug_barrier()
    if error != scratch.NO_ERROR:
        _tell_refusal(s, w, call.to(tl.int64), error, OPERATION)
        tl.debug_barrier()
    tag = (call.to(tl.int64) & mail.CALL_MASK) << 32
    tl.store(w.mail + mail.EVICTABLE, tag | tl.load(s.numbers + numbers.EVICTABLE))
    tl.store(w.mail + mail.PROTECTED, tag | tl.load(s.numbers + numbers.PROTECTED))
    tl.store(w.mail + mail.NODES, tag | tl.load(s.numbers + numbers.NODES))
    tl.store(
        w.mail + mail.ROOM, tag | (tl.load(s.numbers + numbers.POOL_END) - tl.load(s.numbers + numbers.POOL_CURSOR))
    )
    tl.store(w.counters + scratch.WAITING, 0)
    publish_done(w, call, tl.load(s.numbers + numbers.ERRORS))


@triton.jit
def answer(w, call, length, handle, prefix_length):
    """Leave the result of a single key where the host looks for it."""
    tag = (call.to(tl.int64) & mail.CALL_MASK) << 32
    place = w.mail + mail.FIRST_ANSWER + (call % mail.ANSWERS) * mail.ANSWER_WORDS
    tl.store(place, tag | (length.to(tl.int64) & 0xFFFFFFFF))
    tl.store(place + 1, tag | (handle & 0xFFFFFFFF))
    tl.store(place + 2, tag | ((handle >> 32) & 0xFFFFFFFF))
    tl.store(place + 3, tag | (prefix_length.to(tl.int64) & 0xFFFFFFFF))


@triton.jit
def move_protected(s, w, sign):
    """Book what became protected (sign 1) or evictable (-1) in this launch."""
    tl.debug_barrier()
    tokens = tl.load(w.counters + scratch.NEWLY) * sign
    protected = tl.load(s.numbers + numbers.PROTECTED)
    evictable = tl.load(s.numbers + numbers.EVICTABLE)
    tl.debug_barrier()
    tl.store(s.numbers + numbers.PROTECTED, protected + tokens)
    tl.store(s.numbers + numbers.EVICTABLE, evictable - tokens)
    tl.store(w.counters + scratch.NEWLY, 0)


@triton.jit(do_not_specialize=["call"])
def tell_kernel(s, w, call: tl.int64):
    publish(s, w, call.to(tl.int64), tl.zeros([], tl.int64) + scratch.NO_ERROR, mail.MATCH)


_tell = Kernel(tell_kernel, ["i64"], warps=1)


def tell(arrays: Arrays, call: int) -> None:
    """Only tell the host the tree's numbers."""
    _tell(arrays, 1, (call,))
