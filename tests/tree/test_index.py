"""A tree is one class over one of two indexes."""

from __future__ import annotations

import pytest

from flatradix import RadixTree


def test_a_tree_is_not_subclassed() -> None:
    with pytest.raises(TypeError, match="not made to be subclassed"):
        type("Mine", (RadixTree,), {})
