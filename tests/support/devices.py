"""Differences between devices in tests: a GPU raises errors later, and interpreted kernels are slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flatradix import RadixTree
from flatradix.inputs import devices

T = TypeVar("T")


def interpreted(device: str = "cuda") -> bool:
    """Return whether Python runs the kernels of this device: then a call takes 10 to 100 ms, and a batch longer."""
    return device == "cuda" and devices.interpreted()


def settled(tree: RadixTree, call: Callable[[], T]) -> T:
    """Return the result of a call, or raise its error: a GPU raises some errors only in `raise_pending`."""
    result = call()
    tree.raise_pending()
    return result
