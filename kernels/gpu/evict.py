"""Evict: find the nodes that go first, with no heap; `free` then frees them.

Unlocked nodes in the order (effective key, deeper end first), cut where the tokens suffice, are what a heap of leaves
gives. The cut is found by counting (`evict_bins`), and the nodes up to it are put in order by comparing each with those
of its bin (`evict_order`).

Such a count also tells up to which key there are some more nodes than were evicted. The next evictions, if they are
small, list what is not above that key and compare all of it: one pass over the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flatradix.kernels.gpu.evict_bins import (
    BEFORE,
    BINS,
    CONTENT,
    DEEPEST,
    LOW32,
    PIVOTS,
    SCRATCH,
    WEIGHTS,
    bound_of,
    count_bins,
    edges_of,
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
    rank_bins,
    rank_list,
    tell_victims,
)
from flatradix.kernels.gpu.finish import is_last, wait_for_all
from flatradix.kernels.gpu.launch import Arrays, Kernel, current_stream, resident
from flatradix.layout import numbers, scratch

# A bin in which the cut falls is divided once more if it has more nodes than this.
CROWD = tl.constexpr(2048)
# Victims are put in order in the launch unless that takes more comparisons than this, 0.2 ms; sorting takes 0.6 ms.
COMPARISONS = tl.constexpr(33554432)
# Bins are crowded, for those who compare the nodes in them, with more than this.
CROWDED = tl.constexpr(512)
# A list of nodes that are all compared: how many it may hold, and how many more than are evicted it should.
LIST = tl.constexpr(2048)
SPARE = tl.constexpr(256)

# Places in `Scratch.counters` that outlive a call, as a guess for the next: a key, and the tokens of the nodes not
# above it; then SPENT, of those evicted since.
HINT = tl.constexpr(scratch.HINT)
PROMISE = tl.constexpr(scratch.HINT + 1)

# Words that a program clears at once.
CLEARED = tl.constexpr(256)


_bins_of_streams: dict[tuple[int, int], torch.Tensor] = {}


def _bins_of(device: int, stream: int) -> torch.Tensor:
    """Launches on one stream follow one another, so that they can share it whatever trees they are for.

    Threads with trees of their own may ask at once: all get the same one.
    """
    found = _bins_of_streams.get((device, stream))
    if found is None:
        made = torch.zeros(SCRATCH, dtype=torch.int64, device="cpu" if device < 0 else f"cuda:{device}")
        found = _bins_of_streams.setdefault((device, stream), made)
    return found


def _bins(arrays: Arrays) -> int:
    stream = 0 if arrays.device < 0 else current_stream(arrays.device)
    return _bins_of(arrays.device, stream).data_ptr()


@triton.jit
def _leave_hint(w, work, low, shift, bound, tie, cut):
    """Look for a key up to which there are SPARE nodes more than up to the cut, and not too many in the cut's bin."""
    i = tl.arange(0, BINS)
    through = tl.load(work + BEFORE + 1 + i)
    bin = tl.sum((through <= tl.load(work + BEFORE + 1 + cut) + (SPARE << 32)).to(tl.int32)) - 1
    _lowest, highest = edges_of(bin, low, shift, bound)
    content = tl.max(tl.where(i <= bin, through, 0))
    left = (content >> 32) - (tl.load(work + BEFORE + cut) >> 32)
    tl.store(w.counters + HINT, highest)
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
    """List the rows not above the bound in `victims[1]`, in any order, and count them, (nodes << 32 | tokens)."""
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
def _select_from_list(s, w, work, rows, capacity, programs, wanted, call, BY_TICK: tl.constexpr):
    """Try the hint of the last call; returns whether it was good."""
    good = tl.zeros([], tl.int32)
    hint = tl.load(w.counters + HINT)
    if wanted <= tl.load(w.counters + PROMISE) - tl.load(w.counters + SPENT):
        _collect(s, w, work + CONTENT, rows, capacity, programs, hint, BY_TICK)
        wait_for_all(w, programs)
        content = tl.load(work + CONTENT)
        if ((content >> 32) <= LIST) & ((content & LOW32) >= wanted):
            rank_list(s, w, capacity, programs, content >> 32, wanted, call, BY_TICK)
            tl.store(w.counters + PROMISE, content & LOW32)
            good += 1
    return good


@triton.jit
def _select_from_bins(s, w, work, rows, capacity, programs, wanted, call, BY_TICK: tl.constexpr):
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
        lowest, highest = edges_of(cut, low, shift, bound)
        sort_from = tl.where(comparisons <= COMPARISONS, 0, cut)
        reach = tl.where(tie >= 0, tie, highest)
        # The sample promised too much; or the cut's bin is crowded with different keys, or with one key.
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


@triton.jit(do_not_specialize=["work", "wanted", "call", "programs"])
def select_kernel(s, w, work, wanted: tl.int64, call: tl.int64, programs: tl.int32, BY_TICK: tl.constexpr):
    call = call.to(tl.int64)
    rows = tl.load(s.numbers + numbers.ROWS)
    capacity = tl.load(s.numbers + numbers.ROW_CAPACITY)
    wanted = tl.minimum(wanted.to(tl.int64), tl.load(s.numbers + numbers.EVICTABLE))
    if wanted > 0:
        if _select_from_list(s, w, work, rows, capacity, programs, wanted, call, BY_TICK) == 0:
            _select_from_bins(s, w, work, rows, capacity, programs, wanted, call, BY_TICK)
    last, _bad = is_last(w, programs)
    if last:
        if wanted <= 0:
            one = tl.arange(0, 1).to(tl.int64)
            tell_victims(w, call, one, one, one == 0)
        tl.store(work + CONTENT, 0)
        tl.store(w.counters + scratch.ARRIVED, 0)
        tl.store(w.counters + scratch.WAITING, 0)


_select = Kernel(select_kernel, ["*i64", "i64", "i64", "i32"], warps=16, cooperative=True)


def select(arrays: Arrays, wanted: int, by_tick: bool, call: int) -> None:
    """Find what to evict until `wanted` tokens are free, or all that can be.

    The rows are left in `scratch.victims[0]` in the order of eviction, in `scratch.tokens_before` how many tokens go
    before each, in the mail the tokens and the victims; the number of victims has the bit UNORDERED if ordering them is
    left to `order_victims`, as it is with more than about 200,000 or where most have nearly the same key. Nothing of
    the tree is changed. by_tick: the ticks are the keys, else `scratch.eviction_key`. Uses `scratch.partial` and
    `victims[1]`. Among a million nodes on an H200: 15 us in a row of evictions of up to 100 nodes, else 36 us, for 1 %
    of them too.
    """
    programs = resident(arrays, -(-arrays.rows // 1024), 1)
    _select(arrays, programs, (_bins(arrays), wanted, call, programs), (by_tick,))
