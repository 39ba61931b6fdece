"""TreeState: the tree as one tuple of flat tensors, the same on every backend.

A node is a row. Its edge is `length` units at `start` in the token pool, and it ends `end` units from the root. Row 0
is the root; it holds nothing. A top-level node has no row for a parent but the code of its namespace, `~ns`, so that
walking up ends at the first negative parent. Children are found in one open-addressed table keyed by (parent, first
page); there are no child lists. Edges are ranges of a pool: splitting one moves no token.

The annotations of TreeState are the one table of its fields: allocation on both devices, the kernels' access to the
addresses, `check` and snapshots all follow it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple, get_type_hints

import numpy as np
import torch

from flatradix.layout import numbers

FREE_ROW = -(2**31)
# The pool is a quarter larger than the tree may be. Freed ranges are taken again in place; the slack is what makes a
# range long enough easy to find (compactions with other slacks: bench/RESULTS.md).
POOL_SLACK = 4
SMALLEST_TABLE = 64


class Sizes(NamedTuple):
    """What the sizes of a tree's arrays follow from. units: of each pool; entries: of the child table."""

    rows: int
    units: int
    page: int
    bigram: bool
    entries: int

    @property
    def pages(self) -> int:
        return self.units // self.page


Count = Callable[[Sizes], int]
Memory = Callable[[int, torch.dtype], torch.Tensor]


