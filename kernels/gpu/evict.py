"""Evict: find the nodes that go first, with no heap; `free` then frees them.

Unlocked nodes in the order (effective key, deeper end first), cut where the tokens suffice, are what a heap of leaves
gives. The effective key of a node is the greatest key in its subtree, so that nothing goes before what is below it;
under lru that is the tick as it is.

The cut is found by counting. A sample of the rows bounds what can be a victim. The nodes below the bound are counted
into bins, together with their tokens, so that of each bin it is known what goes before it; only the nodes of one bin
need to be compared with one another. One atomic addition costs 27 ps on an H200 if a million nodes make one each, as
long as three passes over the rows: hence the sample.

Such a count also tells up to which key there are some more nodes than were evicted. The next evictions, if they are
small, list what is not above that key and compare all of it: one pass over the rows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from flatradix import meta
from flatradix.kernels.gpu.finish import is_last, wait_for_all
from flatradix.kernels.gpu.launch import Bound, Kernel, current_stream, resident
from flatradix.kernels.gpu.rows import FREE
from flatradix.layout import MAX_UNITS

# In the number of victims in the mail: they are the right ones, but `order_victims` has to put them in order.
UNORDERED = 1 << 30

LOW32 = tl.constexpr(0xFFFFFFFF)
DEEPEST = tl.constexpr(MAX_UNITS)
# Above every key; ticks grow by two with each query.
HIGHEST = tl.constexpr((1 << 62) - 1)
LEFT_UNORDERED = tl.constexpr(UNORDERED)

# Rows that a program handles at once: 8 a thread of 16 warps.
BLOCK = tl.constexpr(4096)
# Rows of the sample that are each program's, taken in runs of 16, which fill the memory sectors that they touch.
SAMPLE = tl.constexpr(512)
RUN = tl.constexpr(16)
# The bound is one of so many keys, each the lowest of 8 neighbouring rows: low ones, as most evictions are small.
PIVOTS = tl.constexpr(32)
NEIGHBOURS = tl.constexpr(8)
BINS = tl.constexpr(2048)
# A bin in which the cut falls is divided once more if it has more nodes than this.
CROWD = tl.constexpr(2048)
# Victims are put in order in the launch unless that takes more comparisons than this, 0.2 ms; sorting takes 0.6 ms.
COMPARISONS = tl.constexpr(33554432)
# Nodes that a program ranks at once, and nodes of their bins that it compares them with at once; the other way round
# where bins have more than CROWDED nodes, since a step takes 1 us however many are compared.
RANKED = tl.constexpr(128)
OTHERS = tl.constexpr(16)
CROWDED = tl.constexpr(512)
FEW_RANKED = tl.constexpr(8)
MANY_OTHERS = tl.constexpr(256)
# A list of nodes that are all compared: how many it may hold, and how many more than are evicted it should.
LIST = tl.constexpr(2048)
SPARE = tl.constexpr(256)

# The scratch, int64: three sets of bins, used in turn; what goes before each bin; the weights of the pivots, eight
# words apart so that additions to them do not wait for one another; what the list holds. A launch leaves all but the
# second at zero.
BEFORE = tl.constexpr(3 * BINS.value)
WEIGHTS = tl.constexpr(4 * BINS.value + 8)
CONTENT = tl.constexpr(WEIGHTS.value + 8 * PIVOTS.value)
SCRATCH = CONTENT.value + 1

# Places in `Workspace.number` that outlive a call, as a guess for the next: a key, the tokens of the nodes not above
# it, and those evicted since.
HINT = tl.constexpr(meta.HINT)
PROMISE = tl.constexpr(meta.HINT + 1)
SPENT = tl.constexpr(meta.HINT + 2)

# Places in `Workspace.partial`: the lowest and the highest key of each program's sample, the lowest of each block.
MOST = tl.constexpr(1024)
HIGHS = tl.constexpr(1024)
MINIMA = tl.constexpr(2048)
MINIMA_END = tl.constexpr(meta.PARTIALS)

# The branching of searches.
FAN = tl.constexpr(256)
CLIMBERS = tl.constexpr(256)


@functools.cache
def _scratch_of(device: int, stream: int) -> torch.Tensor:
    """Launches on one stream follow one another, so that they can share it whatever trees they are for."""
    return torch.zeros(SCRATCH, dtype=torch.int64, device="cpu" if device < 0 else f"cuda:{device}")


def _scratch(bound: Bound) -> int:
    stream = 0 if bound.device < 0 else current_stream(bound.device)
    return _scratch_of(bound.device, stream).data_ptr()


@triton.jit
def _keys(s, w, BY_TICK: tl.constexpr):
    if BY_TICK:
        return s.tick
    else:
        return w.key


@triton.jit
def _evictable(s, row, there):
    parent = tl.load(s.parent + row, mask=there, other=FREE)
    locks = tl.load(s.lock_ref + row, mask=there, other=1)
    return (parent != FREE) & (locks == 0) & (row > 0)


@triton.jit
def _block(s, w, base, capacity, BY_TICK: tl.constexpr):
    """(rows, their keys, which can be evicted) of the block at `base`.

    Rows that were never in use are read too, as free ones: a mask would make sixteen loads of four.
    """
    row = base + tl.arange(0, BLOCK)
    keys = _keys(s, w, BY_TICK) + row
    if base + BLOCK <= capacity:
        parent = tl.load(s.parent + row)
        locks = tl.load(s.lock_ref + row)
        key = tl.load(keys)
    else:
        parent = tl.load(s.parent + row, mask=row < capacity, other=FREE)
        locks = tl.load(s.lock_ref + row, mask=row < capacity, other=1)
        key = tl.load(keys, mask=row < capacity, other=0)
    return row, key, (parent != FREE) & (locks == 0) & (row > 0)


@triton.jit
def _value(s, row, key, tie, there):
    """What is divided into bins: the key; where more nodes than a crowd have the same, `tie`, their ends from below."""
    value = key
    if tie >= 0:
        end = tl.load(s.end + row, mask=there & (key == tie), other=0).to(tl.int64)
        value = tl.where(key < tie, -1, tl.where(key == tie, DEEPEST - end, HIGHEST))
    return value


@triton.jit
def _bin(value, low, shift):
    """Bin 0 holds all below `low`, the last one all above the others."""
    return tl.where(value < low, 0, tl.minimum((tl.maximum(value - low, 0) >> shift) + 1, BINS - 1))


@triton.jit
def _width(low, high):
    """The bits of a bin's width, so that [low, high] needs none but the bins in between."""
    shift = tl.zeros([], tl.int64)
    while ((high - low) >> shift) > BINS - 3:
        shift += 1
    return shift


