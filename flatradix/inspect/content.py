"""Content: a tree as arrays in host memory, to be read only. `check`, `draw` and `save` see nothing else of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.options import Options
from flatradix.layout import numbers
from flatradix.layout.state import COLUMNS, FREE_ROW, TreeState

# Of a saved tree, by name: arrays, settings and names. `snapshot` says what is in it.
Saved = dict[str, Any]


class Content(NamedTuple):
    """state: the arrays of the tree, numpy. slots: the slot pool, [P] as the token pool.

    first: where the part of the pools that is in use begins, not 0 on a GPU. evictable, protected, nodes: the sizes
    that the tree tells.
    """

    options: Options
    state: Any  # TreeState of numpy arrays
    slots: np.ndarray
    first: int
    names: list[tuple[int, Namespace]]
    evictable: int
    protected: int
    nodes: int

    def number(self, place: int) -> int:
        """One of `TreeState.numbers`."""
        return int(self.state.numbers[place])

    @property
    def rows(self) -> int:
        """Rows that were ever in use."""
        return self.number(numbers.ROWS)

    def column(self, name: str) -> np.ndarray:
        """A column of the rows that were ever in use."""
        column: np.ndarray = getattr(self.state, name)
        return column[: self.rows]

    def live(self) -> np.ndarray:
        """int64 [N]: the rows that hold a node."""
        return 1 + np.flatnonzero(self.column("parent")[1:] != FREE_ROW)

    @property
    def is_on_host(self) -> bool:
        """Whether the tree has what only one in host memory has: a bitmap of its pools and an eviction queue."""
        return len(self.state.used) > 0


def as_numpy(state: TreeState) -> Any:
    """The arrays of a state as a TreeState of numpy, in place where they are in host memory, else copied."""
    arrays: list[Any] = [tensor.numpy(force=True) for tensor in state]
    return TreeState(*arrays)


# `queued` belongs to the eviction queue, which a tree on a GPU has not.
KEPT_COLUMNS = tuple(name for name in COLUMNS if name != "queued")
_KEPT_NUMBERS = (
    numbers.GENERATION, numbers.CLOCK, numbers.EVICTABLE, numbers.PROTECTED, numbers.NODES, numbers.ROWS,
    numbers.FREE_ROWS,
)  # fmt: skip


def saved_of(content: Content) -> Saved:
    """What is kept of a tree whose pools were just compacted: copies of the rows and pools in use."""
    state, first = content.state, content.first
    units = content.evictable + content.protected
    last_code = max(code for code, _ in content.names)

    def part(array: Any, begin: int, end: int) -> torch.Tensor:
        return torch.from_numpy(np.array(array[begin:end]))

    saved = {name: part(getattr(state, name), 0, content.rows) for name in KEPT_COLUMNS}
    saved["start"] -= first
    return saved | {
        "numbers": [content.number(place) for place in _KEPT_NUMBERS],
        "names": content.names,
        "namespace_children": part(state.namespace_children, 0, last_code + 1),
        "free_rows": part(state.free_rows, 0, content.number(numbers.FREE_ROWS)),
        "multipliers": part(state.multipliers, 0, len(state.multipliers)),
        "tokens": part(state.tokens, first, first + units),
        "seconds": part(state.seconds, first, first + units),
        "slots": part(content.slots, first, first + units),
    }


def fill(state: TreeState, slots: torch.Tensor, saved: Saved) -> None:
    """Write what was saved into the arrays of an empty tree, and the slots into its pool."""
    for name in (*KEPT_COLUMNS, "free_rows", "namespace_children", "tokens", "seconds", "multipliers"):
        values = saved[name]
        getattr(state, name)[: len(values)] = values.to(state.numbers.device)
    slots[: len(saved["slots"])] = saved["slots"].to(slots.device)
    found = state.numbers.cpu()
    for place, value in zip(_KEPT_NUMBERS, saved["numbers"], strict=True):
        found[place] = value
    state.numbers.copy_(found)
