"""The nodes of a tree as Python objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from flatradix.inputs.namespaces import Namespace
from flatradix.inspect.content import Content
from flatradix.layout.dropped import time_of
from flatradix.layout.state import COLUMNS


class NodeView(NamedTuple):
    """One node as Python values. `path` holds all units from the root to its end: ints, or pairs with bigrams."""

    row: int
    parent: int  # row, -1 at the top
    namespace: Namespace
    path: tuple[int, ...] | tuple[tuple[int, int], ...]
    start: int  # path length where its edge begins
    length: int
    slots: tuple[int, ...]
    lock_ref: int
    own_locks: int
    tick: int
    created: int
    dropped: bool
    priority: int
    hit_count: int
    children: int


def columns_of(content: Content) -> Any:
    """Return by name: the columns of the rows that were ever in use, the live rows (`live`), and the token pools."""
    columns = {name: content.column(name) for name in COLUMNS}
    state = content.state
    return SimpleNamespace(**columns, live=content.live(), tokens=state.tokens, seconds=state.seconds)


def units_of(a: Any, row: int) -> list:
    """Return the units on the edge of a row."""
    begin = int(a.start[row])
    end = begin + int(a.length[row])
    first = a.tokens[begin:end].tolist()
    if not len(a.seconds):
        return first
    return list(zip(first, a.seconds[begin:end].tolist(), strict=True))


def nodes_of(content: Content) -> list[NodeView]:
    """Return all nodes, parents before their children. O(sum of the path lengths)."""
    a = columns_of(content)
    pool = content.slots
    known_names = dict(content.names)
    views: list[NodeView] = []
    paths: dict[int, tuple] = {}
    names: dict[int, Namespace] = {}
    for row in a.live[np.argsort(a.end[a.live], kind="stable")].tolist():
        above = int(a.parent[row])
        names[row] = known_names[~above] if above < 0 else names[above]
        paths[row] = paths.get(above, ()) + tuple(units_of(a, row))
        begin, length = int(a.start[row]), int(a.length[row])
        views.append(
            NodeView(
                row=row,
                parent=max(above, -1),
                namespace=names[row],
                path=paths[row],
                start=int(a.end[row]) - length,
                length=length,
                slots=tuple(pool[begin : begin + length].tolist()),
                lock_ref=int(a.lock_ref[row]),
                own_locks=int(a.own_locks[row]),
                tick=int(a.tick[row]),
                created=time_of(int(a.created[row])),
                dropped=bool(a.created[row] < 0),
                priority=int(a.priority[row]),
                hit_count=int(a.hit_count[row]),
                children=int(a.children[row]),
            )
        )
    return views
