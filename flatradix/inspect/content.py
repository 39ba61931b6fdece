"""Content: a tree as read-only arrays in host memory. `check`, `draw` and `save` use nothing else of the tree."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.options import Options
from flatradix.layout import numbers
from flatradix.layout.handles import GENERATION_MASK
from flatradix.layout.state import COLUMNS, FREE_ROW, TreeState

# A saved tree: arrays, numbers and namespace names, by the keys of `saved_of`. `snapshot` adds the settings.
Saved = dict[str, Any]


class Content(NamedTuple):
    """A tree as arrays in host memory. slots: the slot pool, as long as the token pool, or empty if not asked for.

    first: the pool index where the part in use begins; on a GPU it may be the second half. names: (code, name) of each
    namespace in use; empty if only some fields were asked for. name_of: returns the name of a code, during the call
    that reads the tree. evictable, protected, nodes: the sizes that the tree reports.
    """

    options: Options
    state: Any  # TreeState of numpy arrays
    slots: np.ndarray
    first: int
    names: list[tuple[int, Namespace]]
    name_of: Callable[[int], Namespace]
    evictable: int
    protected: int
    nodes: int

    def number(self, place: int) -> int:
        """Return one of `TreeState.numbers`."""
        return int(self.state.numbers[place])

    @property
    def rows(self) -> int:
        """How many rows were ever in use, with the root."""
        return self.number(numbers.ROWS)

    def column(self, name: str) -> np.ndarray:
        """Return a column, cut down to the rows that were ever in use."""
        column: np.ndarray = getattr(self.state, name)
        return column[: self.rows]

    def live(self) -> np.ndarray:
        """Return int64 [N]: the rows that hold a node."""
        return 1 + np.flatnonzero(self.column("parent")[1:] != FREE_ROW)

    @property
    def is_on_host(self) -> bool:
        """Whether the tree is in host memory, and so has a bitmap of its pools and an eviction queue."""
        return len(self.state.used) > 0


class Paths(NamedTuple):
    """Columns of a tree in host memory, int32 [R]: the way from each row to the root, and the tree's sizes."""

    parents: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    locks: np.ndarray
    evictable: int
    protected: int


def as_numpy(state: TreeState) -> Any:
    """Return a state as a TreeState of numpy arrays: views if it is in host memory, else copies."""
    arrays: list[Any] = [tensor.numpy(force=True) for tensor in state]
    return TreeState(*arrays)


def fields_of(state: TreeState, only: Collection[str]) -> Any:
    """Return some fields of a state as a TreeState of numpy arrays, of columns the rows in use. Others are empty."""
    found = state.numbers.numpy(force=True)
    rows = int(found[numbers.ROWS])

    def read(name: str, tensor: torch.Tensor) -> np.ndarray:
        if name not in only:
            return found if name == "numbers" else np.empty(0, np.int64)
        return (tensor[:rows] if name in COLUMNS else tensor).numpy(force=True)

    return TreeState(*(read(*field) for field in state._asdict().items()))  # type: ignore[arg-type]


# `queued` belongs to the eviction queue, which a tree on a GPU does not have. Wants belong to those who hold them.
_WANTS = ("wanted", "own_wants")
KEPT_COLUMNS = tuple(name for name in COLUMNS if name not in ("queued", *_WANTS))
_KEPT_NUMBERS = (
    numbers.GENERATION, numbers.CLOCK, numbers.EVICTABLE, numbers.PROTECTED, numbers.NODES, numbers.ROWS,
    numbers.FREE_ROWS,
)  # fmt: skip


def saved_of(content: Content) -> Saved:
    """Return copies of the rows and pool units in use of a tree whose pools were just compacted."""
    state, first = content.state, content.first
    units = content.evictable + content.protected
    last_code = max(code for code, _ in content.names)

    def part(array: Any, begin: int, end: int) -> torch.Tensor:
        return torch.from_numpy(np.array(array[begin:end]))

    saved = {name: part(getattr(state, name), 0, content.rows) for name in KEPT_COLUMNS}
    saved["start"] = torch.from_numpy(saved["start"].numpy() - first)
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


def dense_codes(parent: np.ndarray, codes: list[int]) -> np.ndarray:
    """Return the parents with the namespaces numbered in the order of `codes`, without a gap."""
    ranks = np.zeros(codes[-1] + 1, np.int32)
    ranks[codes] = np.arange(len(codes))
    top = np.flatnonzero((parent < 0) & (parent != FREE_ROW))
    parent[top] = ~ranks[~parent[top]]
    return parent


def tokens_for(saved: Saved, page_size: int) -> int:
    """Return the least `max_tokens` of a tree that can hold a saved tree: its tokens, its rows and its namespaces."""
    pages = max(len(saved["parent"]) - 1, len(saved["namespace_children"]))
    return max(len(saved["tokens"]), pages * page_size)


def _generations(saved: Saved, first: int) -> torch.Tensor:
    """Return the generations of the rows of a saved tree, for a tree whose generations begin at `first`.

    The nodes of the saved tree keep their handles: their generations are negative, from `first` back to those handles.
    A row that is freed goes on from 0, so a node that is new from here on has no handle that the saved tree, or another
    tree loaded from it, gives out.
    """
    begun = saved["numbers"][_KEPT_NUMBERS.index(numbers.GENERATION)]
    kept = saved["generation"].numpy() & GENERATION_MASK
    back = ((kept + (begun - first)) & GENERATION_MASK) - (GENERATION_MASK + 1)
    back[saved["parent"].numpy() == FREE_ROW] = 0
    return torch.from_numpy(back)


def _write(array: torch.Tensor, values: torch.Tensor) -> None:
    """Write values in host memory to the beginning of an array, in host memory without threads of torch."""
    if array.is_cpu:
        array.numpy()[: len(values)] = values.numpy()
    else:
        array[: len(values)] = values.to(array.device)


def fill(state: TreeState, slots: torch.Tensor, saved: Saved) -> None:
    """Write a saved tree into the arrays of an empty tree, and its slots into the slot pool."""
    found = state.numbers.cpu()
    saved = saved | {"generation": _generations(saved, int(found[numbers.GENERATION]))}
    for name in (*KEPT_COLUMNS, "free_rows", "namespace_children", "tokens", "seconds", "multipliers"):
        _write(getattr(state, name), saved[name])
    for name in _WANTS:
        _write(getattr(state, name), torch.from_numpy(np.zeros(len(saved["parent"]), np.int32)))
    _write(slots, saved["slots"])
    for place, value in zip(_KEPT_NUMBERS, saved["numbers"], strict=True):
        if place != numbers.GENERATION:
            found[place] = value
    state.numbers.copy_(found)
