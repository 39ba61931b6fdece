"""Evict: find the nodes that go first, with no heap, and free them.

Unlocked nodes in the order (effective key, deeper end first), cut where the tokens suffice, are what a heap of leaves
gives. The effective key of a node is the greatest key in its subtree, so that nothing goes before what is below it;
under lru that is the tick as it is.

The cut is found by counting. A sample of the rows bounds what can be a victim. The nodes below the bound are counted
into bins, together with their tokens, so that of each bin it is known what goes before it; only the nodes of one bin
need to be compared with one another. One atomic addition costs 27 ps on an H200 if a million nodes make one each, as
long as three passes over the rows: hence the sample.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from flatradix import meta
from flatradix.kernels.gpu.children import bury
from flatradix.kernels.gpu.finish import is_last, publish, wait_for_all
from flatradix.kernels.gpu.launch import INTERPRETED, Bound, Kernel, current_stream, multi_processors
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
CROWD = tl.constexpr(8192)
# Victims are put in order in the launch unless that takes more comparisons than this, about 0.1 ms.
COMPARISONS = tl.constexpr(CROWD.value**2)
# Victims that a program ranks at once, and the nodes of their bins that they are compared with at once.
RANKED = tl.constexpr(128)
OTHERS = tl.constexpr(16)

# The scratch, int64: three sets of bins, used in turn, of which a launch leaves all at zero; what goes before each bin;
# the weights of the pivots, eight words apart so that additions to them do not wait for one another.
BEFORE = tl.constexpr(3 * BINS.value)
WEIGHTS = tl.constexpr(4 * BINS.value + 8)
SCRATCH = WEIGHTS.value + 8 * PIVOTS.value

# Places in `Workspace.partial`: the lowest and the highest key of each program's sample, the lowest of each block.
MOST = tl.constexpr(1024)
HIGHS = tl.constexpr(1024)
MINIMA = tl.constexpr(2048)
MINIMA_END = tl.constexpr(meta.PARTIALS)

# Victims that a program frees at once, slots that it copies at once, and the branching of its search for their owner.
FREED = tl.constexpr(64)
UNITS = tl.constexpr(1024)
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
def _those_before(s, keys, order, row, key, end, first, size):
    """(how many nodes of each lane's bin go before it, their tokens); the bin is `order[first:first + size]`."""
    nodes = tl.zeros([RANKED], tl.int32)
    tokens = tl.zeros([RANKED], tl.int64)
    done = tl.zeros([], tl.int64)
    most = tl.max(size)
    while done < most:
        j = done + tl.arange(0, OTHERS)[None, :]
        inside = j < size[:, None]
        other = tl.load(order + first[:, None] + j, mask=inside, other=0)
        other_key = tl.load(keys + other, mask=inside, other=HIGHEST)
        other_end = tl.load(s.end + other, mask=inside, other=0)
        length = tl.load(s.length + other, mask=inside, other=0).to(tl.int64)
        deeper = (other_end > end[:, None]) | ((other_end == end[:, None]) & (other < row[:, None]))
        earlier = inside & ((other_key < key[:, None]) | ((other_key == key[:, None]) & deeper))
        nodes += tl.sum(earlier.to(tl.int32), axis=1)
        tokens += tl.sum(tl.where(earlier, length, 0), axis=1)
        done += OTHERS
    return nodes, tokens


@triton.jit
def _rank(s, w, scratch, capacity, programs, wanted, call, low, shift, tie, cut, sort_from, BY_TICK: tl.constexpr):
    """Find each node's place among the victims, and the last victim, which tells the host how many there are.

    The nodes of the bins before `sort_from` are victims too, and are left as they stand.
    """
    keys = _keys(s, w, BY_TICK)
    order = w.victims + capacity
    found = tl.load(scratch + BEFORE + 1 + cut) >> 32
    start = tl.program_id(0).to(tl.int64) * RANKED
    while start < found:
        place = start + tl.arange(0, RANKED)
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
        rank, tokens = _those_before(s, keys, order, row, key, end, first, size)
        rank = tl.where(compared, first + rank, place)
        tokens += before & LOW32
        victim = there & ((bin < cut) | (tokens < wanted))
        tl.store(w.victims + rank, row, mask=victim)
        tl.store(w.undo + rank, tokens, mask=victim)
        last = compared & victim & (tokens + length >= wanted)
        _tell(w, call, tokens + length, rank + 1 + tl.where(sort_from > 0, LEFT_UNORDERED, 0), last)
        start += programs * RANKED


@triton.jit
def _tell(w, call, tokens, victims, active):
    tag = (call.to(tl.int64) & meta.CALL_MASK) << 32
    tl.store(w.mail + meta.MAIL_TOKENS + tl.zeros_like(tokens), tag | tokens, mask=active)
    tl.store(w.mail + meta.MAIL_VICTIMS + tl.zeros_like(tokens), tag | victims, mask=active)


@triton.jit
def _clear(words, count, programs):
    start = tl.program_id(0) * FAN
    while start < count:
        i = start + tl.arange(0, FAN)
        tl.store(words + i, tl.zeros([FAN], tl.int64), mask=i < count)
        start += programs * FAN


@triton.jit(do_not_specialize=["scratch", "wanted", "call", "programs"])
def select_kernel(s, w, scratch, wanted: tl.int64, call: tl.int64, programs: tl.int32, BY_TICK: tl.constexpr):
    call = call.to(tl.int64)
    rows = tl.load(s.meta + meta.ROWS)
    capacity = tl.load(s.meta + meta.ROW_CAPACITY)
    wanted = tl.minimum(wanted.to(tl.int64), tl.load(s.meta + meta.EVICTABLE))
    if wanted > 0:
        pivots = _sample(s, w, scratch, rows, programs, BY_TICK)
        wait_for_all(w, programs)
        low, high, bound = _bound(s, w, scratch, pivots, wanted, programs)
        shift = _width(low, tl.minimum(high, bound))
        tie = tl.zeros([], tl.int64) - 1
        reach = tie
        turn = tl.zeros([], tl.int32)
        cut = turn
        sort_from = turn
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
        wait_for_all(w, programs)
        _rank(s, w, scratch, capacity, programs, wanted, call, low, shift, tie, cut, sort_from, BY_TICK)
        _clear(scratch, 3 * BINS, programs)
        _clear(scratch + WEIGHTS, 8 * PIVOTS, programs)
    last, _bad = is_last(w, programs)
    if last:
        if wanted <= 0:
            one = tl.arange(0, 1).to(tl.int64)
            _tell(w, call, one, one, one == 0)
        tl.store(w.number + meta.ARRIVED, 0)
        tl.store(w.number + meta.WAITING, 0)


_select = Kernel(select_kernel, ["*i64", "i64", "i64", "i32"], warps=16, cooperative=True)


def select(bound: Bound, wanted: int, by_tick: bool, call: int) -> None:
    """Find what to evict until `wanted` tokens are free, or all that can be.

    The rows are left in `workspace.victims[0]` in the order of eviction, in `workspace.undo` how many tokens go before
    each, in the mail the tokens and the victims; the number of victims has the bit UNORDERED if ordering them is left
    to `order_victims`, as it is with more than about 300,000 or where most have nearly the same key. Nothing of the
    tree is changed. `by_tick`: the ticks are the keys, else `workspace.key`. Uses `workspace.partial` and `victims[1]`.
    """
    rows = bound.state.parent.shape[0]
    programs = 1 if INTERPRETED else min(multi_processors(bound.device), MOST.value, -(-rows // 1024))
    _select(bound, programs, (_scratch(bound), wanted, call, programs), (by_tick,))


def order_victims(bound: Bound, count: int, by_tick: bool) -> None:
    """Put the first `count` rows of `workspace.victims[0]`, which `select` left UNORDERED, in the order of eviction."""
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

    scores: int64, one a row, those of free rows arbitrary. Two sorts, about 0.4 ms for a million rows on an H200. Nodes
    that are equal in both lie on one path, where their order decides nothing: the highest goes up from the deepest.
    """
    rows = scores.shape[0]
    order = torch.argsort(bound.state.tick[:rows], stable=True)
    order = order[torch.argsort(scores[order], stable=True)]
    bound.workspace.key[:rows].scatter_(0, order, torch.arange(rows, device=scores.device))
    _climb(bound, -(-rows // CLIMBERS.value), (rows,))


def scores_of(bound: Bound, policy: int) -> torch.Tensor:
    """What the built-in policies but lru order by, before the tick; one a row."""
    state = bound.state
    if policy == meta.LFU:
        return state.hit_count.long()
    if policy == meta.SLRU:
        return (state.hit_count >= state.meta[meta.THRESHOLD]).long()
    if policy == meta.FIFO:
        return state.created
    if policy == meta.FILO:
        return -state.created
    if policy == meta.PRIORITY:
        return state.priority
    raise ValueError(f"policy {policy} has no scores of its own")


@triton.jit
def _together(parent):
    """(how many lanes have this parent, whether this lane is the first of them)."""
    lane = tl.arange(0, FREED)
    equal = parent[:, None] == parent[None, :]
    count = tl.sum(equal.to(tl.int32), axis=1)
    return count, tl.min(tl.where(equal, lane[None, :], FREED), axis=1) == lane


@triton.jit
def _detach(s, parent):
    """Take children from parents, or from namespaces, which may be empty then; FREE where a lane has none.

    Siblings are taken together: one addition each to one count would be 27 us for 10,000 of them on an H200.
    """
    count, is_first = _together(parent)
    below_row = is_first & (parent >= 0)
    tl.atomic_add(s.children + tl.where(below_row, parent, 0), -count, mask=below_row, sem="relaxed")
    top = is_first & (parent < 0) & (parent != FREE)
    namespace = tl.where(top, ~parent, 0)
    before = tl.atomic_add(s.namespace_children + namespace, -count, mask=top, sem="relaxed")
    empty = top & (before == count) & (namespace > 0)
    counter = s.meta + meta.RELEASED + tl.zeros([FREED], tl.int32)
    place = tl.atomic_add(counter, 1, mask=empty, sem="relaxed")
    tl.store(s.released + place, namespace, mask=empty)


@triton.jit
def _free_rows(s, w, victim, count):
    """Free the rows of victims, one a lane. Of a row only its own lane reads or writes the parent."""
    active = victim < count
    row = tl.load(w.victims + victim, mask=active, other=0).to(tl.int64)
    parent = tl.load(s.parent + row, mask=active, other=FREE)
    generation = tl.load(s.generation + row, mask=active, other=0)
    stack = s.free_rows + tl.load(s.meta + meta.FREE_ROWS)
    tl.debug_barrier()  # every thread has what is about to be overwritten
    tl.store(s.parent + row, tl.zeros([FREED], tl.int32) + FREE, mask=active)
    tl.store(s.generation + row, generation + 1, mask=active)
    tl.store(stack + victim, row.to(tl.int32), mask=active)
    bury(s, w, row, active)
    _detach(s, parent)


@triton.jit
def _owner(w, unit, count):
    """The last of `count` victims before which no more than `unit` tokens go; scalar."""
    low = tl.zeros([], tl.int64)
    high = count
    while high - low > 1:
        step = (high - low + FAN - 1) // FAN
        place = low + tl.arange(0, FAN).to(tl.int64) * step
        before = tl.load(w.undo + place, mask=place < high, other=HIGHEST)
        low += (tl.sum((before <= unit).to(tl.int64)) - 1) * step
        high = tl.minimum(low + step, high)
    return low


@triton.jit
def _copy_slots(s, w, pool, slots, first, count, tokens):
    """Copy UNITS slots from the `first` on, each from the edge that it is on."""
    unit = first + tl.arange(0, UNITS)
    inside = unit < tokens
    owner = _owner(w, first, count)
    page = tl.load(s.meta + meta.PAGE)
    span = tl.minimum(count - owner, (UNITS + page - 2) // page + 1)
    victim = tl.zeros([UNITS], tl.int64) + owner
    while span > 1:
        half = span >> 1
        before = tl.load(w.undo + victim + half)
        victim = tl.where(before <= unit, victim + half, victim)
        span -= half
    row = tl.load(w.victims + victim)
    start = tl.load(s.start + row).to(tl.int64)
    slot = tl.load(pool + start + unit - tl.load(w.undo + victim), mask=inside, other=0)
    tl.store(slots + unit, slot.to(tl.int64), mask=inside)


@triton.jit
def _book(s, w, call, count, tokens):
    """Set the tree's numbers, by the last program; tell how many namespaces were released."""
    released = tl.load(s.meta + meta.RELEASED)
    free = tl.load(s.meta + meta.FREE_ROWS)
    nodes = tl.load(s.meta + meta.NODES)
    evictable = tl.load(s.meta + meta.EVICTABLE)
    tl.debug_barrier()
    tl.store(w.mail + meta.MAIL_RELEASED, ((call & meta.CALL_MASK) << 32) | released)
    tl.store(s.meta + meta.RELEASED, 0)
    tl.store(s.meta + meta.FREE_ROWS, free + count)
    tl.store(s.meta + meta.NODES, nodes - count)
    tl.store(s.meta + meta.EVICTABLE, evictable - tokens)


@triton.jit(do_not_specialize=["pool", "slots", "count", "tokens", "call", "programs"])
def free_kernel(s, w, pool, slots, count: tl.int64, tokens: tl.int64, call: tl.int64, programs: tl.int32):
    count = count.to(tl.int64)
    tokens = tokens.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * FREED
    while first < count:
        _free_rows(s, w, first + tl.arange(0, FREED), count)
        first += programs * FREED
    first = tl.program_id(0).to(tl.int64) * UNITS
    while first < tokens:
        _copy_slots(s, w, pool, slots, first, count, tokens)
        first += programs * UNITS
    last, _bad = is_last(w, programs)
    if last:
        _book(s, w, call.to(tl.int64), count, tokens)
        publish(s, w, call.to(tl.int64), meta.NO_ERROR, meta.EVICT)


_free = Kernel(free_kernel, ["*w", "*i64", "i64", "i64", "i64", "i32"])


def free(bound: Bound, count: int, tokens: int, call: int, pool: int, pool_wide: bool, slots: int) -> None:
    """Free the `count` victims of `select`, `tokens` long together, and gather their slots in the order of eviction.

    `pool`: the address of the slots, int64 if `pool_wide`; `slots`: where they go, int64 [tokens]. The rows freed are
    the last of `free_rows`, in order; their `start` and `length` stay readable. The mail tells how many namespaces lost
    their last node: they are the first in `state.released`, in no particular order, until the next eviction.
    """
    wanted = max(-(-count // FREED.value), -(-tokens // UNITS.value), 1)
    programs = min(wanted, 4 * multi_processors(bound.device))
    _free(bound, programs, (pool, slots, count, tokens, call, programs), (), (pool_wide,))
