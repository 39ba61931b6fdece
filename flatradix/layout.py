"""TreeState: the tree as one tuple of flat tensors, the same on every backend.

A node is a row. Its edge is `length` units at `start` in the token pool, and it ends `end` units from the root. Row 0
is the root; it holds nothing. A top-level node has no row for a parent but the code of its namespace, `~ns`, so that
walking up ends at the first negative parent. Children are found in one open-addressed table keyed by (parent, first
page); there are no child lists. Edges are ranges of a pool: splitting one moves no token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from flatradix import meta

FREE_ROW = -(2**31)
MAX_UNITS = 2**31 - 1
# The pool is a quarter larger than the tree may be. Freed ranges are taken again in place; the slack is what makes a
# range long enough easy to find. On the 12,031 requests of the conversation trace (page 64) no compaction happens with
# 1M tokens, and 21 with 4M, of 2 ms each; with an eighth of slack 13 and 61, with a half none.
POOL_SLACK = 4
SMALLEST_TABLE = 64


class TreeState(NamedTuple):
    """The arrays of one tree. R rows, T table places, P pool units, N namespaces; shapes in brackets."""

    parent: torch.Tensor  # int32 [R]: row of the parent, ~namespace at the top, FREE_ROW if the row is free
    start: torch.Tensor  # int32 [R]: where the edge begins in the pools
    length: torch.Tensor  # int32 [R]: units on the edge, whole pages
    end: torch.Tensor  # int32 [R]: units from the root to the node's end
    children: torch.Tensor  # int32 [R]
    lock_ref: torch.Tensor  # int32 [R]: locks on this node or below
    own_locks: torch.Tensor  # int32 [R]: locks that end exactly here
    hit_count: torch.Tensor  # int32 [R]
    tag: torch.Tensor  # int32 [R]: hash of (parent, first page), the low 32 bits
    queued: torch.Tensor  # int8 [R]: 1 while the row has its entry in the eviction queue
    tick: torch.Tensor  # int64 [R]: last use
    created: torch.Tensor  # int64 [R]
    priority: torch.Tensor  # int64 [R]
    generation: torch.Tensor  # int64 [R]: goes up when the row is freed
    free_rows: torch.Tensor  # int32 [R]: a stack
    queue_score: torch.Tensor  # int64 [2 R]: candidates for eviction, a heap and behind it a sorted ring
    queue_tick: torch.Tensor  # int64 [2 R]
    queue_row: torch.Tensor  # int32 [2 R]
    table: torch.Tensor  # int64 [T]: (tag, row), 0 where empty; on a GPU [2 T], each followed by (length, start)
    tokens: torch.Tensor  # int32 [P], on a GPU [2 P] as all pools: the first token of each unit
    seconds: torch.Tensor  # int32 [P], [0] without bigrams: the second token of each unit
    used: torch.Tensor  # int64 [P / page / 64]: one bit a pool page
    namespace_children: torch.Tensor  # int32 [N]
    namespace_hash: torch.Tensor  # int64 [N]
    released: torch.Tensor  # int32 [N]: namespaces that lost their last node, for the host to forget
    multipliers: torch.Tensor  # int64 [page], [2 * page] with bigrams: of the multilinear page hash
    meta: torch.Tensor  # int64 [meta.SIZE]


# What a node has; the rest of the state can be made from these and the pools.
COLUMNS = TreeState._fields[: TreeState._fields.index("free_rows")]


def row_capacity(max_tokens: int, page_size: int) -> int:
    """Rows that a tree can need: one a page, and the root."""
    return max_tokens // page_size + 1


def pool_units(max_tokens: int, page_size: int) -> int:
    """Units in the token and slot pools: the capacity and a quarter, in whole pages."""
    pages = max_tokens // page_size
    return (pages + -(-pages // POOL_SLACK)) * page_size


def _untouched(count: int, dtype: type[np.generic]) -> torch.Tensor:
    """Uninitialised memory that the system commits where it is touched; numpy asks for huge pages from 4 MiB on."""
    return torch.from_numpy(np.empty(count, dtype=dtype))


def _zeros(count: int, dtype: type[np.generic]) -> torch.Tensor:
    """Zeros, committed as they are touched too (numpy uses calloc, torch.zeros would write)."""
    return torch.from_numpy(np.zeros(count, dtype=dtype))


def committed(count: int, dtype: type[np.generic]) -> torch.Tensor:
    """Memory for a pool, touched here and now: the page faults would cost the first inserts more than all else."""
    return _untouched(count, dtype).zero_()


def _write_numbers(
    numbers: torch.Tensor, max_tokens: int, page_size: int, bigram: bool, generation: int, table: int
) -> None:
    """What `TreeState.meta` holds of an empty tree whose child table has so many places, on either device."""
    numbers[meta.PAGE] = page_size
    numbers[meta.BIGRAM] = bigram
    numbers[meta.MAX_TOKENS] = max_tokens
    numbers[meta.ROW_CAPACITY] = row_capacity(max_tokens, page_size)
    numbers[meta.POOL_PAGES] = pool_units(max_tokens, page_size) // page_size
    numbers[meta.GENERATION] = generation
    numbers[meta.ROWS] = 1
    numbers[meta.TABLE_MASK] = table - 1


def allocate(max_tokens: int, page_size: int, bigram: bool, generation: int) -> TreeState:
    """An empty tree's arrays in host memory. Rows that no node has used cost address space, not memory."""
    rows = row_capacity(max_tokens, page_size)
    units = pool_units(max_tokens, page_size)
    # An insert makes room for two nodes more than it may need, in a table that is at most half full.
    table = max(SMALLEST_TABLE, 1 << (2 * (rows + 2) - 1).bit_length())
    rng = np.random.default_rng()
    multipliers = rng.integers(-(2**63), 2**63, page_size * (2 if bigram else 1), dtype=np.int64) | 1
    i8, i32, i64 = np.int8, np.int32, np.int64
    state = TreeState(
        parent=_untouched(rows, i32),
        start=_untouched(rows, i32),
        length=_untouched(rows, i32),
        end=_untouched(rows, i32),
        children=_untouched(rows, i32),
        lock_ref=_untouched(rows, i32),
        own_locks=_untouched(rows, i32),
        hit_count=_untouched(rows, i32),
        tag=_untouched(rows, i32),
        queued=_untouched(rows, i8),
        tick=_untouched(rows, i64),
        created=_untouched(rows, i64),
        priority=_untouched(rows, i64),
        generation=_untouched(rows, i64),
        free_rows=_untouched(rows, i32),
        queue_score=_untouched(2 * rows, i64),
        queue_tick=_untouched(2 * rows, i64),
        queue_row=_untouched(2 * rows, i32),
        table=_untouched(table, i64),
        tokens=committed(units, i32),
        seconds=committed(units if bigram else 0, i32),
        used=_zeros(-(-units // page_size // 64), i64),
        namespace_children=_zeros(rows, i32),
        namespace_hash=_untouched(rows, i64),
        released=_untouched(rows, i32),
        multipliers=torch.from_numpy(multipliers),
        meta=_zeros(meta.SIZE, i64),
    )
    for name in COLUMNS:
        getattr(state, name)[0] = 0
    state.table[:SMALLEST_TABLE] = 0
    _write_numbers(state.meta, max_tokens, page_size, bigram, generation, SMALLEST_TABLE)
    return state


class Workspace(NamedTuple):
    """What the kernels of a GPU keep beside a state: only `place`, zeros and hints outlive a call.

    R rows, B queries of the largest batch so far, C places of a table of claims.
    """

    place: torch.Tensor  # int32 [R]: where the row's entry stands in the child table
    undo: torch.Tensor  # int64 [R]: the tick from before the call, of the rows that the call touched
    above: torch.Tensor  # int32 [HINTS * R]: the rows above each row as last seen, 0 where none is
    key: torch.Tensor  # int64 [R]: what eviction orders by; scratch of compactions
    number: torch.Tensor  # int64 [NUMBERS]: counters that are shared by the programs of a launch
    partial: torch.Tensor  # int64 [PARTIALS]: sums of single programs
    query: torch.Tensor  # int32 [QUERY_COLUMNS, B]
    value: torch.Tensor  # int64 [B]: a number for the message of a refusal
    claims: torch.Tensor  # int32 [2, C]: the lowest query of each group, -1 where nobody is
    victims: torch.Tensor  # int32 [2, R]: rows that an eviction takes
    mail: torch.Tensor  # int64 [MAIL]: in pinned memory, where kernels leave numbers for the host


def allocate_device(max_tokens: int, page_size: int, bigram: bool, generation: int, device: torch.device) -> TreeState:
    """An empty tree's arrays on a GPU.

    What differs from host memory: each pool has two halves of P units, of which one is in use, filled from its
    beginning, and compaction copies what is live to the other; the child table holds the edge beside the row and has
    room for two places a pool page, so that entries of evicted nodes can wait for the next compaction.
    """
    rows = row_capacity(max_tokens, page_size)
    units = pool_units(max_tokens, page_size)
    table = max(SMALLEST_TABLE, 1 << (2 * (units // page_size) - 1).bit_length())
    rng = np.random.default_rng()
    multipliers = rng.integers(-(2**63), 2**63, page_size * (2 if bigram else 1), dtype=np.int64) | 1

    def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    i8, i32, i64 = torch.int8, torch.int32, torch.int64
    state = TreeState(
        parent=torch.full((rows,), FREE_ROW, dtype=i32, device=device),
        start=zeros(rows, i32),
        length=zeros(rows, i32),
        end=zeros(rows, i32),
        children=zeros(rows, i32),
        lock_ref=zeros(rows, i32),
        own_locks=zeros(rows, i32),
        hit_count=zeros(rows, i32),
        tag=zeros(rows, i32),
        queued=zeros(0, i8),
        tick=zeros(rows, i64),
        created=zeros(rows, i64),
        priority=zeros(rows, i64),
        generation=zeros(rows, i64),
        free_rows=zeros(rows, i32),
        queue_score=zeros(0, i64),
        queue_tick=zeros(0, i64),
        queue_row=zeros(0, i32),
        table=zeros(2 * table, i64),
        tokens=zeros(2 * units, i32),
        seconds=zeros(2 * units if bigram else 0, i32),
        used=zeros(0, i64),
        namespace_children=zeros(rows, i32),
        namespace_hash=zeros(rows, i64),
        released=zeros(rows, i32),
        multipliers=torch.from_numpy(multipliers).to(device),
        meta=zeros(meta.SIZE, i64),
    )
    state.parent[0] = 0
    numbers = torch.zeros(meta.SIZE, dtype=i64, device="cpu")
    _write_numbers(numbers, max_tokens, page_size, bigram, generation, table)
    numbers[meta.POOL_END] = units
    state.meta.copy_(numbers)
    return state
