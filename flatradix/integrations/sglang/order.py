"""The order of a waiting queue by depth-first search, heavier subtrees first (SGLang's policy dfs-weight)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flatradix.inspect.content import Paths
from flatradix.layout.handles import ROW_MASK
from flatradix.queue import orders
from flatradix.results import Places
from flatradix.tree import RadixTree


def _row_of(place: Places, paths: Paths) -> int:
    """Return the row on which a place ends, 0 for the root."""
    row = place.handle & ROW_MASK if place.length else 0
    while row > 0 and paths.ends[row] - paths.lengths[row] >= place.length:
        row = int(paths.parents[row])
    return max(row, 0)


def depth_first_by_weight(tree: RadixTree, places: Sequence[Places]) -> list[int]:
    """Return the indices of `places` in the order in which SGLang would serve them. Each place has weight 1.

    Below each node the child with the most places comes first; of equal children, the child with the first place.
    Places that end at the node itself come after all children. O(rows on the paths), and a copy of four columns of the
    tree if it is on a GPU. Stale places raise no error: each counts where its row is now.
    """
    paths = tree.index.paths()
    rows = np.array([_row_of(place, paths) for place in places], np.int32)
    order: list[int] = orders.depth_first(paths.parents, rows).tolist()
    return order
