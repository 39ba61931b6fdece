"""Digest: an order-independent hash of the logical tree, equal to the CPU's (see kernels/cpu/digest.py).

The hash of a path is the sum of the hashes of its edges. The first kernel hashes each edge once. The second kernel adds
up, for each row, the hashes of the edges on its path.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flatradix.kernels.gpu.launch import Arrays, Kernel, cooperative_programs, device_function
from flatradix.kernels.gpu.rows import FREE
from flatradix.layout import hashing, numbers

mix = device_function(hashing.mix)

# Units of an edge, and rows, that a program handles at once.
UNITS = tl.constexpr(512)
LANES = tl.constexpr(128)
# Sums of each row: the hash of its edge in both lanes of the digest, and the hash of its slots.
SUMS = tl.constexpr(3)


@triton.jit
def _sum_edge(s, pool, row, BIGRAM: tl.constexpr):
    """Return (hash of a row's edge in the first lane of the digest, in the second lane, hash of its slots)."""
    start = tl.load(s.start + row).to(tl.int64)
    length = tl.load(s.length + row).to(tl.int64)
    begin = tl.load(s.end + row).to(tl.int64) - length
    first = tl.zeros([UNITS], tl.int64)
    second = tl.zeros([UNITS], tl.int64)
    slots = tl.zeros([UNITS], tl.int64)
    at = tl.zeros([], tl.int64)
    while at < length:
        j = at + tl.arange(0, UNITS)
        inside = j < length
        unit = tl.load(s.tokens + start + j, mask=inside, other=0).to(tl.int64)
        if BIGRAM:
            unit |= tl.load(s.seconds + start + j, mask=inside, other=0).to(tl.int64) << 32
        slot = tl.load(pool + start + j, mask=inside, other=0).to(tl.int64)
        first += tl.where(inside, mix(mix(unit) + (begin + j)), 0)
        second += tl.where(inside, mix(mix(unit + 1) + (begin + j)), 0)
        slots += tl.where(inside, mix(slot + mix(j)), 0)
        at += UNITS
    return tl.sum(first), tl.sum(second), tl.sum(slots)


@triton.jit(do_not_specialize=["sums", "pool"])
def edges_kernel(s, w, sums, pool, BIGRAM: tl.constexpr):
    rows = tl.load(s.numbers + numbers.ROWS)
    row = tl.program_id(0).to(tl.int64) + 1
    while row < rows:
        if tl.load(s.parent + row) != FREE:
            first, second, slots = _sum_edge(s, pool, row, BIGRAM)
            tl.store(sums + SUMS * row, first)
            tl.store(sums + SUMS * row + 1, second)
            tl.store(sums + SUMS * row + 2, slots)
        row += tl.num_programs(0)


@triton.jit
def _term(s, row, live, path, slots):
    """Return what each row adds to one lane of the digest."""
    term = mix(path + tl.load(s.length + row, mask=live, other=0))
    term = mix(term + slots)
    term = mix(term + tl.load(s.lock_ref + row, mask=live, other=0))
    term = mix(term + tl.load(s.own_locks + row, mask=live, other=0))
    term = mix(term + tl.load(s.tick + row, mask=live, other=0))
    term = mix(term + tl.load(s.created + row, mask=live, other=0))
    term = mix(term + tl.load(s.priority + row, mask=live, other=0))
    term = mix(term + tl.load(s.hit_count + row, mask=live, other=0))
    return tl.where(live, term, 0)


@triton.jit(do_not_specialize=["sums", "totals"])
def nodes_kernel(s, w, sums, totals):
    rows = tl.load(s.numbers + numbers.ROWS)
    row = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    live = (row > 0) & (tl.load(s.parent + row, mask=row < rows, other=FREE) != FREE)
    slots = tl.load(sums + SUMS * row + 2, mask=live, other=0)
    first = tl.zeros([LANES], tl.int64)
    second = tl.zeros([LANES], tl.int64)
    above = tl.where(live, row, 0)
    while tl.max(above) > 0:
        on = above > 0
        first += tl.load(sums + SUMS * above, mask=on, other=0)
        second += tl.load(sums + SUMS * above + 1, mask=on, other=0)
        above = tl.where(on, tl.load(s.parent + above, mask=on, other=0).to(tl.int64), above)
    name = tl.load(s.namespace_hash + ~above, mask=live, other=0)
    tl.atomic_add(totals, tl.sum(_term(s, row, live, first + mix(name), slots)), sem="relaxed")
    tl.atomic_add(totals + 1, tl.sum(_term(s, row, live, second + mix(name + 1), slots)), sem="relaxed")


_edges = Kernel(edges_kernel, ["*i64", "*w"])
_nodes = Kernel(nodes_kernel, ["*i64", "*i64"])


def digest(arrays: Arrays) -> tuple[int, int]:
    """Return both lanes of the digest as signed integers. Waits for the device."""
    state = arrays.state
    rows = int(state.numbers[numbers.ROWS])
    sums = torch.empty(SUMS.value * rows, dtype=torch.int64, device=state.numbers.device)
    totals = torch.zeros(2, dtype=torch.int64, device=state.numbers.device)
    _edges(
        arrays,
        cooperative_programs(arrays, rows),
        (sums.data_ptr(), arrays.pool),
        (arrays.bigram,),
        (arrays.pool_wide,),
    )
    _nodes(arrays, -(-rows // LANES.value), (sums.data_ptr(), totals.data_ptr()))
    first, second = totals.tolist()
    return first, second
