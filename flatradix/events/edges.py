"""Edges: the nodes of a tree at one moment, the blocks that end on each, and what differs from an earlier moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flatradix.events.blocks import Block, Hash, HashFunction, RootFunction
from flatradix.inspect.content import Content
from flatradix.layout import numbers
from flatradix.layout.handles import GENERATION_MASK
from flatradix.layout.state import FREE_ROW


class Rows(NamedTuple):
    """The columns of a tree's rows that tell which node is there, [R] each, and the first generation.

    Views, valid during the call that reads the tree. What was dropped counts as gone: no look-up finds it.
    """

    parents: np.ndarray
    generations: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    created: np.ndarray
    first: int

    def live(self) -> np.ndarray:
        """Return int64 [N]: the rows that hold a node."""
        return 1 + np.flatnonzero((self.parents[1:] != FREE_ROW) & (self.created[1:] >= 0))

    def nodes(self, rows: np.ndarray) -> Nodes:
        """Return the nodes on some rows, of which some may be beyond the last row here."""
        inside = np.minimum(rows, len(self.parents) - 1)
        there = (self.parents[inside] != FREE_ROW) & (self.created[inside] >= 0) & (rows == inside) & (rows > 0)
        ends = np.where(there, self.ends[inside], 0)
        starts = ends - np.where(there, self.lengths[inside], 0)
        generations = (self.generations[inside] + self.first) & GENERATION_MASK
        return Nodes(np.where(there, generations, -1), starts, ends)


class Nodes(NamedTuple):
    """The nodes on some rows, int64 [N] each: the generation, -1 without a node, and where the edge begins and ends."""

    generations: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def of(self, rows: np.ndarray) -> Nodes:
        """Return the nodes on some rows, of nodes on all rows. Beyond the last row there are none."""
        inside = np.minimum(rows, len(self.starts) - 1)
        there = rows == inside
        return Nodes(
            np.where(there, self.generations[inside], -1),
            np.where(there, self.starts[inside], 0),
            np.where(there, self.ends[inside], 0),
        )

    def replaced(self, rows: np.ndarray, nodes: Nodes) -> Nodes:
        """Replace the nodes on some rows, of nodes on all rows, in place where there is room. May be done again."""
        found = self
        if len(rows) and rows[-1] >= len(self.starts):
            more = max(int(rows[-1]) + 1, 2 * len(self.starts)) - len(self.starts)
            found = Nodes(*(np.append(column, np.full(more, -1)) for column in self))
        for column, values in zip(found, nodes, strict=True):
            column[rows] = values
        return found


class Changed(NamedTuple):
    """The rows that differ, int64 [N], rising, and their nodes then and now."""

    rows: np.ndarray
    old: Nodes
    new: Nodes


FIELDS = frozenset(  # that are read here
    ("parent", "generation", "end", "length", "created", "start", "tokens", "seconds")
)
NO_NODES = Nodes(np.full(1, -1), np.full(1, -1), np.full(1, -1))


def changed_rows(content: Content, seen: int) -> np.ndarray | None:
    """Return the rows on which a node came, went or changed since event number `seen`, rising; None if unknown.

    O(events). Unknown on a GPU, which writes no events, after more events than are kept, after a reset, and after
    a drop that hides locked nodes.
    """
    count = content.number(numbers.EVENTS)
    if not content.is_on_host or not 0 <= count - seen <= numbers.EVENT_RING:
        return None
    places = 2 * (np.arange(seen, count) % numbers.EVENT_RING)
    first, second = content.state.events[places], content.state.events[places + 1]
    kinds = first >> 32
    if (kinds == numbers.ALL_FREED).any():
        return None
    told = np.where(kinds == numbers.LEAF, second >> 32, first.astype(np.int32))
    return np.unique(np.append(told, second[kinds == numbers.CUT] >> 32))


def difference(old: Nodes, rows: Rows, among: np.ndarray | None) -> Changed:
    """Return the rows that differ from `old`, the nodes on all rows before. among: the rows that may; None is all."""
    if among is None:  # there may be fewer rows than before
        among = np.arange(max(len(old.starts), len(rows.parents)))
    before, now = old.of(among), rows.nodes(among)
    differs = np.zeros(len(among), np.bool_)
    for left, right in zip(before, now, strict=True):
        differs |= left != right
    gone = (before.generations < 0) & (now.generations < 0)
    at = np.flatnonzero(differs & ~gone)
    return Changed(among[at], Nodes(*(column[at] for column in before)), Nodes(*(column[at] for column in now)))


class Edges:
    """The keys of a tree's nodes, read in one call of the tree. size: units in a block."""

    def __init__(self, content: Content, size: int, hash_of: HashFunction, root_of: RootFunction) -> None:
        self.rows = Rows(
            content.column("parent"),
            content.column("generation"),
            content.column("end"),
            content.column("length"),
            content.column("created"),
            content.number(numbers.GENERATION),
        )
        self.size = size
        self._pool_starts = content.column("start")
        self._tokens = content.state.tokens
        self._seconds = content.state.seconds if content.options.bigram else None
        self._name_of = content.name_of
        self._hash_of, self._root_of = hash_of, root_of
        self._roots: dict[int, Any] = {}
        self._codes: dict[int, int] = {}

    def by_end(self, rows: Iterable[int]) -> list[int]:
        """Return rows in an order in which parents come before their children."""
        ends = self.rows.ends
        return sorted(rows, key=lambda row: (int(ends[row]), row))

    def live(self) -> list[int]:
        """Return the rows that hold a node."""
        return self.rows.live().tolist()

    def above(self, row: int) -> int:
        """Return the row above, at most 0 at the top."""
        return int(self.rows.parents[row])

    def range(self, row: int) -> tuple[int, int]:
        """Return where the edge of a row begins and ends, counted from the root."""
        end = int(self.rows.ends[row])
        return end - int(self.rows.lengths[row]), end

    def _code(self, row: int) -> int:
        """Return the namespace code of a row, noted for the rows below."""
        above = row
        while above > 0 and above not in self._codes:
            above = self.above(above)
        self._codes[row] = code = self._codes[above] if above > 0 else ~above
        return code

    def _root(self, code: int) -> Any:
        if code not in self._roots:
            self._roots[code] = self._root_of(self._name_of(code))
        return self._roots[code]

    def tokens(self, row: int) -> list[np.ndarray]:
        """Return the tokens of each block that ends on the edge of a row, copies."""
        size, pool = self.size, self._pool_starts
        start, end = self.range(row)
        begin, end = start // size * size, end // size * size
        if end == begin:
            return []
        last = int(pool[row]) + end - start
        parts = [] if self._seconds is None else [self._seconds[last - 1 : last]]
        parts.append(self._tokens[int(pool[row]) : last])
        while start > begin:
            row, until = self.above(row), start
            start = self.range(row)[0]
            at = int(pool[row])
            parts.append(self._tokens[at + max(begin - start, 0) : at + until - start])
        key = np.concatenate(parts[::-1])
        width = size + (self._seconds is not None)
        return [key[at : at + width] for at in range(0, end - begin, size)]

    def blocks(self, row: int, hashes: Mapping[int, list[Hash]], known: list[Hash] | None = None) -> list[Block]:
        """Return the blocks that end on the edge of a row.

        hashes: those of the rows above. known: those of this row; without them they are computed.
        """
        tokens = self.tokens(row)
        if not tokens:
            return []
        code, parent = self._code(row), self._last_above(row, hashes)
        name = self._name_of(code)
        chain = self._root(code) if parent is None else parent
        found: list[Block] = []
        for at, own in enumerate(tokens):
            chain = self._hash(chain, own) if known is None else known[at]
            found.append(Block(chain, parent, own, name))
            parent = chain
        return found

    def _hash(self, parent: Any, tokens: np.ndarray) -> Hash:
        found = self._hash_of(parent, tokens)
        if not isinstance(found, int | bytes | str):
            raise ValueError(f"the hash of a block must be an int, bytes or a str, not {type(found).__name__}")
        return found

    def _last_above(self, row: int, hashes: Mapping[int, list[Hash]]) -> Hash | None:
        """Return the hash of the last block that ends above the edge of a row; None if there is none."""
        row = self.above(row)
        while row > 0:
            if hashes[row]:
                return hashes[row][-1]
            row = self.above(row)
        return None

    def part(self, old: list[Hash], old_start: int, row: int) -> list[Hash]:
        """Return the hashes of the blocks that end on the edge of a row.

        old: those of an edge from `old_start` on, of which this edge was a part.
        """
        start, end = self.range(row)
        before = old_start // self.size
        return old[start // self.size - before : end // self.size - before]
