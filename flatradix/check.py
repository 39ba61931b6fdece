"""Every invariant of a tree, and the tree as a list of nodes. For tests and for looking; slow, in plain numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flatradix import meta
from flatradix.kernels.scalar import ROW_MASK
from flatradix.layout import COLUMNS, FREE_ROW
from flatradix.namespaces import Namespace

if TYPE_CHECKING:
    from flatradix.prefix_cache import PrefixCache
    from flatradix.tree import RadixTree

_UINT32 = 0xFFFFFFFF


class NodeView(NamedTuple):
    """One node, read out. `path` holds all units from the root to the node's end: ints, or pairs with bigrams."""

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
    priority: int
    hit_count: int
    children: int


class _Arrays:
    """The state in numpy, cut to the rows in use."""

    def __init__(self, tree: RadixTree) -> None:
        state = tree._state
        self.meta = state.meta.cpu().numpy()
        rows = int(self.meta[meta.ROWS])
        for name in COLUMNS:
            setattr(self, name, getattr(state, name)[:rows].cpu().numpy())
        self.live = 1 + np.flatnonzero(self.parent[1:] != FREE_ROW)
        self.tokens = state.tokens.cpu().numpy()
        self.seconds = state.seconds.cpu().numpy()

    parent: np.ndarray
    start: np.ndarray
    length: np.ndarray
    end: np.ndarray
    children: np.ndarray
    lock_ref: np.ndarray
    own_locks: np.ndarray
    hit_count: np.ndarray
    tag: np.ndarray
    queued: np.ndarray
    tick: np.ndarray
    created: np.ndarray
    priority: np.ndarray
    generation: np.ndarray

    def units(self, row: int) -> list:
        """The units on the edge of a row."""
        begin = int(self.start[row])
        end = begin + int(self.length[row])
        first = self.tokens[begin:end].tolist()
        if not len(self.seconds):
            return first
        return list(zip(first, self.seconds[begin:end].tolist(), strict=True))


def nodes_of(tree: RadixTree) -> list[NodeView]:
    """All nodes, parents before their children. O(sum of the path lengths)."""
    a = _Arrays(tree)
    pool = tree._pool.cpu().numpy()
    views: list[NodeView] = []
    paths: dict[int, tuple] = {}
    names: dict[int, Namespace] = {}
    for row in a.live[np.argsort(a.end[a.live], kind="stable")].tolist():
        above = int(a.parent[row])
        names[row] = tree._namespaces.name(~above) if above < 0 else names[above]
        paths[row] = paths.get(above, ()) + tuple(a.units(row))
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
                created=int(a.created[row]),
                priority=int(a.priority[row]),
                hit_count=int(a.hit_count[row]),
                children=int(a.children[row]),
            )
        )
    return views


def check(tree: RadixTree) -> None:
    """Raise AssertionError with the first invariant that does not hold."""
    tree.raise_pending()
    a = _Arrays(tree)
    _check_sizes(tree, a)
    _check_edges(tree, a)
    _check_relations(tree, a)
    _check_table(tree, a)
    _check_pool(tree, a)
    _check_rows(tree, a)
    if _on_host(tree):
        _check_queue(tree, a)


def check_cache(cache: PrefixCache) -> None:
    """Raise AssertionError unless every slot of a PrefixCache is in one place, and each row of its table is right."""
    counts = cache.counts()
    check(cache.tree)
    a = _Arrays(cache.tree)
    edges = zip(a.start[a.live].tolist(), a.length[a.live].tolist(), strict=True)
    pool = cache.tree._pool.cpu().numpy().astype(np.int64)
    table = cache.table.cpu().numpy().astype(np.int64)
    running = list(cache._running.values())
    ends = [cache._in_pages(request.length) for request in running]
    held = [table[request.row, request.committed : end] for request, end in zip(running, ends, strict=True)]
    cached = [pool[begin : begin + length] for begin, length in edges]
    free = cache._allocator.free_list().cpu().numpy()
    where = np.concatenate([free, *cached, *held])
    _equal(counts.free + counts.evictable + counts.protected + counts.held, counts.slots, "slots in all")
    _equal(np.sort(where).tolist(), list(range(counts.slots)), "slots that are free, cached or held")
    places = cache._held(running)
    _equal(places.lengths.tolist(), [request.committed for request in running], "places that requests hold")
    holders = np.bincount(places.handles.cpu().numpy() & ROW_MASK, minlength=len(a.parent))
    holders[0] = 0  # nothing is locked at the root
    _equal(holders[a.live].tolist(), a.own_locks[a.live].tolist(), "requests that hold each node")
    for request, slots in zip(running, cache.tree.slots(places).to_list(), strict=True):
        _equal(table[request.row, : request.committed].tolist(), slots, f"row {request.row} of the table")
    rows = sorted([*cache._free_rows, *cache._running])
    _equal(rows, list(range(len(cache.table))), "rows that are free or in use")


