"""Count rows into bins by their keys, to find the bin in which the cut of an eviction lies.

A sample of the rows gives a bound for the keys of the victims. The nodes up to the bound, and their tokens, are counted
into bins. Sums over the bins give the nodes and tokens before each bin. So only nodes of the same bin must be compared
with one another. The sample saves atomic additions: each of a million costs 27 ps on an H200, and all together cost as
much as three passes over the rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.evict_keys import BLOCK, HIGHEST, evictable_block, is_evictable, keys_of
from flatradix.layout import numbers, scratch

DEEPEST = tl.constexpr(numbers.MAX_UNITS)
LOW32 = tl.constexpr(0xFFFFFFFF)
# Rows of each program's part of the sample, taken in runs of 16, so that loads use whole memory sectors.
SAMPLE = tl.constexpr(512)
RUN = tl.constexpr(16)
# The bound is one of PIVOTS keys. Each is the lowest of 8 neighbouring rows: low keys, as most evictions are small.
PIVOTS = tl.constexpr(32)
NEIGHBOURS = tl.constexpr(8)
BINS = tl.constexpr(2048)

# The parts of `Scratch.work`, int64: three sets of bins, used in turn; the sums before each bin; the weights of the
# pivots, eight words apart so that additions to them do not wait for one another; the sums of the list. All numbers are
# (nodes << 32 | tokens), or nodes alone where `scatter` counts. A launch leaves all parts but the second at zero.
BEFORE = tl.constexpr(3 * BINS.value)
WEIGHTS = tl.constexpr(4 * BINS.value + 8)
CONTENT = tl.constexpr(WEIGHTS.value + 8 * PIVOTS.value)
assert CONTENT.value < scratch.WORK_WORDS

# Indices into `Scratch.partial`: from 0 the lowest and from HIGHS the highest key of each program's part of the sample,
# from MINIMA the lowest key of each block.
MOST = tl.constexpr(1024)
HIGHS = tl.constexpr(1024)
MINIMA = tl.constexpr(2048)
MINIMA_END = tl.constexpr(scratch.PARTIALS)


@triton.jit
def value_of(s, row, key, tie, there):
    """Return the value by which a row is counted into a bin: its key if `tie` < 0.

    Else a crowd of nodes has the key `tie`, and bins divide these nodes by their ends, deeper ends first. Rows with
    lower keys then have the value -1, rows with higher keys HIGHEST.
    """
    value = key
    if tie >= 0:
        end = tl.load(s.end + row, mask=there & (key == tie), other=0).to(tl.int64)
        value = tl.where(key < tie, -1, tl.where(key == tie, DEEPEST - end, HIGHEST))
    return value


@triton.jit
def bin_of(value, low, shift):
    """Return the bin of a value. Bin 0 holds all values below `low`, the last bin all values above the other bins."""
    return tl.where(value < low, 0, tl.minimum((tl.maximum(value - low, 0) >> shift) + 1, BINS - 1))


@triton.jit
def width_for(low, high):
    """Return the log2 of a bin's width with which [low, high] fits into the bins between the first and the last."""
    shift = tl.zeros([], tl.int64)
    while ((high - low) >> shift) > BINS - 3:
        shift += 1
    return shift


@triton.jit
def _pivots(s, w, rows, BY_TICK: tl.constexpr):
    """Return PIVOTS keys from all over the rows; the last is HIGHEST."""
    pivot = tl.arange(0, PIVOTS)
    middle = ((2 * pivot + 1).to(tl.int64) * rows // (2 * PIVOTS)).to(tl.int32)
    row = (middle - middle % NEIGHBOURS)[:, None] + tl.arange(0, NEIGHBOURS)[None, :]
    there = (row < rows) & (pivot < PIVOTS - 1)[:, None]
    key = tl.load(keys_of(s, w, BY_TICK) + row, mask=there, other=0)
    return tl.min(tl.where(is_evictable(s, row, there), key, HIGHEST), axis=1)


@triton.jit
def sample(s, w, work, rows, programs, BY_TICK: tl.constexpr):
    """Add this program's sampled rows with keys up to each pivot to that pivot's weight. Return the pivots.

    Weights are (nodes << 32 | tokens). Also stores the lowest and the highest key of this program's rows.
    """
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
    """Return (lowest key, highest key, bound) of the sample and its pivots.

    The keys of the victims most likely do not exceed the bound.
    """
    weights = tl.load(work + WEIGHTS + 8 * tl.arange(0, PIVOTS))
    tokens = weights & LOW32
    total = tl.max(tokens)
    nodes = tl.maximum(tl.max(weights >> 32), 1)
    # A quarter more than the wanted share, and 16 nodes: a few sampled rows say little about all rows.
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
    """Count the nodes with values up to `bound` into bins (nodes << 32 | tokens). Store each block's lowest key."""
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
    """Return (bin of the cut, its nodes, comparisons needed to order the victims, tokens in all bins).

    Every program stores the nodes and tokens before each bin; all store the same numbers.
    """
    i = tl.arange(0, BINS)
    inside = tl.load(bins + i)
    through = tl.cumsum(inside)
    tl.store(work + BEFORE + 1 + i, through)
    cut = tl.minimum(tl.sum(((through & LOW32) < wanted).to(tl.int32)), BINS - 1)
    nodes = inside >> 32
    size = tl.sum(tl.where(i == cut, nodes, 0))
    comparisons = tl.sum(tl.where(i <= cut, nodes * nodes, 0))
    tl.debug_barrier()  # other threads read what this one has stored
    return cut, size, comparisons, tl.max(through) & LOW32


@triton.jit
def bin_limits(cut, low, shift, bound):
    """Return the lowest and the highest value that bin `cut` can hold."""
    inner = (cut - 1).to(tl.int64)
    lowest = tl.where(cut == 0, 0, low + (inner << shift))
    highest = tl.where(cut == 0, low - 1, low + ((inner + 1) << shift) - 1)
    return lowest, tl.minimum(tl.where(cut == BINS - 1, bound, highest), bound)


@triton.jit
def scatter(s, w, work, counts, rows, capacity, programs, low, shift, bound, tie, reach, cut, BY_TICK: tl.constexpr):
    """Write the rows of the bins up to `cut` to `victims[1]`, bin after bin, in any order within a bin.

    reach: the highest key that these rows can have. Blocks without such a key are skipped.
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
