"""TreeState: the tree as one tuple of flat tensors, the same fields on every device.

A node is a row. Its edge is `length` units from `start` on in the token pool, and ends `end` units from the root. Row 0
is the root, which holds no units. The parent of a top-level node is not a row but `~ns`, where `ns` is the code of its
namespace, so a climb ends at the first negative parent. There are no child lists: one open-addressed table, keyed by
(parent, first page), finds the children. Edges are ranges of a pool, so splitting an edge moves no token.

The annotations of TreeState are the only list of its fields. Allocation on both devices, the kernels' access to the
arrays, `check` and copies all follow from it.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import numpy as np
import torch

from flatradix.layout import numbers

FREE_ROW = -(2**31)
# The pool is larger than the tree may be by 1 / POOL_SLACK. Freed ranges are reused in place, and the slack makes it
# likely that one of them is long enough (bench/RESULTS.md has the compactions with other slacks).
POOL_SLACK = 4
SMALLEST_TABLE = 64


class Sizes(NamedTuple):
    """The numbers that determine the lengths of a tree's arrays. units: of each pool; entries: of the child table."""

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
    """Allocate uninitialised memory, which the system commits when touched. numpy asks for huge pages from 4 MiB on."""
    return torch.from_numpy(np.empty(count, _NUMPY[dtype]))


def zeros(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate zeros, which are also committed when touched: numpy uses calloc, while torch.zeros would write them."""
    return torch.from_numpy(np.zeros(count, _NUMPY[dtype]))


def committed(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate zeros for a pool and touch them now: later, the page faults would dominate the first inserts."""
    found = np.empty(count, _NUMPY[dtype])
    found.fill(0)  # not by torch: its threads do not survive a fork, and a forked child would wait for them forever
    return torch.from_numpy(found)


def multipliers(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw odd numbers, anew for each tree, so that nobody can prepare prompts whose hashes collide."""
    drawn = np.random.default_rng().integers(-(2**63), 2**63, count, dtype=np.int64) | 1
    return torch.from_numpy(drawn).to(dtype)


class Array(NamedTuple):
    """One field: its dtype, its length on each device, how its host memory is allocated, and how CPU kernels see it.

    column: whether the field has a value for each node. address: CPU kernels get an address to calculate with, not a
    typed pointer.
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


def _event_words(sizes: Sizes) -> int:
    return 2 * numbers.EVENT_RING


def _digits(sizes: Sizes) -> int:
    return 1 << numbers.DIGIT_BITS


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
ChildTable = Annotated[torch.Tensor, Array(i64, _entries, _entries_twice)]
Pool = Annotated[torch.Tensor, Array(i32, _units, _units_twice, committed, address=True)]
BigramPool = Annotated[torch.Tensor, Array(i32, _seconds, _seconds_twice, committed, address=True)]
Bitmap = Annotated[torch.Tensor, Array(i64, _page_words, _none, zeros)]
Multipliers = Annotated[torch.Tensor, Array(i64, _page_tokens, _page_tokens, multipliers)]
Digits = Annotated[torch.Tensor, Array(i64, _digits, _none)]
EventRing = Annotated[torch.Tensor, Array(i64, _event_words, _none)]
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
    wanted: Column32  # [R]: wants of this node or of nodes below; an eviction spares wanted nodes as long as it can
    own_wants: Column32  # [R]: soft pins that end exactly here
    hit_count: Column32  # [R]
    tag: Column32  # [R]: hash of (parent, first page), the low 32 bits
    queued: HostColumn8  # [R], on a GPU [0]: 1 while the row has an entry in the eviction queue
    tick: Column64  # [R]: last use
    created: Column64  # [R]: when it was made; negative if it was dropped (layout/dropped.py)
    priority: Column64  # [R]
    generation: Column64  # [R]: goes up when the row is freed, to 0 if it is negative, as that of a loaded node is
    free_rows: Rows32  # [R]: a stack
    queue_score: Queue64  # [2 R], on a GPU [0]: candidates for eviction, a heap [R] and a sorted ring [R]
    queue_tick: Queue64  # [2 R]
    queue_row: Queue32  # [2 R]
    queue_digits: Digits  # [2 ** DIGIT_BITS], on a GPU [0]: counters, with which a radix sort fills the queue anew
    child_table: ChildTable  # [T]: (tag, row), 0 where empty; on a GPU [2 T], each followed by (length, start)
    tokens: Pool  # [P], on a GPU [2 P] as all pools: the first token of each unit
    seconds: BigramPool  # [P], [0] without bigrams: the second token of each unit
    used: Bitmap  # [P / page / 64], on a GPU [0]: one bit for each pool page, 1 if an edge holds it
    namespace_children: Counts32  # [R], by namespace code
    namespace_hash: Rows64  # [R], by namespace code
    released: Rows32  # [R]: namespaces that lost their last node, for the host to forget
    multipliers: Multipliers  # [page], [2 * page] with bigrams: of the multilinear page hash
    events: EventRing  # [2 EVENT_RING], on a GPU [0]: the last changes of the shape of the tree
    numbers: Numbers  # [numbers.SIZE]


FIELDS: dict[str, Array] = {name: hint.__metadata__[0] for name, hint in TreeState.__annotations__.items()}
COLUMNS = tuple(name for name, array in FIELDS.items() if array.column)


def row_capacity(max_tokens: int, page_size: int) -> int:
    """Return how many rows a tree can need: one for each page, and the root."""
    return max_tokens // page_size + 1


def pool_units(max_tokens: int, page_size: int) -> int:
    """Return the units of the token and slot pools: the capacity and a quarter more, in whole pages."""
    pages = max_tokens // page_size
    return (pages + -(-pages // POOL_SLACK)) * page_size


def _power_of_two(count: int) -> int:
    return max(SMALLEST_TABLE, 1 << (count - 1).bit_length())


def _initial_numbers(sizes: Sizes, max_tokens: int, generation: int, entries: int) -> torch.Tensor:
    """Return `TreeState.numbers` of an empty tree that uses `entries` entries of its child table."""
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


def allocate_host(max_tokens: int, page_size: int, bigram: bool, generation: int) -> TreeState:
    """Allocate an empty tree's arrays in host memory. Rows that no node has used cost address space, not memory."""
    rows, units = row_capacity(max_tokens, page_size), pool_units(max_tokens, page_size)
    # An insert grows the table for two nodes more, whether it needs them or not, and keeps it at most half full.
    sizes = Sizes(rows, units, page_size, bigram, _power_of_two(2 * (rows + 2)))
    arrays = {name: array.memory(array.on_host(sizes), array.dtype) for name, array in FIELDS.items()}
    state = TreeState(**arrays)
    for name in COLUMNS:
        arrays[name][0] = 0
    state.child_table[:SMALLEST_TABLE] = 0
    state.numbers.copy_(_initial_numbers(sizes, max_tokens, generation, SMALLEST_TABLE))
    return state


def allocate_device(max_tokens: int, page_size: int, bigram: bool, generation: int, device: torch.device) -> TreeState:
    """Allocate an empty tree's arrays on a GPU.

    Two things differ from host memory. Each pool has two halves of P units: one is in use and fills from its beginning,
    and compaction copies the live units to the other. The child table holds the edge beside the row, and has at least
    two entries for each pool page, so that entries of evicted nodes can stay until the next compaction.
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
