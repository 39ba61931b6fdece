"""Counting rows into bins by their keys, to find the bin in which the cut of an eviction falls.

A sample of the rows bounds what can be a victim. The nodes below the bound are counted into bins, together with their
tokens, so that of each bin it is known what goes before it; only the nodes of one bin need to be compared with one
another. One atomic addition costs 27 ps on an H200 if a million nodes make one each, as long as three passes over the
rows: hence the sample.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.evict_keys import BLOCK, HIGHEST, evictable_block, is_evictable, keys_of
from flatradix.layout import numbers, scratch

DEEPEST = tl.constexpr(numbers.MAX_UNITS)
LOW32 = tl.constexpr(0xFFFFFFFF)
# Rows of the sample that are each program's, taken in runs of 16, which fill the memory sectors that they touch.
SAMPLE = tl.constexpr(512)
RUN = tl.constexpr(16)
# The bound is one of so many keys, each the lowest of 8 neighbouring rows: low ones, as most evictions are small.
PIVOTS = tl.constexpr(32)
NEIGHBOURS = tl.constexpr(8)
BINS = tl.constexpr(2048)

# The work, int64: three sets of bins, used in turn; what goes before each bin; the weights of the pivots, eight
# words apart so that additions to them do not wait for one another; what the list holds. A launch leaves all but the
# second at zero.
BEFORE = tl.constexpr(3 * BINS.value)
WEIGHTS = tl.constexpr(4 * BINS.value + 8)
CONTENT = tl.constexpr(WEIGHTS.value + 8 * PIVOTS.value)
SCRATCH = CONTENT.value + 1

# Places in `Scratch.partial`: the lowest and the highest key of each program's sample, the lowest of each block.
MOST = tl.constexpr(1024)
HIGHS = tl.constexpr(1024)
MINIMA = tl.constexpr(2048)
MINIMA_END = tl.constexpr(scratch.PARTIALS)


@triton.jit
def value_of(s, row, key, tie, there):
    """What is divided into bins: the key; where more nodes than a crowd have the same, `tie`, their ends from below."""
    value = key
    if tie >= 0:
        end = tl.load(s.end + row, mask=there & (key == tie), other=0).to(tl.int64)
        value = tl.where(key < tie, -1, tl.where(key == tie, DEEPEST - end, HIGHEST))
    return value


@triton.jit
def bin_of(value, low, shift):
    """Bin 0 holds all below `low`, the last one all above the others."""
    return tl.where(value < low, 0, tl.minimum((tl.maximum(value - low, 0) >> shift) + 1, BINS - 1))


@triton.jit
def width_for(low, high):
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
    key = tl.load(keys_of(s, w, BY_TICK) + row, mask=there, other=0)
    return tl.min(tl.where(is_evictable(s, row, there), key, HIGHEST), axis=1)


@triton.jit
def sample(s, w, work, rows, programs, BY_TICK: tl.constexpr):
    """Add up, for each pivot, what this program's part of the sample has at or below it; returns the pivots."""
    lane = tl.arange(0, SAMPLE)
    runs = (rows + RUN - 1) // RUN
    taken = programs.to(tl.int64) * (SAMPLE // RUN)
    run = tl.program_id(0).to(tl.int64) * (SAMPLE // RUN) + lane // RUN
    run = tl.where(runs > taken, run * runs // taken, run)
    row = (run * RUN + lane % RUN).to(tl.int32)
    there = row < rows
    evictable = is_evictable(s, row, there)
    key = tl.load(keys_of(s, w, BY_TICK) + row, mask=there, other=0)
    length = tl.load(s.length + row, mask=there, other=0).to(tl.int64)
    weight = tl.where(evictable, length | (1 << 32), 0)
    pivots = _pivots(s, w, rows, BY_TICK)
    weights = tl.sum(tl.where(key[:, None] <= pivots[None, :], weight[:, None], 0), axis=0)
    tl.atomic_add(work + WEIGHTS + 8 * tl.arange(0, PIVOTS), weights, sem="relaxed")
    tl.store(w.partial + tl.program_id(0), tl.min(tl.where(evictable, key, HIGHEST)))
    tl.store(w.partial + HIGHS + tl.program_id(0), tl.max(tl.where(evictable, key, 0)))
    return pivots


@triton.jit
def bound_of(s, w, work, pivots, wanted, programs):
    """(lowest and highest key of the sample, a bound that the victims' keys most likely do not exceed)."""
    weights = tl.load(work + WEIGHTS + 8 * tl.arange(0, PIVOTS))
    tokens = weights & LOW32
    total = tl.max(tokens)
    nodes = tl.maximum(tl.max(weights >> 32), 1)
    # A quarter more than the share that is wanted, and 16 nodes: few rows of a sample say little of the whole.
    share = wanted * total // tl.load(s.numbers + numbers.EVICTABLE)
    enough = tokens >= tl.minimum(share + share // 4 + 16 * total // nodes, total)
    bound = tl.min(tl.where(enough, pivots, HIGHEST))
    program = tl.arange(0, MOST)
    low = tl.min(tl.load(w.partial + program, mask=program < programs, other=HIGHEST))
    high = tl.max(tl.load(w.partial + HIGHS + program, mask=program < programs, other=0))
    low = tl.minimum(low, bound)
    return low, tl.maximum(low, high), bound


@triton.jit
def count_bins(s, w, bins, rows, capacity, programs, low, shift, bound, tie, BY_TICK: tl.constexpr):
    """Count the nodes not above the bound into the bins, (nodes << 32 | tokens); notes each block's lowest key."""
    block = tl.program_id(0)
    while block * BLOCK < rows:
        row, key, evictable = evictable_block(s, w, block * BLOCK, capacity, BY_TICK)
        lowest = tl.min(tl.where(evictable, key, HIGHEST))
        tl.store(w.partial + MINIMA + block, lowest, mask=MINIMA + block < MINIMA_END)
        if lowest <= tl.where(tie >= 0, tie, bound):
            value = value_of(s, row, key, tie, evictable)
            counted = evictable & (value <= bound)
            length = tl.load(s.length + row, mask=counted, other=0).to(tl.int64)
            tl.atomic_add(bins + bin_of(value, low, shift), length | (1 << 32), mask=counted, sem="relaxed")
        block += programs


@triton.jit
def find_cut(work, bins, wanted):
    """(the bin in which the cut falls, its nodes, the comparisons that order the victims, tokens in all bins).

    Each program writes down what goes before each bin, all the same.
    """
    i = tl.arange(0, BINS)
    inside = tl.load(bins + i)
    through = tl.cumsum(inside)
    tl.store(work + BEFORE + 1 + i, through)
    cut = tl.minimum(tl.sum(((through & LOW32) < wanted).to(tl.int32)), BINS - 1)
    nodes = inside >> 32
    size = tl.sum(tl.where(i == cut, nodes, 0))
    comparisons = tl.sum(tl.where(i <= cut, nodes * nodes, 0))
    tl.debug_barrier()  # other threads read what this one wrote down
    return cut, size, comparisons, tl.max(through) & LOW32


@triton.jit
def edges_of(cut, low, shift, bound):
    """The lowest and the highest value that bin `cut` can have."""
    inner = (cut - 1).to(tl.int64)
    lowest = tl.where(cut == 0, 0, low + (inner << shift))
    highest = tl.where(cut == 0, low - 1, low + ((inner + 1) << shift) - 1)
    return lowest, tl.minimum(tl.where(cut == BINS - 1, bound, highest), bound)


@triton.jit
def scatter(s, w, work, counts, rows, capacity, programs, low, shift, bound, tie, reach, cut, BY_TICK: tl.constexpr):
    """Write the rows of the bins up to the cut's to `victims[1]`, bin after bin, in any order within each.

    `reach`: the highest key among them. Blocks without any are passed over.
    """
    block = tl.program_id(0)
    while block * BLOCK < rows:
        if tl.load(w.partial + MINIMA + block, mask=MINIMA + block < MINIMA_END, other=0) <= reach:
            row, key, evictable = evictable_block(s, w, block * BLOCK, capacity, BY_TICK)
            value = value_of(s, row, key, tie, evictable)
            bin = bin_of(value, low, shift)
            taken = evictable & (value <= bound) & (bin <= cut)
            first = tl.load(work + BEFORE + bin, mask=taken, other=0) >> 32
            place = first + tl.atomic_add(counts + bin, 1, mask=taken, sem="relaxed")
            tl.store(w.victims + capacity + place, row, mask=taken)
        block += programs
