"""Rows: GPU time of match, lock, write_slots and insert, without the time of Python. Queries are on the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.support.gpu_harness import (
    FEWEST_SETS,
    Measured,
    Row,
    Setup,
    arrays_of,
    assert_lengths,
    cached_sets,
    floor_of,
    gpu_seconds,
    insert_edges,
    measure,
    ragged,
    random_keys,
    slots_for,
)
from flatradix import RadixTree, Ragged

TOKEN = 4  # bytes of a token, and of a slot in the pool
NODE = 16  # bytes of a node that a lock counts: parent and length are read, the lock count is read and written
LOCK_DEPTH, LOCK_EDGE = 64, 16


class Locked:
    """Locks places of a tree; `release` unlocks all of them."""

    def __init__(self, tree: RadixTree) -> None:
        self.tree = tree
        self.places: list[Any] = []

    def match(self, queries: Ragged) -> None:
        self.places.append(self.tree.match(queries, lock=True))

    def lock(self, places: Any) -> None:
        self.tree.lock(places)
        self.places.append(places)

    def release(self) -> None:
        for places in self.places:
            self.tree.unlock(places)
        self.places.clear()


def _match(batch: int, tokens: int, edges: int, setup: Setup) -> Measured:
    shape = setup.shape(batch, tokens, edges)
    tree, _, queries = cached_sets(setup, shape)
    return measure(setup, tree, [partial(tree.match, q) for q in queries], 2 * TOKEN * shape.batch * shape.tokens)


def _match_and_lock(setup: Setup) -> Measured:
    shape = setup.shape(1024, 4096, 8)
    tree, _, queries = cached_sets(setup, shape)
    locked = Locked(tree)
    locked.match(queries[0])
    assert tree.protected_tokens == shape.batch * shape.tokens
    locked.release()
    calls = [partial(locked.match, q) for q in queries]
    moved = shape.batch * (2 * TOKEN * shape.tokens + NODE * shape.edges)
    found = measure(setup, tree, calls, moved, locked.release)
    assert tree.protected_tokens == 0
    return found


def _write_slots(setup: Setup) -> Measured:
    shape = setup.shape(1024, 4096, 8)
    tree, _, queries = cached_sets(setup, shape)
    rows = torch.arange(shape.batch, device=setup.device)
    tables = [torch.zeros(shape.batch, shape.tokens, dtype=torch.int32, device=setup.device) for _ in queries]
    places = [tree.match(q) for q in queries]
    calls = [partial(tree.write_slots, *pair, rows) for pair in zip(places, tables, strict=True)]
    calls[1]()
    assert torch.equal(tables[1], slots_for(tables[1], shape.batch * shape.tokens))
    return measure(setup, tree, calls, 2 * TOKEN * shape.batch * shape.tokens)


def _lock(same: bool, setup: Setup, first: bool = False) -> Measured:
    """Measure locks of paths, all equal with `same`. first: no row has hints of its ancestors, as in a loaded tree."""
    shape = setup.shape(1024, LOCK_DEPTH * max(LOCK_EDGE, setup.page), LOCK_DEPTH)
    keys = random_keys(setup.device, FEWEST_SETS * (1 if same else shape.batch), shape.tokens)
    tree = setup.tree(keys.numel())
    insert_edges(tree, keys, shape.edges)
    batches = [part.expand(shape.batch, -1) for part in keys.chunk(FEWEST_SETS)]
    places = [tree.match(ragged(batch)) for batch in batches]
    for place in places:
        assert_lengths(place.lengths, shape.tokens)
    locked = Locked(tree)
    locked.lock(places[0])
    assert tree.protected_tokens == shape.tokens * (1 if same else shape.batch)
    locked.release()
    nodes = shape.edges * (1 if same else shape.batch)
    calls = [partial(locked.lock, p) for p in places]
    if first:
        hints = arrays_of(tree).scratch.above

        def forget() -> None:
            locked.release()
            hints.zero_()

        forget()
        return Measured(gpu_seconds(setup, calls, forget, once=True), floor_of(setup, NODE * nodes))
    found = measure(setup, tree, calls, NODE * nodes, locked.release)
    assert tree.protected_tokens == 0
    return found


class Inserts:
    """Batches whose keys are cached up to their first half. Each key comes `group` times in a row."""

    def __init__(self, setup: Setup, group: int) -> None:
        shape = setup.shape(1024, 4096, 2)
        self.group = min(group, shape.batch // 2)
        self.half = shape.tokens // 2
        different = shape.batch // self.group
        self.known = random_keys(setup.device, different, self.half)
        self.new = different * self.half
        # Twice the capacity that the batches need, so that no insert compacts.
        self.tree = setup.tree(2 * (FEWEST_SETS + 1) * self.new)
        self.batches = [self._batch(setup, seed, different) for seed in range(2, 2 + FEWEST_SETS)]
        # The first key of a group matches up to its half. The others match all that the first one stored.
        self.expected = torch.full((shape.batch,), shape.tokens, dtype=torch.int32, device=setup.device)
        self.expected[:: self.group] = self.half
        # All tokens are read, and the cached halves once. New tokens are written; new slots are read and written.
        self.moved = TOKEN * (shape.batch * shape.tokens + self.known.numel() + 3 * self.new)

    def _batch(self, setup: Setup, seed: int, different: int) -> tuple[Ragged, Ragged]:
        tails = random_keys(setup.device, different, self.half, seed, first=seed * different)
        keys = torch.cat([self.known, tails], dim=1)
        keys = keys.repeat_interleave(self.group, dim=0)
        return ragged(keys), ragged(slots_for(keys))

    def restore(self) -> None:
        self.tree.reset()
        self.tree.insert(ragged(self.known), ragged(slots_for(self.known)))
        assert self.tree.total_tokens == self.known.numel()

    def check(self) -> None:
        for number, batch in enumerate(self.batches, 1):
            assert torch.equal(self.tree.insert(*batch).prefix_lengths, self.expected)
            assert self.tree.total_tokens == self.known.numel() + number * self.new


def _insert(group: int, setup: Setup) -> Measured:
    inserts = Inserts(setup, group)
    inserts.restore()
    inserts.check()
    inserts.restore()
    calls = [partial(inserts.tree.insert, *batch) for batch in inserts.batches]
    taken = gpu_seconds(setup, calls, inserts.restore, once=True)
    return Measured(taken, floor_of(setup, inserts.moved))


def _match_row(batch: int, tokens: int, edges: int, target: float) -> Row:
    path = f"{edges} edge" + ("s" if edges > 1 else "")
    slow = batch * tokens > 1 << 22
    call = partial(_match, batch, tokens, edges)
    return Row(f"match-{batch}x{tokens}-{edges}", f"match {batch} x {tokens}, {path}", target, call, slow=slow)


ROWS = [
    _match_row(1, 4096, 8, 10),
    _match_row(64, 4096, 8, 11),
    _match_row(1024, 128, 1, 7),
    _match_row(1024, 4096, 8, 14),
    _match_row(1024, 4096, 1, 10),
    _match_row(8192, 4096, 8, 75),
    _match_row(1024, 32768, 64, 120),
    _match_row(256, 131072, 32, 150),
    _match_row(1, 131072, 256, 12),
    _match_row(1, 131072, 2048, 14),
    _match_row(1, 1048576, 2048, 30),
    _match_row(64, 32768, 64, 18),
    Row("match-and-lock", "match and lock 1024 x 4096, 8 edges", 20, _match_and_lock),
    Row("write-slots", "write the slots of 1024 x 4096, 8 edges", 16, _write_slots),
    Row("lock-paths", "lock 1024 paths of depth 64", 14, partial(_lock, False)),
    Row("lock-paths-first", "the same, none of them locked before", None, partial(_lock, False, first=True)),
    Row("lock-path", "lock 1024 times the same path of depth 64", 14, partial(_lock, True)),
    Row("insert-distinct", "insert 1024 x 4096, half known, new halves distinct", 100, partial(_insert, 1)),
    Row("insert-groups", "insert 1024 x 4096, half known, each key 8 times", 150, partial(_insert, 8)),
]
