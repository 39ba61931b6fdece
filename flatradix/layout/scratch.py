"""Scratch: the tensors that GPU kernels keep beside a TreeState, and the names of their words and rows.

The names are used as `scratch.ARRIVED`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Indices into `Scratch.counters`. Counters that many programs add to are eight words apart, to share no cache sector.
ARRIVED = 0  # programs of the launch that have finished; from bit 32 on, those with a bad query
WAITING = 8  # programs of the launch that have reached a barrier
ERROR = 16  # the first refusal of the call: 64 * query - reason, or NO_ERROR
MOVED_TOKENS = 24  # tokens that the call made protected, or evictable
CUTS = 32  # above 0 if queries end inside edges, which must be cut
OPEN = 40  # queries of an insert whose new part is not settled; its rounds use two words in turn
SELECTED = 48  # three words that a selection leaves: the tokens of the victims, how many there are, the tokens wanted
NEW_UNITS = 56  # units that an insert stores
COMPACT = 64  # 1 if the pools must be compacted
CUT_COUNT = 80  # queries that cut; in an unlock, above 0 if a row has fewer locks than unlocks
NEW_ROWS = 88  # nodes that the call makes
EVICTION_HINT = 96  # three words that an eviction leaves as a guess for the next one
STARTED = 104  # the last call whose first launch of two has run, negative if it unlocks
TOLD = 112  # places of waiting prompts that were written to pinned memory; only its order with these is of use
EPOCH = 120  # long matches so far, modulo 2**31: what tells the words of one launch from those of others
COUNTERS = 128
NO_ERROR = 1 << 62

PARTIALS = 8192
WORK_WORDS = 8704
MOST_PROGRAMS = PARTIALS // 2

# Rows of `Scratch.query`, which has one column per query.
Q_ROW = 0  # the row on whose edge the query ends
Q_CUT = 1  # the path length at which the query cuts that edge, 0 where it cuts nothing
Q_LIST = 2  # the queries that cut, in batch order; Q_FIRST to Q_NEW are indexed by positions in this list
Q_POSITION = 3  # the position of a query in Q_LIST
Q_FIRST = 4  # the first position with the same cut
Q_ABOVE = 5  # the first position with the next cut above on the same edge, -1 where there is none
Q_BELOW = 6  # 1 where the edge has a cut below, else 0
Q_SAME = 7  # how many queries have the same cut
Q_PASS = 8  # how many queries cut the edge here or below
Q_LAST = 9  # the last of these queries
Q_NEW = 10  # the row of the piece above the cut
# Of an insert:
Q_EDGE = 11  # the row that the walk reached, or the row capacity plus the query whose new leaf it reached
Q_AT = 12  # the path length that was cached before
Q_BEGIN = 13  # the path length at which the key begins
Q_END = 14  # the path length at which the key ends
Q_OPEN = 15  # 1 while the owner of the query's new part is not known
Q_GROUP = 16  # the index of the query's group in the table of claims
Q_ROUND = 17  # the round in which the query entered its group
Q_LEAF = 18  # the row of the query's new leaf, -1 where it makes none
Q_OFFSET = 19  # new units of the queries before
Q_DROPPED = 20  # 1 if the query continues from a dropped place
QUERY_COLUMNS = 21

# `Scratch.anchors` has a bucket of ANCHOR_WAYS entries for each TOKENS_A_BUCKET tokens that the tree may hold, or more.
# An anchor is noted every 512 tokens or so, so half of the entries are in use in a full tree.
ANCHOR_WAYS = 4
TOKENS_A_BUCKET = 1024
FEWEST_BUCKETS = 64
CHUNK_WORDS = 1 << 16  # chunks of all keys of a long match
EPOCH_MASK = 0x7FFFFFFF

ANCESTORS = 8  # how many rows above each row `Scratch.above` holds: 32 bytes


class Scratch(NamedTuple):
    """Tensors beside a state. From call to call, only `entry`, hints and cleared words keep their meaning.

    R rows, B queries of the largest batch so far, C entries of each table of claims. `old_tick` shares its memory with
    `tokens_before`, and `eviction_key` with `old_start`: no call uses both of a pair.
    """

    entry: torch.Tensor  # int32 [R]: the index of the row's entry in the child table
    old_tick: torch.Tensor  # int64 [R]: for the rows that the call touched, the tick from before the call
    tokens_before: torch.Tensor  # int64 [R]: for each victim of an eviction, the tokens of the victims before it
    above: torch.Tensor  # int32 [ANCESTORS * R]: hints, the rows above each row as last seen, 0 where there is none
    eviction_key: torch.Tensor  # int64 [R]: the key by which policies other than lru order the victims
    old_start: torch.Tensor  # int64 [R]: in a compaction, (units on the edges before << 32 | old start of the edge)
    counters: torch.Tensor  # int64 [COUNTERS]: shared by the programs of a launch
    partial: torch.Tensor  # int64 [PARTIALS]: sums or extreme keys of single programs
    work: torch.Tensor  # int64 [WORK_WORDS]: counts and sums of a selection of victims (`kernels/gpu/evict_bins.py`)
    query: torch.Tensor  # int32 [QUERY_COLUMNS, B]
    value: torch.Tensor  # int64 [B]: a number for the message of a refusal
    claims: torch.Tensor  # int32 [2, C]: two hash tables with the lowest query of each group, -1 where empty
    anchors: torch.Tensor  # int64 [ANCHOR_WAYS * 2**k]: hints, where prefixes of long keys end (kernels/gpu/anchors.py)
    words: torch.Tensor  # int64 [4, CHUNK_WORDS]: what the programs of a long match tell one another of each chunk
    victims: torch.Tensor  # int32 [2, R]: the rows that an eviction frees, and the rows that it may free
    mail: torch.Tensor  # int64 [mail.SIZE]: pinned memory, in which kernels leave numbers for the host

    @property
    def batch(self) -> int:
        """The largest batch for which the arrays suffice."""
        return int(self.value.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors. Shared memory counts once."""
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in self if tensor.nbytes}.values())


