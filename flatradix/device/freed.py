"""What an eviction on a GPU is about to free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flatradix.inputs.options import Options
from flatradix.inputs.upload import upload_numbers
from flatradix.kernels.gpu import Arrays
from flatradix.layout import numbers
from flatradix.victims import Edge, Freed, Reader


def _reader(pool: torch.Tensor) -> Reader:
    def read(starts: list[int], lengths: list[int]) -> list[np.ndarray]:
        ends = np.cumsum(lengths)
        units = np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)
        return np.split(pool[upload_numbers(units, pool.device)].cpu().numpy(), ends[:-1])

    return read


def about_to_go(
    arrays: Arrays, options: Options, call: int, victims: tuple[int, int], name_of: Callable[[int], Any],
    slots: torch.Tensor,
) -> Freed:  # fmt: skip
    """Describe the eviction `call` before its rows are freed. Copies columns to the host: O(nodes).

    victims: how many nodes, and what the last of them keeps. slots: where their slots will be, in order.
    """
    state, (nodes, kept) = arrays.state, victims
    used = int(state.numbers[numbers.ROWS]) if nodes else 0
    columns = (column[:used].to("cpu", copy=True) for column in (state.parent, state.start, state.length))
    parents, starts, lengths = (column.numpy() for column in columns)
    rows = arrays.scratch.victims[0, :nodes].tolist()

    def edge_of(row: int) -> Edge:
        return Edge(int(parents[row]), int(starts[row]), int(lengths[row]))

    return Freed(
        call, rows, int(lengths[rows[-1]]) - kept if kept else 0, edge_of, _reader(state.tokens),
        _reader(state.seconds) if options.bigram else None, name_of, slots, options.slot_device,
    )  # fmt: skip
