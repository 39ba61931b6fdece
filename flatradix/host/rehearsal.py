"""A rehearsal of an eviction: how many tokens would it free? It runs on a copy, so the tree stays as it is."""

from __future__ import annotations

import numpy as np
import torch

from flatradix.kernels import cpu
from flatradix.layout import numbers
from flatradix.layout.state import COLUMNS, TreeState
from flatradix.layout.waiting import Waiting

_READ_ONLY = ("tokens", "seconds", "multipliers")


def _copy_of(state: TreeState) -> TreeState:
    """Return a copy of a state. The arrays that no eviction writes to are shared. O(nodes + capacity)."""
    rows = int(state.numbers[numbers.ROWS])
    copies = state._asdict()
    for name, tensor in state._asdict().items():
        if name in COLUMNS or name == "free_rows":
            column = np.empty_like(tensor.numpy())
            column[:rows] = tensor.numpy()[:rows]
            copies[name] = torch.from_numpy(column)
        elif name not in _READ_ONLY:
            copies[name] = torch.from_numpy(tensor.numpy().copy())  # threads of torch do not survive a fork
    return TreeState(**copies)


def tokens_freed(state: TreeState, queue: Waiting | None, wanted: int, scores: np.ndarray, most_ranges: int) -> int:
    """Return how many tokens an eviction of `wanted` tokens would free.

    queue: the arrays of the waiting queue that keeps what it wants, after it has looked. scores, most_ranges: as for
    the eviction. O(nodes + capacity).
    """
    copy = _copy_of(state)
    table = cpu.address_table(copy)
    kept = None if queue is None else Waiting._make(array.copy() for array in queue)
    kept_table = None if kept is None else cpu.waiting_table(kept)
    starts, lengths = np.empty((2, most_ranges), np.int32)
    tokens: int = cpu.evict.call(
        table.ctypes.data, 0, wanted, scores, 0 if kept_table is None else kept_table.ctypes.data, 0, False, starts,
        lengths, 0,
    )[0]  # fmt: skip
    return tokens