def allocate_scratch(rows: int, max_tokens: int, mail: torch.Tensor, device: torch.device) -> Scratch:
    """Allocate scratch for a tree of `rows` rows, with nothing per query yet: `enlarge` adds that."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    ticks_or_tokens, keys_or_starts = zeros(rows), zeros(rows)
    counters = zeros(COUNTERS)
    counters[ERROR] = NO_ERROR
    return Scratch(
        entry=zeros(rows, dtype=torch.int32),
        old_tick=ticks_or_tokens,
        tokens_before=ticks_or_tokens,
        above=zeros(ANCESTORS * rows, dtype=torch.int32),
        eviction_key=keys_or_starts,
        old_start=keys_or_starts,
        counters=counters,
        partial=zeros(PARTIALS),
        work=zeros(WORK_WORDS),
        query=zeros(0, dtype=torch.int32),
        value=zeros(0),
        claims=zeros(0, dtype=torch.int32),
        anchors=zeros(ANCHOR_WAYS << max(max_tokens // TOKENS_A_BUCKET, FEWEST_BUCKETS - 1).bit_length()),
        words=zeros(4, CHUNK_WORDS),
        victims=zeros(2, rows, dtype=torch.int32),
        mail=mail,
    )


def enlarge(scratch: Scratch, batch: int) -> Scratch:
    """Return scratch for batches of up to `batch` queries, a power of two. Only the tensors per query are new."""
    device = scratch.value.device
    return scratch._replace(
        query=torch.zeros((QUERY_COLUMNS, batch), dtype=torch.int32, device=device),
        value=torch.zeros(batch, dtype=torch.int64, device=device),
        claims=torch.full((2, 4 * batch), -1, dtype=torch.int32, device=device),
    )


def clean(scratch: Scratch) -> None:
    """Clear what a call left that was interrupted between its launches. No kernel may be running."""
    scratch.counters.zero_()
    scratch.counters[ERROR] = NO_ERROR
    scratch.words.zero_()  # the counter of epochs begins anew
    scratch.claims.fill_(-1)
