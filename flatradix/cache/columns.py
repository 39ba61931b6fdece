"""Columns: the state of the running requests of a PrefixCache, one row for each request that may run."""

from __future__ import annotations

import numpy as np

from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.sequences import address_of
from flatradix.kernels import cpu
from flatradix.layout import running
from flatradix.layout.running import Running


class Columns:
    """The numbers of the running requests, each int64 [R], as views of one array; see `layout/running.py`.

    names: object [R], the namespace of each. has_names: whether a request ever had one. counts: int64 [SIZE] as a
    memoryview. address: of the address table that kernels open, valid from `complete` on.
    """

    def __init__(self, rows: int, page_size: int, max_length: int) -> None:
        self.data = data = np.zeros((running.FIELDS, rows), np.int64)
        self.serial = data[running.SERIAL]
        self.num_tokens = data[running.NUM_TOKENS]
        self.length = data[running.LENGTH]
        self.committed = data[running.COMMITTED]
        self.counted = data[running.COUNTED]
        self.cached = data[running.CACHED]
        self.kept = data[running.KEPT]
        self.missing = data[running.MISSING]
        self.priority = data[running.PRIORITY]
        self.borrowed = data[running.BORROWED]
        self.names = np.empty(rows, object)
        self._free_rows = np.zeros(rows, np.int64)
        numbers = np.zeros(running.SIZE, np.int64)
        width = -(-max_length // page_size)
        numbers[running.ROWS], numbers[running.PAGE], numbers[running.WIDTH] = rows, page_size, width
        numbers[running.MOST_KNOWN] = (width + 1) * page_size  # what was generated last has no slot
        numbers[running.MOST_SLOTS] = max_length
        self._numbers = numbers
        self.counts = memoryview(numbers.data)
        self.reset()

    def complete(
        self, pages: np.ndarray | None = None, stack: np.ndarray | None = None, handles: np.ndarray | None = None,
        pool: np.ndarray | None = None, tokens: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Make the address table, with the arrays that are in host memory."""
        given = pages, stack, handles, pool, tokens
        empty = np.empty(0, np.int64)
        arrays = [empty if array is None else array for array in given]
        self._running = Running(self.data, self._free_rows, self._numbers, *arrays)
        self._table = cpu.running_table(self._running)
        self.address = address_of(self._table)

    def reset(self) -> None:
        """End all requests. Counters restart at 0, serials do not."""
        self.data[:] = 0
        self.names[:] = None
        self.has_names = False
        self.find_free_rows()
        self._numbers[running.TOTALS] = 0
        self.counts[running.NEXT_SERIAL] = max(self.counts[running.NEXT_SERIAL], 1)

    def find_free_rows(self) -> None:
        free = np.flatnonzero(self.serial == 0)[::-1]
        self._free_rows[: len(free)] = free
        self.counts[running.FREE_ROWS] = len(free)

    @property
    def free_rows(self) -> np.ndarray:
        """The free rows, int64 [K]; those that are used first are last."""
        return self._free_rows[: self.counts[running.FREE_ROWS]]

    def next_rows(self, count: int) -> np.ndarray:
        """Return the rows of the next `count` requests, int64 [count]. They stay free. There must be enough."""
        free = self.counts[running.FREE_ROWS]
        return self._free_rows[free - count : free].copy()

    def start(self, rows: np.ndarray) -> None:
        """Number new requests, which have the rows of `next_rows`. From then on, they run."""
        serial = self.counts[running.NEXT_SERIAL]
        self.counts[running.NEXT_SERIAL] = serial + len(rows)
        self.counts[running.FREE_ROWS] -= len(rows)
        self.serial[rows] = np.arange(serial, serial + len(rows))

    @property
    def rows(self) -> np.ndarray:
        """The rows of the running requests, int64 [N]."""
        return np.flatnonzero(self.serial)

    def names_of(self, rows: np.ndarray) -> object:
        """Return the namespace of all rows if they have the same, else a list with one for each row."""
        if len(rows) == 0 or not self.has_names:
            return None
        names = self.names[rows].tolist()
        first = names[0]
        # Names of different types are never compared: `python -bb` forbids it.
        same = len(rows) == 1 or (len(set(map(type, names))) == 1 and names.count(first) == len(names))
        return first if same else names

    def names_to_commit(self, rows: np.ndarray) -> list[Namespace]:
        """Return the namespace of each row that has committed nothing, None for the others."""
        names: list[Namespace] = self.names[rows].tolist()
        return [None if held else name for name, held in zip(names, self.committed[rows].tolist(), strict=True)]

    def set_names(self, rows: np.ndarray, names: Namespace | list[Namespace]) -> None:
        """Set the namespace of some rows: one for all, or a list with one each."""
        if names is None and not self.has_names:
            return
        self.has_names = True
        if isinstance(names, list):
            for row, name in zip(rows.tolist(), names, strict=True):
                self.names[row] = name
        else:
            self.names[rows] = names