@triton.jit
def _pivots(s, w, rows, BY_TICK: tl.constexpr):
    """Keys from all over the rows, the last one above all."""
    pivot = tl.arange(0, PIVOTS)
    middle = ((2 * pivot + 1).to(tl.int64) * rows // (2 * PIVOTS)).to(tl.int32)
    row = (middle - middle % NEIGHBOURS)[:, None] + tl.arange(0, NEIGHBOURS)[None, :]
    there = (row < rows) & (pivot < PIVOTS - 1)[:, None]
    key = tl.load(_keys(s, w, BY_TICK) + row, mask=there, other=0)
    return tl.min(tl.where(_evictable(s, row, there), key, HIGHEST), axis=1)


@triton.jit
def _sample(s, w, scratch, rows, programs, BY_TICK: tl.constexpr):
    """Add up, for each pivot, what this program's part of the sample has at or below it; returns the pivots."""
    lane = tl.arange(0, SAMPLE)
    runs = (rows + RUN - 1) // RUN
    taken = programs.to(tl.int64) * (SAMPLE // RUN)
    run = tl.program_id(0).to(tl.int64) * (SAMPLE // RUN) + lane // RUN
    run = tl.where(runs > taken, run * runs // taken, run)
    row = (run * RUN + lane % RUN).to(tl.int32)
    there = row < rows
    evictable = _evictable(s, row, there)
    key = tl.load(_keys(s, w, BY_TICK) + row, mask=there, other=0)
    length = tl.load(s.length + row, mask=there, other=0).to(tl.int64)
    weight = tl.where(evictable, length | (1 << 32), 0)
    pivots = _pivots(s, w, rows, BY_TICK)
    weights = tl.sum(tl.where(key[:, None] <= pivots[None, :], weight[:, None], 0), axis=0)
    tl.atomic_add(scratch + WEIGHTS + 8 * tl.arange(0, PIVOTS), weights, sem="relaxed")
    tl.store(w.partial + tl.program_id(0), tl.min(tl.where(evictable, key, HIGHEST)))
    tl.store(w.partial + HIGHS + tl.program_id(0), tl.max(tl.where(evictable, key, 0)))
    return pivots


@triton.jit
def _bound(s, w, scratch, pivots, wanted, programs):
    """(lowest and highest key of the sample, a bound that the victims' keys most likely do not exceed)."""
    weights = tl.load(scratch + WEIGHTS + 8 * tl.arange(0, PIVOTS))
    tokens = weights & LOW32
    total = tl.max(tokens)
    nodes = tl.maximum(tl.max(weights >> 32), 1)
    # A quarter more than the share that is wanted, and 16 nodes: few rows of a sample say little of the whole.
    share = wanted * total // tl.load(s.meta + meta.EVICTABLE)
    enough = tokens >= tl.minimum(share + share // 4 + 16 * total // nodes, total)
    bound = tl.min(tl.where(enough, pivots, HIGHEST))
    program = tl.arange(0, MOST)
    low = tl.min(tl.load(w.partial + program, mask=program < programs, other=HIGHEST))
    high = tl.max(tl.load(w.partial + HIGHS + program, mask=program < programs, other=0))
    low = tl.minimum(low, bound)
    return low, tl.maximum(low, high), bound


@triton.jit
def _count(s, w, bins, rows, capacity, programs, low, shift, bound, tie, BY_TICK: tl.constexpr):
    """Count the nodes not above the bound into the bins, (nodes << 32 | tokens); notes each block's lowest key."""
    block = tl.program_id(0)
    while block * BLOCK < rows:
        row, key, evictable = _block(s, w, block * BLOCK, capacity, BY_TICK)
        lowest = tl.min(tl.where(evictable, key, HIGHEST))
        tl.store(w.partial + MINIMA + block, lowest, mask=MINIMA + block < MINIMA_END)
        if lowest <= tl.where(tie >= 0, tie, bound):
            value = _value(s, row, key, tie, evictable)
            counted = evictable & (value <= bound)
            length = tl.load(s.length + row, mask=counted, other=0).to(tl.int64)
            tl.atomic_add(bins + _bin(value, low, shift), length | (1 << 32), mask=counted, sem="relaxed")
        block += programs


@triton.jit
def _find_cut(scratch, bins, wanted):
    """(the bin in which the cut falls, its nodes, the comparisons that order the victims, tokens in all bins).

    Each program writes down what goes before each bin, all the same.
    """
    i = tl.arange(0, BINS)
    inside = tl.load(bins + i)
    through = tl.cumsum(inside)
    tl.store(scratch + BEFORE + 1 + i, through)
    cut = tl.minimum(tl.sum(((through & LOW32) < wanted).to(tl.int32)), BINS - 1)
    nodes = inside >> 32
    size = tl.sum(tl.where(i == cut, nodes, 0))
    comparisons = tl.sum(tl.where(i <= cut, nodes * nodes, 0))
    tl.debug_barrier()  # other threads read what this one wrote down
    return cut, size, comparisons, tl.max(through) & LOW32


@triton.jit
def _edges(cut, low, shift, bound):
    """The lowest and the highest value that bin `cut` can have."""
    inner = (cut - 1).to(tl.int64)
    lowest = tl.where(cut == 0, 0, low + (inner << shift))
    highest = tl.where(cut == 0, low - 1, low + ((inner + 1) << shift) - 1)
    return lowest, tl.minimum(tl.where(cut == BINS - 1, bound, highest), bound)


@triton.jit
def _scatter(
    s, w, scratch, counts, rows, capacity, programs, low, shift, bound, tie, reach, cut, BY_TICK: tl.constexpr
):
    """Write the rows of the bins up to the cut's to `victims[1]`, bin after bin, in any order within each.

    `reach`: the highest key among them. Blocks without any are passed over.
    """
    block = tl.program_id(0)
    while block * BLOCK < rows:
        if tl.load(w.partial + MINIMA + block, mask=MINIMA + block < MINIMA_END, other=0) <= reach:
            row, key, evictable = _block(s, w, block * BLOCK, capacity, BY_TICK)
            value = _value(s, row, key, tie, evictable)
            bin = _bin(value, low, shift)
            taken = evictable & (value <= bound) & (bin <= cut)
            first = tl.load(scratch + BEFORE + bin, mask=taken, other=0) >> 32
            place = first + tl.atomic_add(counts + bin, 1, mask=taken, sem="relaxed")
            tl.store(w.victims + capacity + place, row, mask=taken)
        block += programs


@triton.jit
def _those_before(s, keys, order, row, key, end, first, size, AT_ONCE: tl.constexpr):
    """(how many nodes of each lane's bin go before it, their tokens); the bin is `order[first:first + size]`."""
    nodes = tl.zeros_like(row)
    tokens = tl.zeros_like(first)
    done = tl.zeros([], tl.int64)
    most = tl.max(size)
    while done < most:
        j = done + tl.arange(0, AT_ONCE)[None, :]
        inside = j < size[:, None]
        other = tl.load(order + first[:, None] + j, mask=inside, other=0)
        other_key = tl.load(keys + other, mask=inside, other=HIGHEST)
        other_end = tl.load(s.end + other, mask=inside, other=0)
        length = tl.load(s.length + other, mask=inside, other=0).to(tl.int64)
        deeper = (other_end > end[:, None]) | ((other_end == end[:, None]) & (other < row[:, None]))
        earlier = inside & ((other_key < key[:, None]) | ((other_key == key[:, None]) & deeper))
        nodes += tl.sum(earlier.to(tl.int32), axis=1)
        tokens += tl.sum(tl.where(earlier, length, 0), axis=1)
        done += AT_ONCE
    return nodes, tokens


@triton.jit
def _tell(w, call, tokens, victims, active):
    tag = (call & meta.CALL_MASK) << 32
    tl.store(w.mail + meta.MAIL_TOKENS + tl.zeros_like(tokens), tag | tokens, mask=active)
    tl.store(w.mail + meta.MAIL_VICTIMS + tl.zeros_like(tokens), tag | victims, mask=active)
    tl.store(w.number + SPENT + tl.zeros_like(tokens), tokens, mask=active & (tokens > 0))


@triton.jit
def _rank_list(s, w, capacity, programs, found, wanted, call, BY_TICK: tl.constexpr):
    """Find the place of each of the `found` nodes of the list; the last victim tells the host how many there are."""
    keys = _keys(s, w, BY_TICK)
    order = w.victims + capacity
    start = tl.program_id(0) * FEW_RANKED
    while start < found:
        place = start + tl.arange(0, FEW_RANKED)
        there = place < found
        row = tl.load(order + place, mask=there, other=0)
        key = tl.load(keys + row, mask=there, other=0)
        end = tl.load(s.end + row, mask=there, other=0)
        length = tl.load(s.length + row, mask=there, other=0).to(tl.int64)
        size = tl.where(there, found, 0)
        rank, tokens = _those_before(s, keys, order, row, key, end, tl.zeros_like(key), size, MANY_OTHERS)
        victim = there & (tokens < wanted)
        tl.store(w.victims + rank, row, mask=victim)
        tl.store(w.undo + rank, tokens, mask=victim)
        _tell(w, call, tokens + length, rank + 1, victim & (tokens + length >= wanted))
        start += programs * FEW_RANKED


@triton.jit
def _rank(
    s, w, scratch, capacity, programs, found, wanted, call, low, shift, tie, cut, sort_from,
    LANES: tl.constexpr, AT_ONCE: tl.constexpr, BY_TICK: tl.constexpr,
):  # fmt: skip
    """The same for the nodes of the bins up to the cut's, each compared with those of its bin.

    The nodes of the bins before `sort_from` are victims too, and are left as they stand.
    """
    keys = _keys(s, w, BY_TICK)
    order = w.victims + capacity
    start = tl.program_id(0).to(tl.int64) * LANES
    while start < found:
        place = start + tl.arange(0, LANES)
        there = place < found
        row = tl.load(order + place, mask=there, other=0)
        key = tl.load(keys + row, mask=there, other=0)
        end = tl.load(s.end + row, mask=there, other=0)
        length = tl.load(s.length + row, mask=there, other=0).to(tl.int64)
        bin = _bin(_value(s, row, key, tie, there), low, shift)
        before = tl.load(scratch + BEFORE + bin, mask=there, other=0)
        through = tl.load(scratch + BEFORE + 1 + bin, mask=there, other=0)
        compared = there & (bin >= sort_from)
        first = before >> 32
        size = tl.where(compared, (through >> 32) - first, 0)
        rank, tokens = _those_before(s, keys, order, row, key, end, first, size, AT_ONCE)
        rank = tl.where(compared, first + rank, place)
        tokens += before & LOW32
        victim = there & ((bin < cut) | (tokens < wanted))
        tl.store(w.victims + rank, row, mask=victim)
        tl.store(w.undo + rank, tokens, mask=victim)
        last = compared & victim & (tokens + length >= wanted)
        _tell(w, call, tokens + length, rank + 1 + tl.where(sort_from > 0, LEFT_UNORDERED, 0), last)
        start += programs * LANES


@triton.jit
def _leave_hint(w, scratch, low, shift, bound, tie, cut):
    """Look for a key up to which there are SPARE nodes more than up to the cut, and not too many in the cut's bin."""
    i = tl.arange(0, BINS)
    through = tl.load(scratch + BEFORE + 1 + i)
    bin = tl.sum((through <= tl.load(scratch + BEFORE + 1 + cut) + (SPARE << 32)).to(tl.int32)) - 1
    _lowest, highest = _edges(bin, low, shift, bound)
    content = tl.max(tl.where(i <= bin, through, 0))
    left = (content >> 32) - (tl.load(scratch + BEFORE + cut) >> 32)
    tl.store(w.number + HINT, highest)
    tl.store(w.number + PROMISE, tl.where((tie < 0) & (left <= LIST), content & LOW32, 0))


@triton.jit
def _clear(words, count, programs):
    start = tl.program_id(0) * FAN
    while start < count:
        i = start + tl.arange(0, FAN)
        tl.store(words + i, tl.zeros([FAN], tl.int64), mask=i < count)
        start += programs * FAN


@triton.jit
def _collect(s, w, content, rows, capacity, programs, bound, BY_TICK: tl.constexpr):
    """List the rows not above the bound in `victims[1]`, in any order, and count them, (nodes << 32 | tokens)."""
    block = tl.program_id(0)
    while block * BLOCK < rows:
        row, key, evictable = _block(s, w, block * BLOCK, capacity, BY_TICK)
        taken = evictable & (key <= bound)
        nodes = tl.sum(taken.to(tl.int32))
        if nodes > 0:
            tokens = tl.sum(tl.load(s.length + row, mask=taken, other=0).to(tl.int64))
            before = tl.atomic_add(content, (nodes.to(tl.int64) << 32) | tokens, sem="relaxed") >> 32
            place = before + tl.cumsum(taken.to(tl.int32)) - 1
            tl.store(w.victims + capacity + place, row, mask=taken & (place < LIST))
        block += programs


@triton.jit
def _select_from_list(s, w, scratch, rows, capacity, programs, wanted, call, BY_TICK: tl.constexpr):
    """Try the hint of the last call; returns whether it was good."""
    good = tl.zeros([], tl.int32)
    hint = tl.load(w.number + HINT)
    if wanted <= tl.load(w.number + PROMISE) - tl.load(w.number + SPENT):
        _collect(s, w, scratch + CONTENT, rows, capacity, programs, hint, BY_TICK)
        wait_for_all(w, programs)
        content = tl.load(scratch + CONTENT)
        if ((content >> 32) <= LIST) & ((content & LOW32) >= wanted):
            _rank_list(s, w, capacity, programs, content >> 32, wanted, call, BY_TICK)
            tl.store(w.number + PROMISE, content & LOW32)
            good += 1
    return good


@triton.jit
def _select_from_bins(s, w, scratch, rows, capacity, programs, wanted, call, BY_TICK: tl.constexpr):
    pivots = _sample(s, w, scratch, rows, programs, BY_TICK)
    wait_for_all(w, programs)
    low, high, bound = _bound(s, w, scratch, pivots, wanted, programs)
    shift = _width(low, tl.minimum(high, bound))
    tie = tl.zeros([], tl.int64) - 1
    reach = tie
    turn = tl.zeros([], tl.int32)
    cut = turn
    sort_from = turn
    comparisons = reach
    searching = turn == 0
    while searching:
        bins = scratch + turn % 3 * BINS
        if turn > 1:
            _clear(scratch + (turn + 1) % 3 * BINS, BINS, programs)
        _count(s, w, bins, rows, capacity, programs, low, shift, bound, tie, BY_TICK)
        wait_for_all(w, programs)
        cut, size, comparisons, total = _find_cut(scratch, bins, wanted)
        lowest, highest = _edges(cut, low, shift, bound)
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
            shift = _width(low, tl.where(widen, tl.maximum(high, low), bound))
            turn += 1
    counts = scratch + (turn + 1) % 3 * BINS
    _scatter(s, w, scratch, counts, rows, capacity, programs, low, shift, bound, tie, reach, cut, BY_TICK)
    if tl.program_id(0) == programs - 1:
        _leave_hint(w, scratch, low, shift, bound, tie, cut)
    wait_for_all(w, programs)
    found = tl.load(scratch + BEFORE + 1 + cut) >> 32
    if (comparisons > CROWDED * found) & (sort_from == 0):
        _rank(
            s, w, scratch, capacity, programs, found, wanted, call, low, shift, tie, cut, sort_from,
            FEW_RANKED, MANY_OTHERS, BY_TICK,
        )  # fmt: skip
    else:
        _rank(
            s, w, scratch, capacity, programs, found, wanted, call, low, shift, tie, cut, sort_from,
            RANKED, OTHERS, BY_TICK,
        )  # fmt: skip
    _clear(scratch, 3 * BINS, programs)
    _clear(scratch + WEIGHTS, 8 * PIVOTS, programs)


@triton.jit(do_not_specialize=["scratch", "wanted", "call", "programs"])
def select_kernel(s, w, scratch, wanted: tl.int64, call: tl.int64, programs: tl.int32, BY_TICK: tl.constexpr):
    call = call.to(tl.int64)
    rows = tl.load(s.meta + meta.ROWS)
    capacity = tl.load(s.meta + meta.ROW_CAPACITY)
    wanted = tl.minimum(wanted.to(tl.int64), tl.load(s.meta + meta.EVICTABLE))
    if wanted > 0:
        if _select_from_list(s, w, scratch, rows, capacity, programs, wanted, call, BY_TICK) == 0:
            _select_from_bins(s, w, scratch, rows, capacity, programs, wanted, call, BY_TICK)
    last, _bad = is_last(w, programs)
    if last:
        if wanted <= 0:
            one = tl.arange(0, 1).to(tl.int64)
            _tell(w, call, one, one, one == 0)
        tl.store(scratch + CONTENT, 0)
        tl.store(w.number + meta.ARRIVED, 0)
        tl.store(w.number + meta.WAITING, 0)


_select = Kernel(select_kernel, ["*i64", "i64", "i64", "i32"], warps=16, cooperative=True)


def select(bound: Bound, wanted: int, by_tick: bool, call: int) -> None:
    """Find what to evict until `wanted` tokens are free, or all that can be.

    The rows are left in `workspace.victims[0]` in the order of eviction, in `workspace.undo` how many tokens go before
    each, in the mail the tokens and the victims; the number of victims has the bit UNORDERED if ordering them is left
    to `order_victims`, as it is with more than about 200,000 or where most have nearly the same key. Nothing of the
    tree is changed. `by_tick`: the ticks are the keys, else `workspace.key`. Uses `workspace.partial` and `victims[1]`.
    Among a million nodes on an H200: 15 us in a row of evictions of up to 100 nodes, else 36 us, for 1 % of them too.
    """
    rows = bound.state.parent.shape[0]
    programs = resident(bound, -(-rows // 1024), 1)
    _select(bound, programs, (_scratch(bound), wanted, call, programs), (by_tick,))


def order_victims(bound: Bound, count: int, by_tick: bool) -> None:
    """Put the `count` victims of `select` in the order of eviction, where it left them UNORDERED."""
    state, workspace = bound.state, bound.workspace
    rows = workspace.victims[0, :count].long()
    rows = rows[torch.argsort(state.end[rows], descending=True, stable=True)]
    rows = rows[torch.argsort((state.tick if by_tick else workspace.key)[rows], stable=True)]
    lengths = state.length[rows].long()
    workspace.victims[0, :count] = rows
    workspace.undo[:count] = lengths.cumsum(0) - lengths


@triton.jit(do_not_specialize=["rows"])
def climb_kernel(s, w, rows: tl.int32):
    """Raise the keys of all above each row to its own. Whoever raised a key further goes on from there."""
    row = tl.program_id(0) * CLIMBERS + tl.arange(0, CLIMBERS)
    climbs = _evictable(s, row, row < rows)
    key = tl.load(w.key + row, mask=climbs, other=0)
    above = tl.load(s.parent + row, mask=climbs, other=-1)
    climbs = climbs & (above >= 0)
    while tl.max(climbs.to(tl.int32)) > 0:
        locks = tl.load(s.lock_ref + above, mask=climbs, other=1)
        known = tl.load(w.key + above, mask=climbs, other=0)
        parent = tl.load(s.parent + above, mask=climbs, other=-1)
        climbs = climbs & (locks == 0) & (known < key)
        before = tl.atomic_max(w.key + above, key, mask=climbs, sem="relaxed")
        climbs = climbs & (before < key) & (parent >= 0)
        above = tl.where(climbs, parent, 0)


_climb = Kernel(climb_kernel, ["i32"])


def effective_keys(bound: Bound, scores: torch.Tensor) -> None:
    """Fill `workspace.key`: by rank in the order (score, tick), the highest of each subtree.

    scores: int64, one a row, those of free rows arbitrary. 0.9 ms for a million rows on an H200, nearly all of it for
    two sorts. Nodes that are equal in both lie on one path, where their order decides nothing.
    """
    rows = scores.shape[0]
    order = torch.argsort(bound.state.tick[:rows], stable=True)
    order = order[torch.argsort(scores[order], stable=True)]
    bound.workspace.key[:rows].scatter_(0, order, torch.arange(rows, device=scores.device))
    _climb(bound, -(-rows // CLIMBERS.value), (rows,))
