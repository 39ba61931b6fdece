"""Victims: what an eviction freed, as the callback `on_evict` of a tree gets it.

The keys are copied when the nodes are freed, each edge once. So a call that was interrupted, or a callback that raised,
loses nothing: the next eviction tells the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.options import OnEvict

Reader = Callable[[list[int], list[int]], list[np.ndarray]]


class Edge(NamedTuple):
    """An edge as it was before the eviction. parent: a row, or ~namespace. start, length: its range of the pools."""

    parent: int
    start: int
    length: int


class Freed(NamedTuple):
    """What an eviction freed, and how to read the tree.

    call: the number of the eviction. rows: of the victims, in order. tail: tokens that the last of them lost, if it
    keeps others, else 0. edge_of: returns the edge of a victim or of a node above. read_tokens, read_seconds: return
    copies of the first or second tokens of pool ranges, given their starts and lengths; the second only with bigrams.
    name_of: returns the name of a namespace code. slots: all freed slots, in order. slot_device: where to return them;
    None is where they are.
    """

    call: int
    rows: list[int]
    tail: int
    edge_of: Callable[[int], Edge]
    read_tokens: Reader
    read_seconds: Reader | None
    name_of: Callable[[int], Namespace]
    slots: torch.Tensor
    slot_device: torch.device | None = None


def _with_all_above(rows: Iterable[int], edge_of: Callable[[int], Edge]) -> dict[int, Edge]:
    """Return the edges of rows and of all rows above them."""
    edges: dict[int, Edge] = {}
    for row in rows:
        while row > 0 and row not in edges:
            edges[row] = edge_of(row)
            row = edges[row].parent
    return edges


class Victims:
    """The victims of one eviction, in order. told: how many of them the callback knows."""

    def __init__(self, freed: Freed) -> None:
        """Copy what the victims were. O(tokens on their paths, each edge once)."""
        edges = _with_all_above(freed.rows, freed.edge_of)
        starts, lengths = ([edge[at] for edge in edges.values()] for at in (1, 2))
        tokens = freed.read_tokens(starts, lengths)
        self.call = freed.call
        self.told = 0
        self._rows = freed.rows
        self._edges = edges
        self._tokens = dict(zip(edges, tokens, strict=True))
        self._last: list[np.ndarray] | None = None  # with bigrams, the last token of each victim's key
        if freed.read_seconds is not None:
            ends = [edges[row].start + edges[row].length - 1 for row in freed.rows]
            self._last = freed.read_seconds(ends, [1] * len(ends))
        self._names = {edge.parent: freed.name_of(~edge.parent) for edge in edges.values() if edge.parent < 0}
        counts = [edges[row].length for row in freed.rows]
        if freed.tail:
            counts[-1] = freed.tail
        self._ends = list(accumulate(counts))
        self._slots = freed.slots if freed.slot_device is None else freed.slots.to(freed.slot_device)

    @property
    def is_told(self) -> bool:
        return self.told == len(self._rows)

    def at(self, number: int) -> tuple[Namespace, np.ndarray, torch.Tensor]:
        """Return the namespace, the key and the slots of one victim."""
        row = self._rows[number]
        parts = [] if self._last is None else [self._last[number]]
        while row > 0:
            parts.append(self._tokens[row])
            row = self._edges[row].parent
        begin = self._ends[number - 1] if number else 0
        key = np.concatenate(parts[::-1])  # a copy, which the callback may keep or change
        return self._names[row], key, self._slots[begin : self._ends[number]]

    def drop(self) -> None:
        """Free the copies of keys, when all victims are told."""
        self._tokens = {}
        self._slots = self._slots[:0]


class Listener:
    """Tells a callback the victims of evictions, each once, in order."""

    def __init__(self, callback: OnEvict) -> None:
        self._callback = callback
        self._noted: tuple[Victims, ...] = ()

    def begin(self) -> None:
        """Begin an eviction: forget what the callback knows."""
        self._noted = tuple(victims for victims in self._noted if not victims.is_told)

    def note(self, freed: Freed) -> None:
        """Note the victims of an eviction, unless that is done already."""
        if freed.rows and all(victims.call != freed.call for victims in self._noted):
            self._noted = (*self._noted, Victims(freed))

    def tell(self) -> None:
        """Call the callback for each victim that it does not know.

        An Exception of the callback stops nothing: the first is raised when all victims are told. Any other error, as
        that of a signal handler, goes out at once: `tell` then begins anew with the victim that was under way.
        """
        failed: Exception | None = None
        for victims in self._noted:
            while not victims.is_told:
                arguments = victims.at(victims.told)
                try:
                    self._callback(*arguments)
                except Exception as error:
                    failed = failed or error
                victims.told += 1
            victims.drop()
        if failed is not None:
            raise failed

    def forget(self) -> None:
        """Forget all victims: the tree was reset."""
        self._noted = ()


def listener_of(callback: OnEvict | None) -> Listener | None:
    return None if callback is None else Listener(callback)
