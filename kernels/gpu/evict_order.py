"""Order the victims of an eviction, and tell the host their number and their tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flatradix.kernels.gpu.evict_bins import BEFORE, LOW32, bin_of, value_of
from flatradix.kernels.gpu.evict_keys import HIGHEST, keys_of
from flatradix.kernels.gpu.launch import Arrays
from flatradix.layout import mail, scratch

# Nodes that a program ranks at once, and nodes of its bin with which each is compared in one step. Where bins are
# crowded, fewer nodes are ranked and each is compared with more: a step takes 1 us, however many nodes are compared.
RANKED = tl.constexpr(128)
OTHERS = tl.constexpr(16)
FEW_RANKED = tl.constexpr(8)
MANY_OTHERS = tl.constexpr(256)

# Index into `Scratch.counters`: the tokens of the last victims, which the hint still counts.
SPENT = tl.constexpr(scratch.EVICTION_HINT + 2)


@triton.jit
def _those_before(s, keys, order, row, key, end, first, size, AT_ONCE: tl.constexpr):
    """Return (number of nodes in each lane's bin that go before the lane's node, their tokens).

    The bin is `order[first:first + size]`.
    """
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
def publish_victims(w, call, tokens, victims, active):
    """Tell the host, and `free`, the tokens and the number of the victims. One lane is active."""
    tag = (call & mail.CALL_MASK) << 32
    tl.store(w.mail + mail.TOKENS + tl.zeros_like(tokens), tag | tokens, mask=active)
    tl.store(w.mail + mail.VICTIMS + tl.zeros_like(tokens), tag | victims, mask=active)
    tl.store(w.counters + scratch.SELECTED + tl.zeros_like(tokens), tokens, mask=active)
    tl.store(w.counters + scratch.SELECTED + 1 + tl.zeros_like(tokens), victims, mask=active)
    tl.store(w.counters + SPENT + tl.zeros_like(tokens), tokens, mask=active & (tokens > 0))


@triton.jit
def _listed(s, keys, order, place, there):
    """Return (rows, keys, ends, lengths) of the nodes at positions `place` of the list `order`."""
    row = tl.load(order + place, mask=there, other=0)
    key = tl.load(keys + row, mask=there, other=0)
    end = tl.load(s.end + row, mask=there, other=0)
    return row, key, end, tl.load(s.length + row, mask=there, other=0).to(tl.int64)


@triton.jit
def rank_list(s, w, capacity, programs, found, wanted, call, BY_TICK: tl.constexpr):
    """Rank all `found` nodes of the list, and store the victims in the order of eviction.

    The lane of the last victim tells the host the number of victims and their tokens.
    """
    keys = keys_of(s, w, BY_TICK)
    order = w.victims + capacity
    start = tl.program_id(0) * FEW_RANKED
    while start < found:
        place = start + tl.arange(0, FEW_RANKED)
        there = place < found
        row, key, end, length = _listed(s, keys, order, place, there)
        size = tl.where(there, found, 0)
        rank, tokens = _those_before(s, keys, order, row, key, end, tl.zeros_like(key), size, MANY_OTHERS)
        victim = there & (tokens < wanted)
        tl.store(w.victims + rank, row, mask=victim)
        tl.store(w.tokens_before + rank, tokens, mask=victim)
        publish_victims(w, call, tokens + length, rank + 1, victim & (tokens + length >= wanted))
        start += programs * FEW_RANKED


@triton.jit
def rank_bins(
    s, w, work, capacity, programs, found, wanted, call, low, shift, tie, cut, sort_from,
    LANES: tl.constexpr, AT_ONCE: tl.constexpr, BY_TICK: tl.constexpr,
):  # fmt: skip
    """Rank the `found` nodes of the bins up to `cut`, each within its bin, and store the victims in order of eviction.

    The lane of the last victim tells the host the number of victims and their tokens. The nodes of the bins before
    `sort_from` are victims too; they are stored in the order of the list, unranked.
    """
    keys = keys_of(s, w, BY_TICK)
    order = w.victims + capacity
    start = tl.program_id(0).to(tl.int64) * LANES
    while start < found:
        place = start + tl.arange(0, LANES)
        there = place < found
        row, key, end, length = _listed(s, keys, order, place, there)
        bin = bin_of(value_of(s, row, key, tie, there), low, shift)
        before = tl.load(work + BEFORE + bin, mask=there, other=0)
        through = tl.load(work + BEFORE + 1 + bin, mask=there, other=0)
        compared = there & (bin >= sort_from)
        first = before >> 32
        size = tl.where(compared, (through >> 32) - first, 0)
        rank, tokens = _those_before(s, keys, order, row, key, end, first, size, AT_ONCE)
        rank = tl.where(compared, first + rank, place)
        tokens += before & LOW32
        victim = there & ((bin < cut) | (tokens < wanted))
        tl.store(w.victims + rank, row, mask=victim)
        tl.store(w.tokens_before + rank, tokens, mask=victim)
        last = compared & victim & (tokens + length >= wanted)
        publish_victims(w, call, tokens + length, rank + 1 + tl.where(sort_from > 0, mail.UNORDERED, 0), last)
        start += programs * LANES


def order_victims(arrays: Arrays, count: int, by_tick: bool) -> None:
    """Sort the `count` victims that `select` left UNORDERED into the order of eviction."""
    state, beside = arrays.state, arrays.scratch
    rows = beside.victims[0, :count].long()
    rows = rows[torch.argsort(state.end[rows], descending=True, stable=True)]
    rows = rows[torch.argsort((state.tick if by_tick else beside.eviction_key)[rows], stable=True)]
    set_victims(arrays, rows)


def set_victims(arrays: Arrays, rows: torch.Tensor) -> None:
    """Make these rows, in this order, the victims that `free` frees."""
    lengths = arrays.state.length[rows].long()
    arrays.scratch.victims[0, : len(rows)] = rows
    arrays.scratch.tokens_before[: len(rows)] = lengths.cumsum(0) - lengths
