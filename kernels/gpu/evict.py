"""Evict: select the victims without a heap. `free` then frees them.

Sort the unlocked nodes by (effective key, deeper end first). The victims are the first nodes in this order, up to the
node at which the tokens suffice. A heap of leaves gives the same victims in the same order. The end of the victims, the
cut, is found by counting nodes into bins (`evict_bins`). The nodes up to the cut are then ordered: each is compared to
the nodes of its bin (`evict_order`).

The count also gives a hint for later evictions: a key up to which there are some more nodes than were evicted. A small
eviction then lists the nodes up to that key and compares all of them with one another: one pass over the rows. A tree
of few rows needs no hint: all its nodes are listed.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from flatradix.kernels import native
from flatradix.kernels.gpu.evict_bins import (
    BEFORE,
    BINS,
    CONTENT,
    DEEPEST,
    LOW32,
    PIVOTS,
    WEIGHTS,
    bin_limits,
    bound_of,
    count_bins,
    find_cut,
    sample,
    scatter,
    width_for,
)
from flatradix.kernels.gpu.evict_keys import BLOCK, HIGHEST, evictable_block
from flatradix.kernels.gpu.evict_order import (
    FEW_RANKED,
    MANY_OTHERS,
    OTHERS,
    RANKED,
    SPENT,
    publish_victims,
    rank_bins,
    rank_list,
)
from flatradix.kernels.gpu.finish import arrive, refuse, wait_for_all
from flatradix.kernels.gpu.free import free_selected, free_variant, programs_for
from flatradix.kernels.gpu.launch import (
    Arrays,
    Kernel,
    Variant,
    cooperative_programs,
    direct_stream,
    raise_driver,
)
from flatradix.layout import numbers, reasons, scratch
from flatradix.layout.queries import Freeing, Wanted

# The bin of the cut is divided again if it has more nodes than this.
CROWD = tl.constexpr(2048)
# The launch orders the victims itself if that takes at most this many comparisons, 0.2 ms. Else torch sorts, 0.6 ms.
COMPARISONS = 33554432
_ANY = 1 << 62
# Bins are crowded if the nodes to be ordered need more comparisons than this on average.
CROWDED = tl.constexpr(512)
# The list of nodes that a hint selects: its capacity, and how many nodes it should hold beyond the evicted ones.
LIST = tl.constexpr(2048)
SPARE = tl.constexpr(256)
# All nodes of a tree are listed, without a hint, if no program then compares FEW_RANKED nodes with MANY_OTHERS more
# than this many times. Such a step takes 1 us; to count the nodes into bins takes 26 us for a tree of 320 rows (H200).
FEW_STEPS = 16

# Indices into `Scratch.counters` of the hint, which outlives a call: a key, and the tokens of the nodes up to that key.
# SPENT follows: how many of these tokens the last eviction took.
EVICTION_HINT = tl.constexpr(scratch.EVICTION_HINT)
PROMISE = tl.constexpr(scratch.EVICTION_HINT + 1)

# Words that a program clears at once.
CLEARED = tl.constexpr(256)


@triton.jit
def _leave_hint(w, work, low, shift, bound, tie, cut):
    """Store a hint: the highest key up to which there are at most SPARE nodes more than through the bin `cut`.

    The key is the upper limit of a bin. The hint promises no tokens if the bins divide ends instead of keys, or if more
    than LIST nodes lie in the bins from `cut` to that key.
    """
    i = tl.arange(0, BINS)
    through = tl.load(work + BEFORE + 1 + i)
    bin = tl.sum((through <= tl.load(work + BEFORE + 1 + cut) + (SPARE << 32)).to(tl.int32)) - 1
    _lowest, highest = bin_limits(bin, low, shift, bound)
    content = tl.max(tl.where(i <= bin, through, 0))
    left = (content >> 32) - (tl.load(work + BEFORE + cut) >> 32)
    tl.store(w.counters + EVICTION_HINT, highest)
    tl.store(w.counters + PROMISE, tl.where((tie < 0) & (left <= LIST), content & LOW32, 0))


@triton.jit
def _clear(words, count, programs):
    start = tl.program_id(0) * CLEARED
    while start < count:
        i = start + tl.arange(0, CLEARED)
        tl.store(words + i, tl.zeros([CLEARED], tl.int64), mask=i < count)
        start += programs * CLEARED


@triton.jit
def _collect(s, w, content, rows, capacity, programs, bound, BY_TICK: tl.constexpr):
    """List the evictable rows with keys up to `bound` in `victims[1]`, in any order; count them in `content`.

    content: (nodes << 32 | tokens). Rows beyond the LIST-th are only counted.
    """
    block = tl.program_id(0)
    while block * BLOCK < rows:
        row, key, evictable = evictable_block(s, w, block * BLOCK, capacity, BY_TICK)
        taken = evictable & (key <= bound)
        nodes = tl.sum(taken.to(tl.int32))
        if nodes > 0:
            tokens = tl.sum(tl.load(s.length + row, mask=taken, other=0).to(tl.int64))
            before = tl.atomic_add(content, (nodes.to(tl.int64) << 32) | tokens, sem="relaxed") >> 32
            place = before + tl.cumsum(taken.to(tl.int32)) - 1
            tl.store(w.victims + capacity + place, row, mask=taken & (place < LIST))
        block += programs


@triton.jit
def _hint(w, rows, programs, most_steps):
    """Return (a key, the tokens to be expected of the nodes up to it, whether these are all nodes, as they are few)."""
    hint = tl.load(w.counters + EVICTION_HINT)
    promise = tl.load(w.counters + PROMISE) - tl.load(w.counters + SPENT)
    steps = tl.cdiv(rows, programs * FEW_RANKED) * tl.cdiv(rows, MANY_OTHERS)
    few = (rows <= LIST) & (steps <= most_steps)
    return tl.where(few, HIGHEST, hint), tl.where(few, HIGHEST, promise), few


@triton.jit
def _select_from_list(s, w, work, rows, capacity, programs, wanted, most_steps, call, BY_TICK: tl.constexpr):
    """Select the victims from one list of nodes. Return 1, or 0 if the hint does not suffice."""
    good = tl.zeros([], tl.int32)
    hint, promise, few = _hint(w, rows, programs, most_steps)
    if wanted <= promise:
        _collect(s, w, work + CONTENT, rows, capacity, programs, hint, BY_TICK)
        wait_for_all(w, programs)
        content = tl.load(work + CONTENT)
        if ((content >> 32) <= LIST) & ((content & LOW32) >= wanted):
            rank_list(s, w, capacity, programs, content >> 32, wanted, call, BY_TICK)
            tl.store(w.counters + EVICTION_HINT, hint)
            # All nodes are no hint for a larger tree, in which to compare them would take longer than to count them.
            tl.store(w.counters + PROMISE, tl.where(few, 0, content & LOW32))
            good += 1
    return good


@triton.jit
def _select_from_bins(s, w, work, rows, capacity, programs, wanted, comparable, call, BY_TICK: tl.constexpr):
    pivots = sample(s, w, work, rows, programs, BY_TICK)
    wait_for_all(w, programs)
    low, high, bound = bound_of(s, w, work, pivots, wanted, programs)
    shift = width_for(low, tl.minimum(high, bound))
    tie = tl.zeros([], tl.int64) - 1
    reach = tie
    turn = tl.zeros([], tl.int32)
    cut = turn
    sort_from = turn
    comparisons = reach
    searching = turn == 0
    while searching:
        bins = work + turn % 3 * BINS
        if turn > 1:
            _clear(work + (turn + 1) % 3 * BINS, BINS, programs)
        count_bins(s, w, bins, rows, capacity, programs, low, shift, bound, tie, BY_TICK)
        wait_for_all(w, programs)
        cut, size, comparisons, total = find_cut(work, bins, wanted)
        lowest, highest = bin_limits(cut, low, shift, bound)
        sort_from = tl.where(comparisons <= comparable, 0, cut)
        reach = tl.where(tie >= 0, tie, highest)
        # Widen a bound that was too low; divide a crowded bin of different keys; divide a bin of one key by ends.
        widen = (total < wanted) & (bound < HIGHEST)
        divide = (total >= wanted) & (size > CROWD) & (lowest < highest)
        by_end = (total >= wanted) & (size > CROWD) & (lowest == highest) & (tie < 0)
        searching = widen | divide | by_end
        if searching:
            tie = tl.where(by_end, lowest, tie)
            low = tl.where(by_end, 0, tl.where(divide, lowest, low))
            bound = tl.where(widen, HIGHEST, tl.where(by_end, DEEPEST, highest))
            shift = width_for(low, tl.where(widen, tl.maximum(high, low), bound))
            turn += 1
    counts = work + (turn + 1) % 3 * BINS
    scatter(s, w, work, counts, rows, capacity, programs, low, shift, bound, tie, reach, cut, BY_TICK)
    if tl.program_id(0) == programs - 1:
        _leave_hint(w, work, low, shift, bound, tie, cut)
    wait_for_all(w, programs)
    found = tl.load(work + BEFORE + 1 + cut) >> 32
    if (comparisons > CROWDED * found) & (sort_from == 0):
        rank_bins(
            s, w, work, capacity, programs, found, wanted, call, low, shift, tie, cut, sort_from,
            FEW_RANKED, MANY_OTHERS, BY_TICK,
        )  # fmt: skip
    else:
        rank_bins(
            s, w, work, capacity, programs, found, wanted, call, low, shift, tie, cut, sort_from,
            RANKED, OTHERS, BY_TICK,
        )  # fmt: skip
    _clear(work, 3 * BINS, programs)
    _clear(work + WEIGHTS, 8 * PIVOTS, programs)


@triton.jit
def _tokens_asked_for(w, asked, wanted, ASKED: tl.constexpr):
    """Return the tokens to free. With ASKED, `wanted` is added to the number at `asked`, which must not be negative."""
    if ASKED:
        number = tl.load(asked)
        if (number < 0) & (tl.program_id(0) == 0):
            refuse(w, number * 0, reasons.NEGATIVE, number)
        wanted += number
    return tl.minimum(tl.maximum(wanted, 0), numbers.MAX_UNITS)


@triton.jit(do_not_specialize=["asked", "wanted", "comparable", "call", "programs", "most_steps"])
def select_kernel(
    s, w, asked, wanted: tl.int64, comparable: tl.int64, call: tl.int64, programs: tl.int32, most_steps: tl.int32,
    BY_TICK: tl.constexpr, ASKED: tl.constexpr,
):  # fmt: skip
    call = call.to(tl.int64)
    work = w.work
    rows = tl.load(s.numbers + numbers.ROWS)
    capacity = tl.load(s.numbers + numbers.ROW_CAPACITY)
    wanted = _tokens_asked_for(w, asked, wanted.to(tl.int64), ASKED)
    missing = wanted
    wanted = tl.minimum(wanted, tl.load(s.numbers + numbers.EVICTABLE))
    if wanted > 0:
        if _select_from_list(s, w, work, rows, capacity, programs, wanted, most_steps, call, BY_TICK) == 0:
            _select_from_bins(s, w, work, rows, capacity, programs, wanted, comparable.to(tl.int64), call, BY_TICK)
    last, _bad = arrive(w, programs)
    if last:
        if wanted <= 0:
            one = tl.arange(0, 1).to(tl.int64)
            publish_victims(w, call, one, one, one == 0)
        tl.store(w.counters + scratch.SELECTED + 2, missing)
        tl.store(work + CONTENT, 0)
        tl.store(w.counters + scratch.ARRIVED, 0)
        tl.store(w.counters + scratch.WAITING, 0)


_select = Kernel(select_kernel, ["*i64", "i64", "i64", "i64", "i32", "i32"], warps=16, cooperative=True)


def select(arrays: Arrays, wanted: Wanted, by_tick: bool, call: int) -> None:
    """Select the nodes to evict until enough tokens are free, or all evictable nodes if there are fewer tokens.

    Writes the rows of the victims to `scratch.victims[0]` in the order of eviction, the tokens of the victims before
    each to `scratch.tokens_before`, and the number of tokens and victims to the mail and to counters[SELECTED]. The
    number of victims has the bit UNORDERED if `order_victims` must order them. That is so for more than about 200,000
    victims, or where most have nearly the same key, unless `wanted.in_order`. Overwrites `scratch.partial` and
    `scratch.victims[1]`; does not change the tree.

    by_tick: the keys are the ticks, else `scratch.eviction_key`. Among a million nodes on an H200: 15 us in a series of
    evictions of up to 100 nodes each, else 36 us, also for 1 % of the nodes.
    """
    programs, variant = _selection(arrays, wanted, by_tick)
    arguments = wanted.address, wanted.more, _comparable(wanted), call, programs, FEW_STEPS
    _select(arrays, programs, arguments, variant.constants)


def _selection(arrays: Arrays, wanted: Wanted, by_tick: bool) -> tuple[int, Variant]:
    return cooperative_programs(arrays, -(-arrays.rows // 1024), 1), _variant(by_tick, wanted.address != 0)


@functools.cache
def _variant(by_tick: bool, asked: bool) -> Variant:
    return _select.variant((by_tick, asked))


def _comparable(wanted: Wanted) -> int:
    return _ANY if wanted.in_order else COMPARISONS


def evict(arrays: Arrays, wanted: Wanted, by_tick: bool, into: Freeing, call: int) -> None:
    """Do what `select` and `free_selected` do; once both are compiled, in one call of machine code."""
    selecting, variant = _selection(arrays, wanted, by_tick)
    first = arrays.direct.get(variant)
    second = arrays.direct.get(free_variant(arrays.page, arrays.pool_wide, into.counts != 0))
    if first is None or second is None or (stream := direct_stream(arrays.device)) < 0:
        select(arrays, wanted, by_tick, call)
        free_selected(arrays, into, call)
        return
    code = native.start_evict.call(
        first.record, second.record, stream, call, wanted.address, wanted.more,
        _comparable(wanted), selecting, FEW_STEPS, arrays.pool, into.slots, into.counts, into.space, into.returned,
        *programs_for(arrays, into),
    )  # fmt: skip
    if code:
        raise_driver(code)
