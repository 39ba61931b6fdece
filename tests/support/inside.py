"""What tests read inside a tree, from its content where possible."""

from __future__ import annotations

from typing import Any

from flatradix import RadixTree
from flatradix.layout import numbers


def names_of(tree: RadixTree) -> list[Any]:
    """Return the namespaces that the tree knows, None included."""
    return [name for _, name in tree.content().names]


def clock_of(tree: RadixTree) -> int:
    return tree.content().number(numbers.CLOCK)


def pool_end(tree: RadixTree) -> int:
    """Return the end of the pool half in use, on a GPU."""
    return tree.content().number(numbers.POOL_END)


def index_of(tree: RadixTree) -> Any:
    """Return the index that does the work of a tree."""
    return tree._index


def arrays_of(tree: RadixTree) -> Any:
    """Return the arrays of a tree on a GPU, as its kernels take them."""
    return tree._index._arrays
