"""Prompts: the waiting prompts of a queue in host memory, their tokens in one pool, and what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.inputs.namespaces import Key, Namespace, key_of, name_of
from flatradix.inputs.sequences import Batch, Buffer, address_of
from flatradix.kernels import cpu
from flatradix.layout import numbers, waiting
from flatradix.layout.numbers import MAX_UNITS
from flatradix.layout.state import COLUMNS, TreeState, allocate_host, multipliers
from flatradix.layout.waiting import Waiting, allocate_waiting, enlarge_waiting

_FEWEST_UNITS = 1 << 12
_FEWEST_GONE = 1 << 16  # tokens of prompts that left for which a tidying pays


class _Columns(NamedTuple):
    """The columns of a queue, in one piece: an interruption sees all of the old or all of the new."""

    arrays: Waiting
    table: np.ndarray
    address: int
    counts: memoryview


class _Forest(NamedTuple):
    state: TreeState
    table: np.ndarray
    address: int


class Prompts:
    """The prompts that wait, and the tree of prompts (see kernels/cpu/prompts.py). Grows as needed.

    arrays: the columns. spaces: the number of each namespace that was used, by `key_of` its name.
    """

    def __init__(self, page: int, bigram: bool, rows: int, left: int) -> None:
        """rows: the row capacity of the tree that is watched, 0 if none is. left: tokens that no match covers."""
        self._left = left
        self._page = page
        self._bigram = bigram
        self.spaces: dict[Key, int] = {}
        self.names_version = 0  # different after each change of `spaces`
        self._free_spaces: list[int] = []
        self._set_arrays(allocate_waiting(rows))
        self._set_forest(self._new_forest(_FEWEST_UNITS))

    # Memory

    def _set_arrays(self, arrays: Waiting, table: np.ndarray | None = None) -> None:
        table = cpu.waiting_table(arrays) if table is None else table
        self._columns = _Columns(arrays, table, address_of(table), memoryview(arrays.counts.data))

    @property
    def arrays(self) -> Waiting:
        return self._columns.arrays

    @property
    def address(self) -> int:
        """The address of the table of `arrays`."""
        return self._columns.address

    def _new_forest(self, units: int) -> TreeState:
        forest = allocate_host(max(units, self._page) // self._page * self._page, self._page, False, 0)
        count = self._page * (1 + self._bigram)
        forest = forest._replace(multipliers=multipliers(count, forest.multipliers.dtype))
        forest.numbers[numbers.BIGRAM] = self._bigram
        # There can be as many nodes as pages, so the slack of the pool is left unused.
        forest.numbers[numbers.POOL_PAGES] = forest.numbers[numbers.MAX_TOKENS] // self._page
        return forest

    def _set_forest(self, forest: TreeState) -> None:
        table = cpu.address_table(forest)
        # The second token of a unit is the token behind the first: prompts lie in one piece.
        table[TreeState._fields.index("seconds")] = forest.tokens.data_ptr() + 4
        self._tree = _Forest(forest, table, address_of(table))

    @property
    def _forest(self) -> TreeState:
        return self._tree.state

    @property
    def pool(self) -> int:
        """The address of the tokens, int32."""
        return self._forest.tokens.data_ptr()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays) + sum(tensor.nbytes for tensor in self._forest)

    def __len__(self) -> int:
        return self._columns.counts[waiting.LIVE]

    def _ensure_entries(self, more: int) -> None:
        needed = self._columns.counts[waiting.LIVE] + more + 1
        if needed > len(self.arrays.id):
            larger = enlarge_waiting(self.arrays, 1 << (needed - 1).bit_length())
            table = cpu.waiting_table(larger)
            cpu.enter_keys(address_of(table))
            self._set_arrays(larger, table)  # last: a call that is cut short before has changed nothing

    def ensure_rows(self, rows: int) -> None:
        """Have as many rows as the tree that is watched, which may grow."""
        had = self.arrays.at_row
        if rows > len(had):
            at_row = np.zeros(rows, had.dtype)
            at_row[: len(had)] = had
            self._set_arrays(self.arrays._replace(at_row=at_row))

    def _enlarge_forest(self, more: int) -> None:
        """Make space for at least `more` units in one piece."""
        old = self._forest
        had = int(old.numbers[numbers.MAX_TOKENS])
        if had + more > MAX_UNITS:
            raise ValueError(f"a queue holds at most {MAX_UNITS} tokens of waiting prompts; {had} are taken")
        new = self._new_forest(min(max(2 * had, had + more), MAX_UNITS))
        rows, free = int(old.numbers[numbers.ROWS]), int(old.numbers[numbers.FREE_ROWS])
        lengths = dict.fromkeys(COLUMNS, rows) | {"tokens": had, "used": len(old.used), "free_rows": free}
        for name, count in lengths.items():
            getattr(new, name).numpy()[:count] = getattr(old, name).numpy()[:count]
        new.multipliers.copy_(old.multipliers)
        kept = new.numbers[[numbers.MAX_TOKENS, numbers.ROW_CAPACITY, numbers.POOL_PAGES]]
        new.numbers.copy_(old.numbers)
        new.numbers[[numbers.MAX_TOKENS, numbers.ROW_CAPACITY, numbers.POOL_PAGES]] = kept
        table = cpu.address_table(new)
        cpu.enter_rows(address_of(table), int(old.numbers[numbers.TABLE_MASK]) + 1)
        self._set_forest(new)

    # Namespaces

    def spaces_of(self, names: Sequence[Namespace]) -> np.ndarray:
        """Return the number of each namespace, int64 [B]. New ones get one that no waiting prompt has."""
        keys = [key_of(name) for name in names]
        new = [key for key in dict.fromkeys(keys) if key not in self.spaces]
        if new:
            self.names_version += 1
            if len(new) > len(self._free_spaces):
                self._forget_spaces(set(keys), len(new))
            for key in new:
                space = self._free_spaces.pop()
                self.arrays.codes[space] = numbers.UNKNOWN_NAMESPACE
                self.spaces[key] = space
        return np.array([self.spaces[key] for key in keys], np.int64)

    def names(self) -> dict[int, Namespace]:
        """Return the namespace of each space."""
        return {space: name_of(key) for key, space in self.spaces.items()}

    def _forget_spaces(self, kept: set[Key], more: int) -> None:
        """Free the numbers of namespaces without prompts, except `kept`; make arrays for at least `more` numbers."""
        in_space = self.arrays.in_space
        self.spaces = {key: space for key, space in self.spaces.items() if key in kept or in_space[space] > 0}
        spaces = len(in_space)
        while spaces < 2 * len(self.spaces) + more:
            spaces *= 2
        if spaces > len(in_space):
            codes, counts = np.zeros(spaces, np.int64), np.zeros(spaces, np.int32)
            codes[: len(in_space)], counts[: len(in_space)] = self.arrays.codes, in_space
            self._set_arrays(self.arrays._replace(codes=codes, in_space=counts))
        self._free_spaces = sorted(set(range(spaces)) - set(self.spaces.values()), reverse=True)

    # Adding and removing

    def add(self, keys: Batch, spaces: np.ndarray, priorities: np.ndarray, arrivals: np.ndarray) -> np.ndarray | int:
        """Add prompts; return their ids, int64 [B], or the first query with a token out of range."""
        self._ensure_entries(len(keys))
        ids, starts = np.empty(len(keys), np.int64), np.empty(len(keys), np.int64)
        batch = keys.addresses, keys.wide, keys.counts, self._left, spaces, priorities, arrivals, starts, ids
        while True:
            reason, query = cpu.add_prompts(self._tree.address, self.address, *batch)
            if reason == 0:
                return ids
            if reason == cpu.BAD_TOKEN:
                return int(query)
            self._make_space(int(keys.counts.sum()) + len(keys) * self._page)

    def add_one(self, key: Buffer, space: int, priority: int, arrival: float) -> int:
        """Add one prompt; return its id, or BAD_TOKEN."""
        address, count, wide, _owner = key
        self._ensure_entries(1)
        arguments = address, wide, count, self._left, space, priority, arrival
        while True:
            number: int = cpu.add_prompt.call(self._tree.address, self.address, *arguments)
            if number >= cpu.BAD_TOKEN:
                return number
            self._make_space(count + self._page)

    def _make_space(self, units: int) -> None:
        if self._columns.counts[waiting.GONE]:
            self.tidy()
        else:
            self._enlarge_forest(units)

    def remove(self, ids: np.ndarray, tree: int) -> None:
        """Remove prompts that wait. tree: the address of the tree that is watched, or 0."""
        self._ensure_gone(len(ids))
        cpu.remove_prompts(tree, self._tree.address, self.address, ids)

    def remove_one(self, number: int, tree: int) -> bool:
        """Remove the prompt with an id, if it waits; return whether it did."""
        self._ensure_gone(1)
        return bool(cpu.remove_prompt.call(tree, self._tree.address, self.address, number))

    def _ensure_gone(self, more: int) -> None:
        """Free the ranges of prompts that left, if they are many, or if `more` could not be noted."""
        counts = self._columns.counts
        full = counts[waiting.GONE] + more > len(self.arrays.gone_start)
        if full or counts[waiting.GONE_TOKENS] > _FEWEST_GONE + counts[waiting.LIVE_TOKENS]:
            self.tidy()

    def tidy(self) -> None:
        """Find anew what prompts share with older ones, and free what prompts that left have held. O(prompts)."""
        if self._columns.counts[waiting.GONE]:
            cpu.tidy(self._tree.address, self.address)

    # Looking

    def entries(self) -> np.ndarray:
        """Return the entries of all waiting prompts, the oldest first: int64 [N]."""
        entries = np.empty(len(self), np.int64)
        cpu.entries_by_age(self.address, entries)
        return entries

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the entries of ids, int64 [B], and the first query that does not wait, or -1."""
        entries = np.empty(len(ids), np.int64)
        return entries, int(cpu.find_entries(self.address, ids, entries))

    def in_order(self) -> np.ndarray:
        """Return the entries of all waiting prompts in the queue's order: int32 [N]."""
        entries = np.empty(len(self), np.int32)
        cpu.entries_in_order(self.address, entries)
        return entries

    def paths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the parent and the end of each row of the prompt tree, int32 [P], and a mark for each: bool [P]."""
        forest = self._forest
        rows = int(forest.numbers[numbers.ROWS])
        return forest.parent.numpy()[:rows], forest.end.numpy()[:rows], np.zeros(rows, np.bool_)

    def tokens_on_host(self) -> torch.Tensor:
        """Return the pool of tokens, int32: a view."""
        return self._forest.tokens

    def tokens(self, entry: int) -> np.ndarray:
        """Return the tokens of a prompt: int32, a copy."""
        start = int(self.arrays.start[entry])
        return self._forest.tokens.numpy()[start : start + int(self.arrays.tokens[entry])].copy()

    def columns(self, entries: np.ndarray, *names: str) -> list[Any]:
        """Return columns of some entries."""
        return [getattr(self.arrays, name)[entries] for name in names]