def untouched(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory that the system commits where it is touched; numpy asks for huge pages from 4 MiB on."""
    return torch.from_numpy(np.empty(count, _NUMPY[dtype]))


def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, committed as they are touched too: numpy uses calloc, torch.zeros would write."""
    return torch.from_numpy(np.zeros(count, _NUMPY[dtype]))


def committed(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a pool, touched here and now: the page faults would cost the first inserts more than all else."""
    return untouched(count, dtype).zero_()


def multipliers(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Odd numbers, drawn anew for each tree, so that nobody can prepare prompts that collide."""
    drawn = np.random.default_rng().integers(-(2**63), 2**63, count, dtype=np.int64) | 1
    return torch.from_numpy(drawn).to(dtype)


class Array(NamedTuple):
    """One field: its dtype, its length on each device, how host memory is made, and how kernels on the CPU see it.

    column: whether it says something of each node. address: kernels calculate with its address, not with places.
    """

    dtype: torch.dtype
    on_host: Count
    on_device: Count
    memory: Memory = untouched
    column: bool = False
    address: bool = False


def _none(sizes: Sizes) -> int:
    return 0


def _rows(sizes: Sizes) -> int:
    return sizes.rows


def _rows_twice(sizes: Sizes) -> int:
    return 2 * sizes.rows


def _entries(sizes: Sizes) -> int:
    return sizes.entries


def _entries_twice(sizes: Sizes) -> int:
    return 2 * sizes.entries


def _units(sizes: Sizes) -> int:
    return sizes.units


def _units_twice(sizes: Sizes) -> int:
    return 2 * sizes.units


def _seconds(sizes: Sizes) -> int:
    return sizes.units if sizes.bigram else 0


def _seconds_twice(sizes: Sizes) -> int:
    return 2 * _seconds(sizes)


def _page_words(sizes: Sizes) -> int:
    return -(-sizes.pages // 64)


def _page_tokens(sizes: Sizes) -> int:
    return sizes.page * (2 if sizes.bigram else 1)


def _numbers(sizes: Sizes) -> int:
    return numbers.SIZE


_NUMPY = {torch.int8: np.int8, torch.int32: np.int32, torch.int64: np.int64}
i8, i32, i64 = torch.int8, torch.int32, torch.int64
Column32 = Annotated[torch.Tensor, Array(i32, _rows, _rows, column=True)]
Column64 = Annotated[torch.Tensor, Array(i64, _rows, _rows, column=True)]
HostColumn8 = Annotated[torch.Tensor, Array(i8, _rows, _none, column=True)]
Rows32 = Annotated[torch.Tensor, Array(i32, _rows, _rows)]
Rows64 = Annotated[torch.Tensor, Array(i64, _rows, _rows)]
Counts32 = Annotated[torch.Tensor, Array(i32, _rows, _rows, zeros)]
Queue32 = Annotated[torch.Tensor, Array(i32, _rows_twice, _none)]
Queue64 = Annotated[torch.Tensor, Array(i64, _rows_twice, _none)]
Table = Annotated[torch.Tensor, Array(i64, _entries, _entries_twice)]
Pool = Annotated[torch.Tensor, Array(i32, _units, _units_twice, committed, address=True)]
BigramPool = Annotated[torch.Tensor, Array(i32, _seconds, _seconds_twice, committed, address=True)]
Bitmap = Annotated[torch.Tensor, Array(i64, _page_words, _none, zeros)]
Multipliers = Annotated[torch.Tensor, Array(i64, _page_tokens, _page_tokens, multipliers)]
Numbers = Annotated[torch.Tensor, Array(i64, _numbers, _numbers, zeros)]


class TreeState(NamedTuple):
    """The arrays of one tree. R rows, T entries of the child table, P units of a pool; lengths in brackets."""

    parent: Column32  # [R]: row of the parent, ~namespace at the top, FREE_ROW if the row is free
    start: Column32  # [R]: where the edge begins in the pools
    length: Column32  # [R]: units on the edge, whole pages
    end: Column32  # [R]: units from the root to the node's end
    children: Column32  # [R]
    lock_ref: Column32  # [R]: locks on this node or below
    own_locks: Column32  # [R]: locks that end exactly here
    hit_count: Column32  # [R]
    tag: Column32  # [R]: hash of (parent, first page), the low 32 bits
    queued: HostColumn8  # [R], on a GPU [0]: 1 while the row has its entry in the eviction queue
    tick: Column64  # [R]: last use
    created: Column64  # [R]
    priority: Column64  # [R]
    generation: Column64  # [R]: goes up when the row is freed
    free_rows: Rows32  # [R]: a stack
    queue_score: Queue64  # [2 R], on a GPU [0]: candidates for eviction, a heap and behind it a sorted ring
    queue_tick: Queue64  # [2 R]
    queue_row: Queue32  # [2 R]
    child_table: Table  # [T]: (tag, row), 0 where empty; on a GPU [2 T], each followed by (length, start)
    tokens: Pool  # [P], on a GPU [2 P] as all pools: the first token of each unit
    seconds: BigramPool  # [P], [0] without bigrams: the second token of each unit
    used: Bitmap  # [P / page / 64], on a GPU [0]: one bit a pool page
    namespace_children: Counts32  # [R], by namespace code
    namespace_hash: Rows64  # [R], by namespace code
    released: Rows32  # [R]: namespaces that lost their last node, for the host to forget
    multipliers: Multipliers  # [page], [2 * page] with bigrams: of the multilinear page hash
    numbers: Numbers  # [numbers.SIZE]


FIELDS: dict[str, Array] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(TreeState, include_extras=True).items()
}
COLUMNS = tuple(name for name, array in FIELDS.items() if array.column)


def row_capacity(max_tokens: int, page_size: int) -> int:
    """Rows that a tree can need: one a page, and the root."""
    return max_tokens // page_size + 1


def pool_units(max_tokens: int, page_size: int) -> int:
    """Units in the token and slot pools: the capacity and a quarter, in whole pages."""
    pages = max_tokens // page_size
    return (pages + -(-pages // POOL_SLACK)) * page_size


def _power_of_two(count: int) -> int:
    return max(SMALLEST_TABLE, 1 << (count - 1).bit_length())


def _initial_numbers(sizes: Sizes, max_tokens: int, generation: int, entries: int) -> torch.Tensor:
    """`TreeState.numbers` of an empty tree that uses so many entries of its child table."""
    found = torch.zeros(numbers.SIZE, dtype=torch.int64, device="cpu")
    found[numbers.PAGE] = sizes.page
    found[numbers.BIGRAM] = sizes.bigram
    found[numbers.MAX_TOKENS] = max_tokens
    found[numbers.ROW_CAPACITY] = sizes.rows
    found[numbers.POOL_PAGES] = sizes.pages
    found[numbers.GENERATION] = generation
    found[numbers.ROWS] = 1
    found[numbers.TABLE_MASK] = entries - 1
    return found


def allocate(max_tokens: int, page_size: int, bigram: bool, generation: int) -> TreeState:
    """An empty tree's arrays in host memory. Rows that no node has used cost address space, not memory."""
    rows, units = row_capacity(max_tokens, page_size), pool_units(max_tokens, page_size)
    # An insert makes room for two nodes more than it may need, in a table that is at most half full.
    sizes = Sizes(rows, units, page_size, bigram, _power_of_two(2 * (rows + 2)))
    arrays = {name: array.memory(array.on_host(sizes), array.dtype) for name, array in FIELDS.items()}
    state = TreeState(**arrays)
    for name in COLUMNS:
        arrays[name][0] = 0
    state.child_table[:SMALLEST_TABLE] = 0
    state.numbers.copy_(_initial_numbers(sizes, max_tokens, generation, SMALLEST_TABLE))
    return state


def allocate_device(max_tokens: int, page_size: int, bigram: bool, generation: int, device: torch.device) -> TreeState:
    """An empty tree's arrays on a GPU.

    What differs from host memory: each pool has two halves of P units, of which one is in use, filled from its
    beginning, and compaction copies what is live to the other; the child table holds the edge beside the row and has
    room for two entries a pool page, so that entries of evicted nodes can wait for the next compaction.
    """
    rows, units = row_capacity(max_tokens, page_size), pool_units(max_tokens, page_size)
    sizes = Sizes(rows, units, page_size, bigram, _power_of_two(2 * (units // page_size)))
    arrays = {
        name: torch.zeros(array.on_device(sizes), dtype=array.dtype, device=device) for name, array in FIELDS.items()
    }
    state = TreeState(**arrays)
    state.parent[1:] = FREE_ROW
    state.multipliers.copy_(multipliers(len(state.multipliers), torch.int64))
    first = _initial_numbers(sizes, max_tokens, generation, sizes.entries)
    first[numbers.POOL_END] = units
    state.numbers.copy_(first)
    return state
