"""Rows: insert, lock and evict."""

from __future__ import annotations

import itertools
import statistics
import time
from functools import partial

from bench.support.harness import Measured, Row, Setup, Side, compare, slot_range
from bench.support.workloads import Both, distinct_keys, random_key

EDGE = 131072
HELD = 16
CHUNK = 512
LEAF = 64


def _insert_edge(setup: Setup) -> Measured:
    """Measure inserts into a full tree. After each insert, an untimed eviction frees the oldest edge."""
    both = Both(setup, (HELD + 1) * EDGE, 1)
    keys = [random_key(EDGE, seed) for seed in range(2 * HELD)]
    slots = slot_range(EDGE)
    for key in keys[:HELD]:
        both.insert(key, slots)
    coming = itertools.cycle(keys[HELD:] + keys[:HELD])
    ours = Side(lambda: both.ours.insert(next(coming), slots), partial(both.ours.evict, EDGE))
    if both.theirs is None:
        return compare(setup, ours, None)
    theirs = both.theirs
    classes, insert = theirs.classes, theirs.cache.insert
    params = [classes.InsertParams(key=theirs.key(key), value=slots) for key in keys[HELD:] + keys[:HELD]]
    theirs_coming = itertools.cycle(params)
    return compare(setup, ours, Side(lambda: insert(next(theirs_coming)), partial(theirs.evict, EDGE)))


def _insert_growing(setup: Setup) -> Measured:
    """Measure inserts into a tree that fills up: each edge takes memory that the process has not used before."""
    keys = [random_key(EDGE, seed) for seed in range(2 * HELD)]
    slots = slot_range(EDGE)
    both = Both(setup, len(keys) * EDGE, 1)
    ours: list[float] = []
    theirs: list[float] = []
    for key in keys:
        start = time.perf_counter()
        both.ours.insert(key, slots)
        ours.append(time.perf_counter() - start)
        if both.theirs is not None:
            params = both.theirs.classes.InsertParams(key=both.theirs.key(key), value=slots)
            start = time.perf_counter()
            both.theirs.cache.insert(params)
            theirs.append(time.perf_counter() - start)
    return Measured(statistics.median(ours), statistics.median(theirs) if theirs else None)


def _insert_chunk(setup: Setup) -> Measured:
    """Measure one chunk of a chunked prefill. Ours continues from the request's place; SGLang gets its length."""
    both = Both(setup, 2 * EDGE, 1)
    key, slots = random_key(EDGE + CHUNK), slot_range(EDGE + CHUNK)
    both.insert_edges(key[:EDGE], [CHUNK] * (EDGE // CHUNK - 2) + [2 * CHUNK])
    held = both.ours.match(key[:EDGE], lock=True)
    assert held.length == EDGE
    assert both.ours.num_nodes == 255
    insert = partial(both.ours.insert, key[EDGE:], slots[EDGE:], start=held)
    ours = Side(insert, partial(both.ours.evict, CHUNK))
    if both.theirs is None:
        return compare(setup, ours, None)
    theirs = both.theirs
    length, node = theirs.match(key[:EDGE])
    assert length == EDGE
    theirs.lock(node)
    params = theirs.classes.InsertParams(key=theirs.key(key), value=slots, prev_prefix_len=EDGE, inserted_len=EDGE)
    return compare(setup, ours, Side(partial(theirs.cache.insert, params), partial(theirs.evict, CHUNK)))


def _lock(nodes: int, setup: Setup) -> Measured:
    both = Both(setup, nodes * LEAF, LEAF)
    key = random_key(nodes * LEAF)
    both.insert_edges(key, [LEAF] * nodes)
    tree, place = both.ours, both.ours.match(key)

    def ours() -> None:
        tree.lock(place)
        tree.unlock(place)

    if both.theirs is None:
        return compare(setup, Side(ours), None)
    cache, node = both.theirs.cache, both.theirs.match(key)[1]

    def theirs() -> None:
        cache.unlock(cache.lock(node))

    return compare(setup, Side(ours), Side(theirs))


def _evict_one(nodes: int, their_calls: int, setup: Setup) -> Measured:
    """Measure the mean time of consecutive evictions. Runs of the two trees alternate."""
    both = Both(setup, nodes * LEAF, LEAF)
    both.fill_leaves(nodes, LEAF)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(1000):
            both.ours.evict(LEAF)
        ours.append((time.perf_counter() - start) / 1000)
        if both.theirs is not None:
            cache, params = both.theirs.cache, both.theirs.classes.EvictParams(num_tokens=LEAF)
            start = time.perf_counter()
            for _ in range(their_calls):
                cache.evict(params)
            theirs.append((time.perf_counter() - start) / their_calls)
    assert both.ours.num_nodes == nodes - 3000
    note = f"mean of 1000 in a row, theirs of {their_calls}"
    return Measured(statistics.median(ours), statistics.median(theirs) if theirs else None, note)


def _evict_percent(setup: Setup) -> Measured:
    both = Both(setup, 100_000 * LEAF, LEAF)
    both.fill_leaves(100_000, LEAF)
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(7):
        start = time.perf_counter()
        freed = both.ours.evict(1000 * LEAF)
        ours.append(time.perf_counter() - start)
        assert freed.num_nodes == 1000
        if both.theirs is not None:
            params = both.theirs.classes.EvictParams(num_tokens=1000 * LEAF)
            start = time.perf_counter()
            both.theirs.cache.evict(params)
            theirs.append(time.perf_counter() - start)
    return Measured(statistics.median(ours), statistics.median(theirs) if theirs else None)


def _compact(nodes: int, setup: Setup) -> Measured:
    """Measure the longest of the compactions of a tree each half of which was renewed by eviction before."""
    tree = setup.tree(nodes * LEAF, LEAF)
    tree.compact()  # compiles
    batch, half = 10_000, nodes // 2
    ours: list[float] = []
    for first in range(0, 6 * half, batch):
        keys = distinct_keys(first, batch, LEAF)
        slots = slot_range(keys.size, first % nodes * LEAF).reshape(keys.shape)
        tree.evict(max(0, tree.total_tokens + keys.size - tree.max_tokens))
        tree.insert(list(keys), list(slots))
        if first >= 2 * half - batch and (first + batch) % half == 0:
            start = time.perf_counter()
            tree.compact()
            ours.append(time.perf_counter() - start)
    return Measured(max(ours), None, f"the longest of {len(ours)}")


ROWS = [
    Row("insert-full", "insert a new edge of 131072 tokens, full tree", "us", 0.25, _insert_edge),
    Row("insert-growing", "insert a new edge of 131072 tokens, growing tree", "us", 0.25, _insert_growing),
    Row("insert-chunk", "insert 512 tokens behind 131072 on 255 edges", "us", 0.02, _insert_chunk),
    Row("lock-1", "lock and unlock a path of 1 node", "us", 0.4, partial(_lock, 1)),
    Row("lock-1024", "lock and unlock a path of 1024 nodes", "us", 0.3, partial(_lock, 1024)),
    Row("evict-100k", "evict one node of 100k", "us", 0.02, partial(_evict_one, 100_000, 100)),
    Row("evict-1m", "evict one node of 1M", "us", 0.01, partial(_evict_one, 1_000_000, 20), slow=True),
    Row("evict-percent", "evict 1 % of 100k nodes in one call", "us", 0.05, _evict_percent),
    Row(
        "compact-1m",
        "compact 1M nodes, half renewed",
        "ms",
        200,
        partial(_compact, 1_000_000),
        absolute=True,
        slow=True,
    ),
]
