"""Verifying the arrays of a file before any kernel sees them, and deriving from them what the file does not hold.

All steps are passes of numpy over whole arrays, so a bad array costs no more time than a good one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.dropping import are_detached, times_of
from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.options import Options
from flatradix.inspect.content import Saved
from flatradix.layout.dropped import DETACHED
from flatradix.layout.growth import MOST_ROWS
from flatradix.layout.handles import LOW32
from flatradix.layout.hashing import page_tag
from flatradix.layout.numbers import MAX_LOCKS
from flatradix.layout.state import FREE_ROW, multipliers, row_capacity

Arrays = dict[str, np.ndarray]

# Columns of a file, in rows that were ever in use; `Saved` has more.
COLUMNS_64 = ("tick", "created", "priority", "generation")
COLUMNS_32 = ("parent", "start", "length", "end", "lock_ref", "own_locks", "hit_count")
OTHERS = ("free_rows", "tokens", "seconds", "slots")
_MOST_TIME = 2**59  # no tree counts so far; on a GPU, an eviction gives higher keys to what is wanted
_AT_ONCE = 1 << 22  # units whose hashes are computed at once


class Nodes(NamedTuple):
    """The nodes of a tree. live: int64 [N], their rows. inner, above: those below another node, and that node's rows.

    top: the rows of the others. codes: int64, their namespaces.
    """

    live: np.ndarray
    inner: np.ndarray
    above: np.ndarray
    top: np.ndarray
    codes: np.ndarray


def expected(options: Options) -> dict[str, np.dtype]:
    """Return the dtype of each array of a file."""
    wide = options.slot_dtype == torch.int64
    return {
        **dict.fromkeys(COLUMNS_64, np.dtype(np.int64)),
        **dict.fromkeys((*COLUMNS_32, "free_rows", "tokens", "seconds"), np.dtype(np.int32)),
        "slots": np.dtype(np.int64 if wide else np.int32),
        "name_ends": np.dtype(np.int64),
        **dict.fromkeys(("name_kinds", "name_bytes"), np.dtype(np.uint8)),
    }


def saved_from(a: Arrays, names: list[Namespace], options: Options, clock: int, generation: int) -> Saved:
    """Return the tree of the arrays of a file, as `content.saved_of` does. The arrays become part of it.

    names: of each namespace code. The multipliers of the page hash are drawn anew: a file could make all pages collide.
    O(cached tokens + n log n of the nodes). Raises ValueError with the first reason why this is no tree.
    """
    _verify_lengths(a, options)
    nodes = _nodes_of(a)
    _verify_pool(a, nodes.live, options)
    _verify_paths(a, nodes)
    _verify_units(a, nodes, options)
    _verify_counts(a, nodes)
    _verify_times(a, nodes, clock)
    _verify_dropped(a, nodes)
    spaces = _children_of(nodes.codes, len(names), "namespace")
    if not (spaces[1:] > 0).all():
        raise ValueError(f"namespace {1 + int(np.flatnonzero(spaces[1:] == 0)[0])} has no node")
    drawn = multipliers(options.page_size * (1 + options.bigram), torch.int64)
    rows = len(a["parent"])
    free = a["parent"] == FREE_ROW
    for name in (*COLUMNS_64, *COLUMNS_32):
        if name not in ("parent", "generation"):
            a[name][free] = 0
            a[name][0] = 0
    a["parent"][0] = 0
    a["children"] = _children_of(nodes.above, rows, "row").astype(np.int32)
    a["tag"] = np.zeros(rows, np.int32)
    a["tag"][nodes.live] = _tags(a, nodes.live, options, drawn.numpy())
    a["namespace_children"] = spaces.astype(np.int32)
    locked = int(a["length"][a["lock_ref"] > 0].sum(dtype=np.int64))
    kept = [generation, clock, len(a["tokens"]) - locked, locked, len(nodes.live), rows, len(a["free_rows"])]
    columns = {name: torch.from_numpy(array) for name, array in a.items()}
    return {**columns, "multipliers": drawn, "numbers": kept, "names": list(enumerate(names))}


def _all(holds: np.ndarray, rows: np.ndarray, what: str) -> None:
    if not holds.all():
        raise ValueError(f"row {int(rows[np.flatnonzero(~holds)[0]])}: {what}")


def _children_of(above: np.ndarray, count: int, what: str) -> np.ndarray:
    """Return int64 [count]: how often each of `count` rows or namespaces is in `above`."""
    if len(above) and int(above.max()) >= count:
        raise ValueError(f"a node is in {what} {int(above.max())} of {count}")
    return np.bincount(above, minlength=count)


def _verify_lengths(a: Arrays, options: Options) -> None:
    rows, units = len(a["parent"]), len(a["tokens"])
    for name in (*COLUMNS_64, *COLUMNS_32):
        if len(a[name]) != rows:
            raise ValueError(f"{name} has {len(a[name])} rows, and parent has {rows}")
    for name, wanted in (("slots", units), ("seconds", units if options.bigram else 0)):
        if len(a[name]) != wanted:
            raise ValueError(f"{name} has {len(a[name])} values and should have {wanted}")
    if rows < 1 or units % options.page_size != 0:
        raise ValueError(f"it has {rows} rows and {units} tokens in pages of {options.page_size}")
    if rows > (MOST_ROWS if options.grows else row_capacity(options.max_tokens, options.page_size)):
        raise ValueError(f"it has {rows} rows in a tree of {options.max_tokens} tokens")
    if units > options.max_tokens and not options.grows:
        raise ValueError(f"it has {units} tokens in a tree of {options.max_tokens}")


def _nodes_of(a: Arrays) -> Nodes:
    """Return the nodes. Verifies the parents, and that all other rows but the root are free."""
    parent = a["parent"].astype(np.int64)
    rows = len(parent)
    live = 1 + np.flatnonzero(parent[1:] != FREE_ROW)
    parent = parent[live]
    _all(parent != 0, live, "its parent is the root, not a namespace")
    _all(parent < rows, live, "its parent is no row")
    is_inner = parent > 0
    _all(a["parent"][np.where(is_inner, parent, live)] != FREE_ROW, live, "its parent is free")
    free = a["free_rows"]
    named = np.zeros(rows, np.bool_)
    if len(free) and (int(free.min()) < 1 or int(free.max()) >= rows):
        raise ValueError("a free row is no row")
    named[free] = True
    if len(free) != rows - 1 - len(live) or np.count_nonzero(named) != len(free) or named[live].any():
        raise ValueError("the list of free rows is not that of the rows without a node")
    return Nodes(live, live[is_inner], parent[is_inner], live[~is_inner], ~parent[~is_inner])


def _verify_pool(a: Arrays, live: np.ndarray, options: Options) -> None:
    """Verify that the edges are whole pages and fill the pool from its beginning, each unit once."""
    length = a["length"][live].astype(np.int64)
    start = a["start"][live].astype(np.int64)
    _all((length > 0) & (length % options.page_size == 0), live, "its edge is not of whole pages")
    order = np.argsort(start, kind="stable")
    ends = np.cumsum(length[order])
    _all(start[order] == ends - length[order], live[order], "its edge does not begin where the edge before it ends")
    units = int(ends[-1]) if len(ends) else 0
    if units != len(a["tokens"]):
        raise ValueError(f"its edges have {units} tokens, and its pool has {len(a['tokens'])}")


def _verify_paths(a: Arrays, nodes: Nodes) -> None:
    """Verify the path lengths. They grow with each node of a path, so no node is above itself."""
    end, length = a["end"].astype(np.int64), a["length"].astype(np.int64)
    _all(end[nodes.top] == length[nodes.top], nodes.top, "its end is not the length of its edge")
    holds = end[nodes.inner] == end[nodes.above] + length[nodes.inner]
    _all(holds, nodes.inner, "its end is not its parent's end and its edge")


def _verify_units(a: Arrays, nodes: Nodes, options: Options) -> None:
    """Verify the values of the pools, and that the neighbouring pairs of bigrams overlap."""
    for name in ("tokens", "seconds", "slots"):
        if len(a[name]) and int(a[name].min()) < 0:
            raise ValueError(f"a value of {name} is negative")
    if not options.bigram:
        return
    tokens, seconds, start, length = a["tokens"], a["seconds"], a["start"], a["length"]
    begins = np.zeros(len(tokens), np.bool_)
    begins[start[nodes.live]] = True
    if (~begins[1:] & (seconds[:-1] != tokens[1:])).any():
        raise ValueError("neighbouring pairs on an edge do not overlap")
    last = start[nodes.above] + length[nodes.above] - 1
    _all(seconds[last] == tokens[start[nodes.inner]], nodes.inner, "its first pair does not overlap its parent's last")


def _verify_counts(a: Arrays, nodes: Nodes) -> None:
    live = nodes.live
    _all(a["own_locks"][live] >= 0, live, "own_locks is negative")
    _all(a["hit_count"][live] >= 0, live, "hit_count is negative")
    locks = a["own_locks"].astype(np.int64)
    np.add.at(locks, nodes.above, a["lock_ref"][nodes.inner].astype(np.int64))
    _all(a["lock_ref"][live] == locks[live], live, "lock_ref is not its own and its children's")
    _all(a["lock_ref"][live] >= 0, live, "lock_ref is negative")
    _all(a["lock_ref"][live] <= MAX_LOCKS, live, f"lock_ref is above {MAX_LOCKS}")
    higher = a["priority"][nodes.above] >= a["priority"][nodes.inner]
    _all(higher, nodes.inner, "its priority is above its parent's")


def _verify_times(a: Arrays, nodes: Nodes, clock: int) -> None:
    """Verify the ticks and times of creation. Rows with equal ticks are on one path, without a gap."""
    if not 0 <= clock < _MOST_TIME:
        raise ValueError(f"its clock is {clock}")
    for name, latest in (("tick", clock), ("created", clock + 1)):  # a lock cuts edges at a time between two queries
        time = a[name][nodes.live]
        if name == "created":
            _all(time >= -DETACHED, nodes.live, "created is none of a dropped node")
            time = np.where(time < 0, times_of(time), time)
        _all((time >= 0) & (time <= latest), nodes.live, f"{name} is not between 0 and the clock")
    _all(a["tick"][nodes.above] >= a["tick"][nodes.inner], nodes.inner, "it was used after its parent")
    ticks = np.sort(a["tick"][nodes.live])
    if not (ticks[1:] == ticks[:-1]).any():
        return
    order = nodes.live[np.lexsort((a["end"][nodes.live], a["tick"][nodes.live]))]
    before, after = order[:-1], order[1:]
    tied = a["tick"][before] == a["tick"][after]
    _all(~tied | (a["parent"][after] == before), after, "it has the tick of a node on another path")


def _verify_dropped(a: Arrays, nodes: Nodes) -> None:
    """Verify that all nodes below a dropped node are dropped, and that the highest of them are detached."""
    gone, hidden = a["created"] < 0, are_detached(a["created"])
    _all(~gone[nodes.top] | hidden[nodes.top], nodes.top, "it was dropped, but is not detached")
    _all(~gone[nodes.above] | gone[nodes.inner], nodes.inner, "its parent was dropped, but it was not")
    found = gone[nodes.above] | hidden[nodes.inner] | ~gone[nodes.inner]
    _all(found, nodes.inner, "it was dropped, but is not detached")


def _tags(a: Arrays, live: np.ndarray, options: Options, drawn: np.ndarray) -> np.ndarray:
    """Return int32 [N]: the tags of nodes. Verifies that no two children of a parent begin with the same page.

    Detached nodes do not count there, and have inverted tags. drawn: the multipliers of the page hash.
    """
    page = options.page_size
    pools = [a["tokens"].reshape(-1, page)]
    if options.bigram:
        pools.append(a["seconds"].reshape(-1, page))
    first = a["start"][live] // page
    sums = np.empty(len(live), np.int64)
    step = max(_AT_ONCE // page, 1)
    for at in range(0, len(live), step):
        some = first[at : at + step]
        sums[at : at + step] = sum(pool[some] @ drawn[i * page : (i + 1) * page] for i, pool in enumerate(pools))
    parent = a["parent"][live].astype(np.int64)
    # With one more multiplier, nobody can prepare different (parent, page) with equal sums.
    mixed = sums + parent * multipliers(1, torch.int64).numpy()
    hidden = are_detached(a["created"][live])
    seen = np.flatnonzero(~hidden)
    ordered = np.sort(mixed[seen])
    if (ordered[1:] == ordered[:-1]).any():
        order = seen[np.argsort(mixed[seen])]
        _verify_siblings(order, mixed, parent, [pool[first] for pool in pools], live)
    tags: Any = page_tag(sums, parent)  # type: ignore[arg-type]
    tags = np.where(hidden, ~tags & LOW32, tags)
    return tags.astype(np.uint32).view(np.int32)


def _verify_siblings(
    order: np.ndarray, mixed: np.ndarray, parent: np.ndarray, pages: list[np.ndarray], live: np.ndarray
) -> None:
    """Compare the nodes whose hashes `mixed` are equal. order: of the hashes. pages: [N, page], their first pages."""
    alike = np.flatnonzero(mixed[order[1:]] == mixed[order[:-1]])
    one, other = order[alike], order[alike + 1]
    same = parent[one] == parent[other]
    for page in pages:
        same &= (page[one] == page[other]).all(axis=1)
    _all(~same, live[one], "another child of its parent begins with the same page")
