"""Columns: the state of the running requests of a PrefixCache, one row for each request that may run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Columns(NamedTuple):
    """Arrays in host memory, [R] int64. A row with serial 0 is free.

    serial: the number of the request that has the row; requests are numbered from 1 on, and numbers are never used
    again. num_tokens: tokens that are known. length: tokens that have slots. committed: tokens that are in the tree,
    whole pages. counted: tokens for which an insert has counted a hit. cached: prompt tokens that need no computing.
    kept: tokens that the tree alone keeps; those behind are in the request's row of tokens. missing: slots that the
    last `extend` lacked. priority: of the inserts. names: object, the namespace.
    """

    serial: np.ndarray
    num_tokens: np.ndarray
    length: np.ndarray
    committed: np.ndarray
    counted: np.ndarray
    cached: np.ndarray
    kept: np.ndarray
    missing: np.ndarray
    priority: np.ndarray
    names: np.ndarray

    @classmethod
    def of(cls, rows: int) -> Columns:
        kinds = {"names": object}
        return cls(**{name: np.zeros(rows, kinds.get(name, np.int64)) for name in cls._fields})

    def names_of(self, rows: np.ndarray) -> object:
        """Return the namespace of all rows if they have the same, else a list with one for each row."""
        names = self.names[rows]
        if len(rows) == 0:
            return None
        return names[0] if len(rows) == 1 or bool((names == names[0]).all()) else names.tolist()

    def set_names(self, rows: np.ndarray, names: object) -> None:
        """Set the namespace of some rows: one for all, or a list with one each."""
        for row, name in zip(rows.tolist(), names, strict=True) if isinstance(names, list) else ():
            self.names[row] = name
        if not isinstance(names, list):
            self.names[rows] = names
