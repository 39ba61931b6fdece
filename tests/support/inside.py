"""What tests look at inside a tree: by its content where that shows it."""

from __future__ import annotations

from typing import Any

from flatradix import RadixTree
from flatradix.layout import numbers


def names_of(tree: RadixTree) -> list[Any]:
    """The namespaces that the tree knows, None among them."""
    return [name for _, name in tree.content().names]


def clock_of(tree: RadixTree) -> int:
    return tree.content().number(numbers.CLOCK)


def pool_end(tree: RadixTree) -> int:
    """Where the half of the pools in use ends, on a GPU."""
    return tree.content().number(numbers.POOL_END)


def index_of(tree: RadixTree) -> Any:
    """What does the work."""
    return tree._index


def arrays_of(tree: RadixTree) -> Any:
    """The arrays of a tree on a GPU as its kernels take them."""
    return tree._index._arrays