def _all(holds: np.ndarray, rows: np.ndarray, what: str) -> None:
    if not holds.all():
        raise AssertionError(f"row {int(rows[np.flatnonzero(~holds)[0]])}: {what}")


def _equal(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise AssertionError(f"{what}: {found}, but it should be {wanted}")


def _check_sizes(tree: RadixTree, a: _Arrays) -> None:
    locked = a.lock_ref[a.live] > 0
    lengths = a.length[a.live].astype(np.int64)
    _equal(tree.num_nodes, len(a.live), "num_nodes")
    _equal(tree.protected_tokens, int(lengths[locked].sum()), "protected_tokens")
    _equal(tree.evictable_tokens, int(lengths[~locked].sum()), "evictable_tokens")
    if tree.total_tokens > tree.max_tokens:
        raise AssertionError(f"{tree.total_tokens} tokens in a tree of {tree.max_tokens}")


def _check_edges(tree: RadixTree, a: _Arrays) -> None:
    live = a.live
    above = a.parent[live]
    top = above < 0
    begins = np.where(top, 0, a.end[np.where(top, 0, above)])
    _all(a.length[live] > 0, live, "its edge is empty")
    _all(above != 0, live, "its parent is the root, not a namespace")
    _all(a.length[live] % tree.page_size == 0, live, "its edge is not of whole pages")
    _all(a.end[live] == begins + a.length[live], live, "its end is not its parent's end and its edge")
    _all(top | (a.parent[np.where(top, 0, above)] != FREE_ROW), live, "its parent is free")
    for row in live.tolist():
        begin, end = int(a.start[row]), int(a.start[row]) + int(a.length[row])
        if (a.tokens[begin:end] < 0).any():
            raise AssertionError(f"row {row}: a token on its edge is negative")
        if tree.bigram and (a.seconds[begin : end - 1] != a.tokens[begin + 1 : end]).any():
            raise AssertionError(f"row {row}: neighbouring pairs on its edge do not overlap")


def _check_relations(tree: RadixTree, a: _Arrays) -> None:
    rows = len(a.parent)
    live = a.live
    inner = live[a.parent[live] > 0]
    above = a.parent[inner]
    _all(a.children[live] == np.bincount(above, minlength=rows)[live], live, "children is wrong")
    below = np.bincount(above, weights=a.lock_ref[inner], minlength=rows).astype(np.int64)
    _all(a.lock_ref[live] == a.own_locks[live] + below[live], live, "lock_ref is not its own and its children's")
    _all(a.own_locks[live] >= 0, live, "own_locks is negative")
    _all(a.tick[above] >= a.tick[inner], inner, "it was used after its parent")
    _all(a.priority[above] >= a.priority[inner], inner, "its priority is above its parent's")
    _all(a.tick[live] <= int(a.meta[meta.CLOCK]), live, "its tick is in the future")
    top = ~a.parent[live[a.parent[live] < 0]]
    counts = tree._state.namespace_children.cpu().numpy()
    _equal(counts.sum(), len(top), "nodes counted in namespaces")
    _equal(counts[: top.max() + 1].tolist() if len(top) else [], np.bincount(top).tolist(), "namespace_children")
    named = {code for code, _ in tree._namespaces.items()} - {0}
    _equal(named, set(top.tolist()) - {0}, "namespaces with a name")


def _entries(tree: RadixTree, a: _Arrays) -> tuple[np.ndarray, int]:
    """The child table as int64 [places] of (tag, row), tombs included, and its mask."""
    mask = int(a.meta[meta.TABLE_MASK])
    table = tree._state.table.cpu().numpy()
    if _on_host(tree):
        return table[: mask + 1], mask
    places = table.reshape(-1, 2)
    for place in np.flatnonzero(places[:, 0] & _UINT32).tolist():
        row, edge = int(places[place, 0]) & _UINT32, int(places[place, 1])
        _equal((edge & _UINT32, edge >> 32), (int(a.start[row]), int(a.length[row])), f"row {row}: edge in the table")
    return places[:, 0], mask


def _check_table(tree: RadixTree, a: _Arrays) -> None:
    table, mask = _entries(tree, a)
    filled = np.flatnonzero(table & _UINT32)
    _equal(sorted((table[filled] & _UINT32).tolist()), a.live.tolist(), "rows in the child table")
    if 2 * np.count_nonzero(table) > mask + 1:
        raise AssertionError(f"{np.count_nonzero(table)} entries in a child table of {mask + 1} places")
    for place in filled.tolist():
        row, tag = int(table[place]) & _UINT32, (int(table[place]) >> 32) & _UINT32
        _equal(int(a.tag[row]) & _UINT32, tag, f"row {row}: tag")
        probe = tag & mask
        while probe != place:
            if table[probe] == 0:
                raise AssertionError(f"row {row}: a probe for its entry ends before it")
            probe = (probe + 1) & mask
    pages = {(int(a.parent[row]), tuple(a.units(row)[: tree.page_size])) for row in a.live.tolist()}
    _equal(len(pages), len(a.live), "children of one parent with different first pages")


def _on_host(tree: RadixTree) -> bool:
    """Whether the tree has what only one in host memory has: a bitmap of its pools and an eviction queue."""
    return len(tree._state.used) > 0


def _check_pool(tree: RadixTree, a: _Arrays) -> None:
    page, pages = tree.page_size, int(a.meta[meta.POOL_PAGES])
    owners = np.zeros(pages if _on_host(tree) else 2 * pages, np.int64)
    for row in a.live.tolist():
        begin = int(a.start[row])
        _equal(begin % page, 0, f"row {row}: place in a page")
        owners[begin // page : (begin + int(a.length[row])) // page] += 1
    if owners.max(initial=0) > 1:
        raise AssertionError(f"pool page {int(owners.argmax())} belongs to {int(owners.max())} edges")
    if not _on_host(tree):
        first, cursor = (int(a.meta[meta.POOL_END]) // page - pages, int(a.meta[meta.POOL_CURSOR]) // page)
        _equal(owners[:first].any() or owners[cursor:].any(), False, "edges outside the part of the pool in use")
        return
    words = tree._state.used.cpu().numpy()
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:pages]
    _equal(np.flatnonzero(bits != owners).tolist(), [], "pool pages whose mark is wrong")


def _check_rows(tree: RadixTree, a: _Arrays) -> None:
    count = int(a.meta[meta.FREE_ROWS])
    free = tree._state.free_rows[:count].cpu().numpy()
    _equal(sorted([*free.tolist(), *a.live.tolist()]), list(range(1, len(a.parent))), "rows, free and in use")
    _equal(int(a.meta[meta.RELEASED]), 0, "released namespaces that wait")


def _check_queue(tree: RadixTree, a: _Arrays) -> None:
    heap, capacity = int(a.meta[meta.HEAP]), int(a.meta[meta.ROW_CAPACITY])
    run = capacity + (int(a.meta[meta.RUN_HEAD]) + np.arange(int(a.meta[meta.RUN]))) % capacity
    rows, scores, ticks = (
        column.cpu().numpy() for column in (tree._state.queue_row, tree._state.queue_score, tree._state.queue_tick)
    )
    places = np.concatenate([np.arange(heap), run])
    _equal(sorted(rows[places].tolist()), np.flatnonzero(a.queued).tolist(), "rows in the queue")
    if tree._score is not None:
        _equal(len(places), 0, "entries in the queue of a policy that scores all nodes")
        return
    above = np.concatenate([(np.arange(1, heap) - 1) // meta.HEAP_ARITY, run[:-1]])
    below = np.concatenate([np.arange(1, heap), run[1:]])
    equal = scores[above] == scores[below]
    in_order = (scores[above] < scores[below]) | (equal & (ticks[above] <= ticks[below]))
    _all(in_order, rows[below], "it stands behind a later one in the queue")
    candidates = a.live[(a.children[a.live] == 0) & (a.lock_ref[a.live] == 0)]
    _equal(sorted(set(candidates.tolist()) - set(rows[places].tolist())), [], "candidates that are not in the queue")
    _all(ticks[places] <= a.tick[rows[places]], rows[places], "its entry in the queue is later than its tick")
