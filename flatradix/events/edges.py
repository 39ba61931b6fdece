"""Edges: the nodes of a tree at one moment, and the blocks that end on each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from flatradix.events.blocks import Block, Hash, HashFunction, RootFunction
from flatradix.inputs.namespaces import Namespace
from flatradix.inspect.content import Content
from flatradix.layout import numbers
from flatradix.layout.handles import GENERATION_MASK
from flatradix.layout.state import FREE_ROW


class Rows(NamedTuple):
    """The rows of a tree, int64 [R] each.

    generations: -1 where there is no node. starts, ends: the lengths from the root where the edge begins and ends.
    """

    generations: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


NO_ROWS = Rows(*(np.empty(0, np.int64) for _ in range(3)))


def rows_of(content: Content) -> Rows:
    """Return copies of what a later look compares. O(rows)."""
    there = content.column("parent") != FREE_ROW
    there[:1] = False
    generations = (content.column("generation") + content.number(numbers.GENERATION)) & GENERATION_MASK
    ends = np.where(there, content.column("end"), np.int64(0))
    starts = np.where(there, ends - content.column("length"), 0)
    return Rows(np.where(there, generations, -1), starts, ends)


def aligned(old: Rows, new: Rows) -> tuple[Rows, Rows]:
    """Return both with as many rows as the longer one. There may be fewer rows than before, after a reset."""
    most = max(len(old.generations), len(new.generations))
    both = []
    for rows in (old, new):
        more = most - len(rows.generations)
        generations = np.pad(rows.generations, (0, more), constant_values=-1)
        both.append(Rows(generations, np.pad(rows.starts, (0, more)), np.pad(rows.ends, (0, more))))
    return both[0], both[1]


class Edges:
    """The keys of a tree's nodes, read in one call of the tree. size: units in a block."""

    def __init__(self, content: Content, size: int, hash_of: HashFunction, root_of: RootFunction) -> None:
        self.parents = content.column("parent")
        self.rows = rows_of(content)
        self.size = size
        self._pool_starts = content.column("start")
        self._tokens = content.state.tokens
        self._seconds = content.state.seconds if content.options.bigram else None
        self._names = content.names
        self._hash_of, self._root_of = hash_of, root_of

    def by_end(self, rows: Iterable[int]) -> list[int]:
        """Return rows in an order in which parents come before their children."""
        ends = self.rows.ends
        return sorted(rows, key=lambda row: (int(ends[row]), row))

    def namespace(self, row: int) -> Namespace:
        while row > 0:
            row = int(self.parents[row])
        return self._name_of[~row]

    @cached_property
    def _name_of(self) -> dict[int, Namespace]:
        return dict(self._names)

    def tokens(self, row: int) -> list[np.ndarray]:
        """Return the tokens of each block that ends on the edge of a row, copies."""
        size, starts, ends = self.size, self.rows.starts, self.rows.ends
        begin, end = int(starts[row]) // size * size, int(ends[row]) // size * size
        if end == begin:
            return []
        pool, first = self._pool_starts, int(starts[row])
        last = int(pool[row]) + end - first
        parts = [] if self._seconds is None else [self._seconds[last - 1 : last]]
        parts.append(self._tokens[int(pool[row]) : last])
        while first > begin:
            row = int(self.parents[row])
            at, until = int(pool[row]), int(pool[row]) + first - int(starts[row])
            first = int(starts[row])
            parts.append(self._tokens[max(at, at + begin - first) : until])
        key = np.concatenate(parts[::-1])
        extra = self._seconds is not None
        return [key[at : at + size + extra] for at in range(0, end - begin, size)]

    def blocks(self, row: int, hashes: Mapping[int, list[Hash]], known: list[Hash] | None = None) -> list[Block]:
        """Return the blocks that end on the edge of a row.

        hashes: those of the rows above. known: those of this row; without them they are computed.
        """
        found: list[Block] = []
        tokens = self.tokens(row)
        if not tokens:
            return found
        name, parent = self.namespace(row), self._last_above(row, hashes)
        chain = self._root_of(name) if parent is None else parent
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
        row = int(self.parents[row])
        while row > 0:
            if hashes[row]:
                return hashes[row][-1]
            row = int(self.parents[row])
        return None

    def part(self, old: list[Hash], old_start: int, row: int) -> list[Hash]:
        """Return the hashes of the blocks that end on the edge of a row.

        old: those of an edge from `old_start` on, of which this edge was a part.
        """
        first, before = int(self.rows.starts[row]) // self.size, old_start // self.size
        return old[first - before : int(self.rows.ends[row]) // self.size - before]
