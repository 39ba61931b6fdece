"""The order of a waiting queue by depth-first search, heavier subtrees first (SGLang's policy dfs-weight)."""

from __future__ import annotations

from collections.abc import Sequence

from flatradix.layout.handles import ROW_MASK
from flatradix.results import Places
from flatradix.tree import RadixTree

_ROOT = 0


class _Paths:
    """The part of a tree that leads to some places, by rows. Children are in the order in which they were added."""

    def __init__(self, tree: RadixTree) -> None:
        state = tree.content(slots=False).state
        self._parent, self._length, self._end = state.parent, state.length, state.end
        self._known = {_ROOT}
        self.children: dict[int, list[int]] = {}

    def add(self, place: Places) -> int:
        """Add the path of a place. Return the row on which the place ends."""
        length = place.length
        found = place.handle & ROW_MASK if length else _ROOT
        while found != _ROOT and self._end[found] - self._length[found] >= length:
            found = int(self._parent[found])
        row = found
        while row not in self._known:
            self._known.add(row)
            parent = max(int(self._parent[row]), _ROOT)  # a negative parent is a namespace
            self.children.setdefault(parent, []).append(row)
            row = parent
        return found

    def downwards(self) -> list[int]:
        """Return all rows, parents before their children."""
        rows = [_ROOT]
        for row in rows:  # the list grows during the loop
            rows.extend(self.children.get(row, ()))
        return rows


def depth_first_by_weight(tree: RadixTree, places: Sequence[Places]) -> list[int]:
    """Return the indices of `places` in the order in which SGLang would serve them. Each place has weight 1.

    Below each node the child with the most places comes first; of equal children, the child with the first place.
    Places that end at the node itself come after all children. O(rows on the paths), and a copy of the whole tree if it
    is on a GPU. Stale places raise no error: each counts where its row is now.
    """
    paths = _Paths(tree)
    at: dict[int, list[int]] = {}
    for index, place in enumerate(places):
        at.setdefault(paths.add(place), []).append(index)
    weights: dict[int, int] = {}
    for row in reversed(paths.downwards()):
        weights[row] = len(at.get(row, ())) + sum(weights[child] for child in paths.children.get(row, ()))
    order: list[int] = []
    stack = [(_ROOT, False)]
    while stack:
        row, done = stack.pop()
        if done:
            order.extend(at.get(row, ()))
            continue
        stack.append((row, True))
        below = sorted(paths.children.get(row, ()), key=lambda child: -weights[child])
        stack.extend((child, False) for child in reversed(below))
    return order
