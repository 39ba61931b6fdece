"""A check of every invariant of a tree, for tests and debugging. Slow, in plain numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

from flatradix.dropping import are_detached
from flatradix.inspect.content import Content
from flatradix.inspect.nodes import columns_of, units_of
from flatradix.layout import numbers
from flatradix.layout.state import FREE_ROW

_UINT32 = 0xFFFFFFFF


def check(content: Content) -> None:
    """Raise AssertionError with the first invariant that does not hold."""
    a = columns_of(content)
    _check_sizes(content, a)
    _check_edges(content, a)
    _check_relations(content, a)
    _check_table(content, a)
    _check_pool(content, a)
    _check_rows(content, a)
    if content.is_on_host:
        _check_queue(content, a)
    _check_slots(content, a)  # last: this alone is the caller's doing


def _all(holds: np.ndarray, rows: np.ndarray, what: str) -> None:
    if not holds.all():
        raise AssertionError(f"row {int(rows[np.flatnonzero(~holds)[0]])}: {what}")


def equal(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise AssertionError(f"{what}: {found}, but it should be {wanted}")


def _check_sizes(content: Content, a: Any) -> None:
    locked = a.lock_ref[a.live] > 0
    lengths = a.length[a.live].astype(np.int64)
    equal(content.nodes, len(a.live), "num_nodes")
    equal(content.protected, int(lengths[locked].sum()), "protected_tokens")
    equal(content.evictable, int(lengths[~locked].sum()), "evictable_tokens")
    total, most = content.evictable + content.protected, content.options.max_tokens
    if total > most:
        raise AssertionError(f"{total} tokens in a tree of {most}")


def _check_edges(content: Content, a: Any) -> None:
    live = a.live
    above = a.parent[live]
    top = above < 0
    begins = np.where(top, 0, a.end[np.where(top, 0, above)])
    _all(a.length[live] > 0, live, "its edge is empty")
    _all(above != 0, live, "its parent is the root, not a namespace")
    _all(a.length[live] % content.options.page_size == 0, live, "its edge is not of whole pages")
    _all(a.end[live] == begins + a.length[live], live, "its end is not its parent's end and its edge")
    _all(top | (a.parent[np.where(top, 0, above)] != FREE_ROW), live, "its parent is free")
    for row in live.tolist():
        begin, end = int(a.start[row]), int(a.start[row]) + int(a.length[row])
        if (a.tokens[begin:end] < 0).any():
            raise AssertionError(f"row {row}: a token on its edge is negative")
        if content.options.bigram and (a.seconds[begin : end - 1] != a.tokens[begin + 1 : end]).any():
            raise AssertionError(f"row {row}: neighbouring pairs on its edge do not overlap")


def _check_relations(content: Content, a: Any) -> None:
    rows = len(a.parent)
    live = a.live
    inner = live[a.parent[live] > 0]
    above = a.parent[inner]
    _all(a.children[live] == np.bincount(above, minlength=rows)[live], live, "children is wrong")
    below = np.bincount(above, weights=a.lock_ref[inner], minlength=rows).astype(np.int64)
    _all(a.lock_ref[live] == a.own_locks[live] + below[live], live, "lock_ref is not its own and its children's")
    _all(a.own_locks[live] >= 0, live, "own_locks is negative")
    below = np.bincount(above, weights=a.wanted[inner], minlength=rows).astype(np.int64)
    # On the host, a waiting queue that keeps adds to `wanted` at the rows of its prompts' matches.
    _all(a.wanted[live] >= a.own_wants[live] + below[live], live, "wanted is less than its own and its children's")
    _all(a.own_wants[live] >= 0, live, "own_wants is negative")
    _all(a.tick[above] >= a.tick[inner], inner, "it was used after its parent")
    _all(a.priority[above] >= a.priority[inner], inner, "its priority is above its parent's")
    gone = a.created < 0
    _all(gone[inner] | ~gone[above], inner, "its parent was dropped, but it was not")
    hidden = are_detached(a.created[live])
    _all(hidden | ~gone[live] | gone[np.maximum(a.parent[live], 0)], live, "it was dropped, but is not detached")
    _all(~gone[live] | (a.own_wants[live] == 0), live, "it was dropped, but has soft pins")
    _all(a.tick[live] <= content.number(numbers.CLOCK), live, "its tick is in the future")
    top = ~a.parent[live[a.parent[live] < 0]]
    counts = content.state.namespace_children
    equal(counts.sum(), len(top), "nodes counted in namespaces")
    equal(counts[: top.max() + 1].tolist() if len(top) else [], np.bincount(top).tolist(), "namespace_children")
    named = {code for code, _ in content.names} - {0}
    equal(named, set(top.tolist()) - {0}, "namespaces with a name")


def _entries(content: Content, a: Any) -> tuple[np.ndarray, int]:
    """Return the child table as int64 [entries] of (tag, row), tombs included, and its mask.

    Checks the edges that a child table on a GPU holds beside its rows.
    """
    mask = content.number(numbers.TABLE_MASK)
    table = content.state.child_table
    if content.is_on_host:
        return table[: mask + 1], mask
    places = table.reshape(-1, 2)
    for place in np.flatnonzero(places[:, 0] & _UINT32).tolist():
        row, edge = int(places[place, 0]) & _UINT32, int(places[place, 1])
        equal((edge & _UINT32, edge >> 32), (int(a.start[row]), int(a.length[row])), f"row {row}: edge in the table")
    return places[:, 0], mask


def _check_table(content: Content, a: Any) -> None:
    table, mask = _entries(content, a)
    filled = np.flatnonzero(table & _UINT32)
    equal(sorted((table[filled] & _UINT32).tolist()), a.live.tolist(), "rows in the child table")
    if 2 * np.count_nonzero(table) > mask + 1:
        raise AssertionError(f"{np.count_nonzero(table)} entries in a child table of {mask + 1}")
    for place in filled.tolist():
        row, tag = int(table[place]) & _UINT32, (int(table[place]) >> 32) & _UINT32
        equal(int(a.tag[row]) & _UINT32, tag, f"row {row}: tag")
        probe = tag & mask
        while probe != place:
            if table[probe] == 0:
                raise AssertionError(f"row {row}: a probe for its entry ends before it")
            probe = (probe + 1) & mask
    found = a.live[~are_detached(a.created[a.live])].tolist()
    pages = {(int(a.parent[row]), tuple(units_of(a, row)[: content.options.page_size])) for row in found}
    equal(len(pages), len(found), "children of one parent with different first pages")


def _check_pool(content: Content, a: Any) -> None:
    page, pages = content.options.page_size, content.number(numbers.POOL_PAGES)
    owners = np.zeros(pages if content.is_on_host else 2 * pages, np.int64)
    for row in a.live.tolist():
        begin = int(a.start[row])
        equal(begin % page, 0, f"row {row}: place in a page")
        owners[begin // page : (begin + int(a.length[row])) // page] += 1
    if owners.max(initial=0) > 1:
        raise AssertionError(f"pool page {int(owners.argmax())} belongs to {int(owners.max())} edges")
    if not content.is_on_host:
        first, cursor = (content.number(numbers.POOL_END) // page - pages, content.number(numbers.POOL_CURSOR) // page)
        equal(owners[:first].any() or owners[cursor:].any(), False, "edges outside the part of the pool in use")
        return
    words = content.state.used
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:pages]
    equal(np.flatnonzero(bits != owners).tolist(), [], "pool pages whose mark is wrong")


def _check_slots(content: Content, a: Any) -> None:
    """Check that no path has a slot twice: an insert brought it twice, and it would come back twice.

    Only units of live edges are read. Different keys may have equal slots: whose these are is the caller's affair.
    """
    live, lengths = a.live, a.length[a.live].astype(np.int64)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    rows = np.repeat(live, lengths)
    slots = content.slots[a.start[rows].astype(np.int64) + within]
    order = np.argsort(slots, kind="stable")
    twice = slots[order[1:]] == slots[order[:-1]]
    several = order[np.append(twice, False) | np.append(False, twice)] if len(order) else order
    seen: dict[tuple[int, int], int] = {}  # by slot and row: the path length of the unit
    for unit in several.tolist():
        row, slot = int(rows[unit]), int(slots[unit])
        at = int(a.end[row] - a.length[row] + within[unit])
        if (slot, row) in seen:
            raise AssertionError(_twice(slot, (row, seen[slot, row]), (row, at)))
        seen[slot, row] = at
    for (slot, row), at in seen.items():
        above = int(a.parent[row])
        while above > 0:
            if (slot, above) in seen:
                raise AssertionError(_twice(slot, (above, seen[slot, above]), (row, at)))
            above = int(a.parent[above])


def _twice(slot: int, first: tuple[int, int], second: tuple[int, int]) -> str:
    where = [f"at path length {at} of row {row}" for row, at in (first, second)]
    return f"slot {slot} is twice on a path, {where[0]} and {where[1]}: give each token of an insert a slot of its own"


def _check_rows(content: Content, a: Any) -> None:
    count = content.number(numbers.FREE_ROWS)
    free = content.state.free_rows[:count]
    equal(sorted([*free.tolist(), *a.live.tolist()]), list(range(1, len(a.parent))), "rows, free and in use")
    equal(content.number(numbers.RELEASED), 0, "released namespaces that wait")


def _check_queue(content: Content, a: Any) -> None:
    heap, capacity = content.number(numbers.HEAP_SIZE), content.number(numbers.ROW_CAPACITY)
    run = capacity + (content.number(numbers.RUN_HEAD) + np.arange(content.number(numbers.RUN_LENGTH))) % capacity
    rows, scores, ticks = content.state.queue_row, content.state.queue_score, content.state.queue_tick
    places = np.concatenate([np.arange(heap), run])
    equal(sorted(rows[places].tolist()), np.flatnonzero(a.queued).tolist(), "rows in the queue")
    if content.options.order.score is not None:
        equal(len(places), 0, "entries in the queue of a policy that scores all nodes")
        return
    above = np.concatenate([(np.arange(1, heap) - 1) // numbers.HEAP_ARITY, run[:-1]])
    below = np.concatenate([np.arange(1, heap), run[1:]])
    tied = scores[above] == scores[below]
    in_order = (scores[above] < scores[below]) | (tied & (ticks[above] <= ticks[below]))
    _all(in_order, rows[below], "it stands behind a later one in the queue")
    candidates = a.live[(a.children[a.live] == 0) & (a.lock_ref[a.live] == 0) & (a.wanted[a.live] == 0)]
    equal(sorted(set(candidates.tolist()) - set(rows[places].tolist())), [], "candidates that are not in the queue")
    _all(ticks[places] <= a.tick[rows[places]], rows[places], "its entry in the queue is later than its tick")
