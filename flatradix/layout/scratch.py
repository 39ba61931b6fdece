"""Scratch: what the kernels of a GPU keep beside a TreeState, with a name for each use. Used as `scratch.ARRIVED`."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Places in `Scratch.counters`, eight apart so that counters that many programs add to share no cache sector.
ARRIVED = 0  # programs of the launch that are done
WAITING = 8  # programs that have come to a barrier
ERROR = 16  # the first refusal of the call: 64 * query - reason, or NO_ERROR
NEWLY = 24  # tokens that became protected, or evictable
CUTS = 32  # whether queries end inside edges, which are to be cut
OPEN = 40  # queries of an insert whose new part is not settled; one place for each parity of the round
NEEDED = 56  # units that an insert stores
COMPACT = 64  # whether the pools must be compacted
COUNT = 80  # of the queries that cut
TOTAL = 88
HINT = 96  # three words that an eviction leaves for the next: a guess
STARTED = 104  # the call whose first launch of two was done last, negative if it unlocks
COUNTERS = 128
NO_ERROR = 1 << 62

PARTIALS = 8192
MOST_PROGRAMS = PARTIALS // 2

# Rows of `Scratch.query`, one column a query.
(Q_ROW, Q_CUT, Q_LIST, Q_PLACE, Q_FIRST, Q_ABOVE, Q_BELOW, Q_SAME, Q_PASS, Q_LAST, Q_NEW, Q_EDGE, Q_AT, Q_BEGIN,
 Q_END, Q_OPEN, Q_GROUP, Q_ROUND, Q_LEAF, Q_OFFSET) = range(20)  # fmt: skip
QUERY_COLUMNS = 20

HINTS = 8  # rows above each row that `Scratch.above` knows, 32 bytes


class Scratch(NamedTuple):
    """Tensors beside a state: only `entry`, zeros and hints outlive a call.

    R rows, B queries of the largest batch so far, C places of a table of claims. Two pairs share their memory, as no
    call uses both of a pair: `old_tick` and `tokens_before`, `eviction_key` and `old_start`.
    """

    entry: torch.Tensor  # int32 [R]: where the row's entry stands in the child table
    old_tick: torch.Tensor  # int64 [R]: the tick from before the call, of the rows that the call touched
    tokens_before: torch.Tensor  # int64 [R]: of each victim of an eviction: the tokens of those before it
    above: torch.Tensor  # int32 [HINTS * R]: the rows above each row as last seen, 0 where none is
    eviction_key: torch.Tensor  # int64 [R]: what eviction orders by, with other policies than lru
    old_start: torch.Tensor  # int64 [R]: during a compaction, (units before the edge << 32 | where it began before)
    counters: torch.Tensor  # int64 [COUNTERS]: shared by the programs of a launch
    partial: torch.Tensor  # int64 [PARTIALS]: sums of single programs
    query: torch.Tensor  # int32 [QUERY_COLUMNS, B]
    value: torch.Tensor  # int64 [B]: a number for the message of a refusal
    claims: torch.Tensor  # int32 [2, C]: the lowest query of each group, -1 where nobody is
    victims: torch.Tensor  # int32 [2, R]: rows that an eviction takes
    mail: torch.Tensor  # int64 [mail.SIZE]: in pinned memory, where kernels leave numbers for the host

    @property
    def batch(self) -> int:
        """Queries of the largest batch that it serves."""
        return int(self.value.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes, memory that is shared counted once."""
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in self if tensor.nbytes}.values())


def allocate_scratch(rows: int, mail: torch.Tensor, device: torch.device) -> Scratch:
    """For a tree of so many rows, and no batch at all."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    ticks_or_tokens, keys_or_starts = zeros(rows), zeros(rows)
    counters = zeros(COUNTERS)
    counters[ERROR] = NO_ERROR
    return Scratch(
        entry=zeros(rows, dtype=torch.int32),
        old_tick=ticks_or_tokens,
        tokens_before=ticks_or_tokens,
        above=zeros(HINTS * rows, dtype=torch.int32),
        eviction_key=keys_or_starts,
        old_start=keys_or_starts,
        counters=counters,
        partial=zeros(PARTIALS),
        query=zeros(0, dtype=torch.int32),
        value=zeros(0),
        claims=zeros(0, dtype=torch.int32),
        victims=zeros(2, rows, dtype=torch.int32),
        mail=mail,
    )


def enlarge(scratch: Scratch, batch: int) -> Scratch:
    """The same for batches of up to so many queries, a power of two: what depends on that is made anew."""
    device = scratch.value.device
    return scratch._replace(
        query=torch.zeros((QUERY_COLUMNS, batch), dtype=torch.int32, device=device),
        value=torch.zeros(batch, dtype=torch.int64, device=device),
        claims=torch.full((2, 4 * batch), -1, dtype=torch.int32, device=device),
    )


def clean(scratch: Scratch) -> None:
    """Leave nothing of a call that was interrupted between its launches; nothing may be under way."""
    scratch.counters.zero_()
    scratch.counters[ERROR] = NO_ERROR
    scratch.claims.fill_(-1)
