"""What most kernels share: refuse a query, wait for the other programs of a launch, and tell the host.

A match, a lock or an unlock starts without checking all queries first, and is undone if one query is invalid. The last
program to finish knows whether a query is invalid. That program also writes the tree's sizes to pinned memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.launch import Arrays, Kernel
from flatradix.layout import mail, numbers, scratch

# What a program with an invalid query adds to the counter of finished programs.
BAD = tl.constexpr(1 << 32)


@triton.jit
def refuse(w, query, reason, value):
    """Record that one query is invalid, and why. The host is told the lowest invalid query of a call."""
    tl.store(w.value + query, value)
    tl.atomic_min(w.counters + scratch.ERROR, query * 64 - reason, sem="relaxed")


@triton.jit
def refuse_lanes(w, queries, reasons, values):
    """Record which of the lanes' queries are invalid. reasons: int64, 0 where the query is valid."""
    tl.store(w.value + queries, values, mask=reasons < 0)
    lowest = tl.min(tl.where(reasons < 0, queries * 64 - reasons, scratch.NO_ERROR))
    if lowest < scratch.NO_ERROR:
        tl.atomic_min(w.counters + scratch.ERROR, lowest, sem="relaxed")


@triton.jit
def acquire(word, least):
    """Acquire all writes that were released before `word` reached `least`, as it already has.

    The result of the addition must be used. Triton 3.6 drops an atomic addition of 0 whose result is not used, and with
    it the acquire, which discards stale lines of the L1 cache (bench/RESULTS.md).
    """
    seen = tl.atomic_add(word, 0, sem="acquire")
    while seen < least:
        seen = tl.atomic_add(word, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def wait_for_all(w, programs):
    """Wait for all programs of a cooperative launch: a barrier across programs.

    A barrier took 0.9 us for 132 or 264 programs on an H200 when Triton 3.6 dropped the acquire. By estimate it takes
    0.7 us more now.
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
def arrive(w, programs, bad=False):
    """Return (whether this program is the last of its launch to finish, whether any program so far had `bad` set).

    Only the last program acquires the writes of the others. An acquire by each program would discard the whole L1 cache
    of its multiprocessor, where other programs still walk.
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
    """Return the first refusal of this call (64 * query - reason), or scratch.NO_ERROR."""
    return tl.load(w.counters + scratch.ERROR, volatile=True)


@triton.jit
def _tell_refusal(s, w, call, error, OPERATION: tl.constexpr):
    count = tl.load(s.numbers + numbers.ERRORS) + 1
    value = tl.load(w.value + error // 64)
    tag = (count & mail.CALL_MASK) << 32
    place = w.mail + mail.FIRST_REFUSAL + (count % mail.REFUSAL_RING) * mail.REFUSAL_WORDS
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
    """Tell the host that the call is done, and how many calls were refused so far.

    The last program to finish calls this. It suffices where nothing was refused and no size has changed.
    """
    tl.store(w.mail + mail.ERRORS, ((call.to(tl.int64) & mail.CALL_MASK) << 32) | (errors & 0xFFFFFFFF))
    tl.store(w.counters + scratch.ARRIVED, 0)


@triton.jit
def read_sizes(s):
    """Return the sizes that the host is told: (evictable, protected, nodes, free units, refusals so far), int64."""
    free = tl.load(s.numbers + numbers.POOL_END) - tl.load(s.numbers + numbers.POOL_CURSOR)
    evictable, protected = tl.load(s.numbers + numbers.EVICTABLE), tl.load(s.numbers + numbers.PROTECTED)
    return evictable, protected, tl.load(s.numbers + numbers.NODES), free, tl.load(s.numbers + numbers.ERRORS)


@triton.jit
def tell_sizes(w, call, evictable, protected, nodes, free, errors):
    """Tell the host that the call is done, and the tree's sizes. One store, so that PCIe carries one packet."""
    word = tl.arange(0, 8)
    size = tl.where(word == mail.EVICTABLE, evictable, tl.where(word == mail.PROTECTED, protected, nodes))
    size = tl.where(word == mail.FREE_UNITS, free, tl.where(word == mail.ERRORS, errors & 0xFFFFFFFF, size))
    told = (word <= mail.ERRORS) | (word == mail.FREE_UNITS)
    tl.store(w.mail + word, ((call.to(tl.int64) & mail.CALL_MASK) << 32) | size, mask=told)


@triton.jit
def publish(s, w, call, error, OPERATION: tl.constexpr):
    """Tell the host the refusal, if any, and the tree's sizes. The last program to finish calls this at its end."""
    tl.debug_barrier()
    if error != scratch.NO_ERROR:
        _tell_refusal(s, w, call.to(tl.int64), error, OPERATION)
        tl.debug_barrier()
    evictable, protected, nodes, free, errors = read_sizes(s)
    tell_sizes(w, call, evictable, protected, nodes, free, errors)
    tl.store(w.counters + scratch.WAITING, 0)
    tl.store(w.counters + scratch.ARRIVED, 0)


@triton.jit
def answer(w, call, length, handle, prefix_length):
    """Write the result of a single key to the mail. One store, so that PCIe carries one packet."""
    word = tl.arange(0, mail.ANSWER_WORDS)
    value = tl.where(word == 0, length.to(tl.int64), tl.where(word == 1, handle, handle >> 32))
    value = tl.where(word == 3, prefix_length.to(tl.int64), value)
    place = w.mail + mail.FIRST_ANSWER + (call % mail.ANSWER_RING) * mail.ANSWER_WORDS
    tl.store(place + word, ((call.to(tl.int64) & mail.CALL_MASK) << 32) | (value & 0xFFFFFFFF))


@triton.jit
def tell_length(w, call, told, query, length, bad):
    """Write the length of a query of a batch to the mail, from word `told` on; NO_LENGTH if the query is invalid."""
    value = tl.where(bad, mail.NO_LENGTH, length.to(tl.int64))
    tl.store(w.mail + mail.FIRST_TOLD + told + query, ((call & mail.CALL_MASK) << 32) | value, mask=told >= 0)


@triton.jit
def move_protected(s, w, sign):
    """Move the tokens that this call made protected (sign 1) or evictable (-1) between the tree's counters."""
    tl.debug_barrier()
    tokens = tl.load(w.counters + scratch.MOVED_TOKENS) * sign
    protected = tl.load(s.numbers + numbers.PROTECTED)
    evictable = tl.load(s.numbers + numbers.EVICTABLE)
    tl.debug_barrier()
    tl.store(s.numbers + numbers.PROTECTED, protected + tokens)
    tl.store(s.numbers + numbers.EVICTABLE, evictable - tokens)
    tl.store(w.counters + scratch.MOVED_TOKENS, 0)


@triton.jit(do_not_specialize=["call"])
def publish_sizes_kernel(s, w, call: tl.int64):
    publish(s, w, call.to(tl.int64), tl.zeros([], tl.int64) + scratch.NO_ERROR, mail.MATCH)


_tell = Kernel(publish_sizes_kernel, ["i64"], warps=1)


def tell(arrays: Arrays, call: int) -> None:
    """Tell the host the tree's sizes, and do nothing else."""
    _tell(arrays, 1, (call,))
