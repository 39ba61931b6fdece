"""Columns: the state of the running requests of a PrefixCache, one row for each request that may run."""

from __future__ import annotations

import numpy as np

from flatradix.layout import running


class Columns:
    """The numbers of the running requests, each int64 [R], as views of one array; see `layout/running.py`.

    data: that array, int64 [FIELDS, R]. names: object [R], the namespace of each.
    """

    def __init__(self, rows: int) -> None:
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
        self.names = np.zeros(rows, object)

    def names_of(self, rows: np.ndarray) -> object:
        """Return the namespace of all rows if they have the same, else a list with one for each row."""
        if len(rows) == 0:
            return None
        names = self.names[rows]
        first = names[0]
        return first if len(rows) == 1 or bool((names == first).all()) else names.tolist()

    def set_names(self, rows: np.ndarray, names: object) -> None:
        """Set the namespace of some rows: one for all, or a list with one each."""
        for row, name in zip(rows.tolist(), names, strict=True) if isinstance(names, list) else ():
            self.names[row] = name
        if not isinstance(names, list):
            self.names[rows] = names
