"""What the last eviction of an index in host memory freed. Its rows and pool units are not used again yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flatradix.inputs.namespaces import Namespaces
from flatradix.layout import numbers
from flatradix.layout.state import FREE_ROW
from flatradix.victims import Edge, Freed, Reader


def _reader(pool: np.ndarray) -> Reader:
    def read(starts: list[int], lengths: list[int]) -> list[np.ndarray]:
        return [pool[start : start + length].copy() for start, length in zip(starts, lengths, strict=True)]

    return read


def freed_last(state: Any, told: Sequence[int], names: Namespaces, slots: torch.Tensor) -> Freed:
    """Describe the last eviction. It must be the last call that changed the tree.

    state: a TreeState of numpy arrays. told: its numbers, as Python integers. slots: what the eviction returns, in
    order.
    """
    tokens, ranges, shortened = (told[at] for at in (numbers.LAST_LENGTH, numbers.LAST_PREFIX, numbers.LAST_HANDLE))
    nodes, top = ranges - (shortened > 0), told[numbers.FREE_ROWS]
    rows = state.free_rows[top - nodes : top].tolist()
    tail = tokens - int(state.length[rows].sum()) if shortened else 0

    def edge_of(row: int) -> Edge:
        parent = int(state.parent[row])
        if parent == FREE_ROW:
            parent = int(state.own_locks[row])  # where `free_row` leaves it
        return Edge(parent, int(state.start[row]), int(state.length[row]) + (tail if row == shortened else 0))

    return Freed(
        told[numbers.LAST_CALL], rows + [shortened] * (shortened > 0), tail, edge_of, _reader(state.tokens),
        _reader(state.seconds) if told[numbers.BIGRAM] else None, names.name, slots[len(slots) - tokens :],
    )  # fmt: skip
