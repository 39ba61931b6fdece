"""What tests must know of the device of a tree: errors come later on a GPU, and an interpreter gets little done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from flatradix import RadixTree
from flatradix.inputs import devices

T = TypeVar("T")


def interpreted(device: str = "cuda") -> bool:
    """Whether the kernels of this device are run by Python: each call then takes 10 to 100 ms, and a batch longer."""
    return device == "cuda" and devices.interpreted()


def settled(tree: RadixTree, call: Callable[[], T]) -> T:
    """What a call on this tree returns; a GPU tells some of its errors only when it is asked."""
    result = call()
    tree.raise_pending()
    return result
