"""flatradix compared with SGLang's two trees: equal lengths, slots, sizes and victims after equal calls.

A match of SGLang splits the edge on which it ends; flatradix splits it at the lock. So each match here locks at once,
on both sides, and after each step both trees have equal nodes. Skipped if SGLang is not installed.
"""

from __future__ import annotations

import itertools
import random
import time
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.support import sglang_trees
from flatradix import RadixTree

POLICIES = ["lru", "lfu", "slru", "fifo", "mru", "filo", "priority"]
NAMESPACES = [None, None, "adapter", "tenant"]
STEPS = 200


@pytest.fixture(scope="module", autouse=True)
def _peer() -> Iterator[None]:
    """Give SGLang a clock that never shows the same time twice, so that its order of victims is defined."""
    try:
        module = sglang_trees.load().radix_module
    except sglang_trees.PeerMissing as reason:
        pytest.skip(str(reason))
    clock = SimpleNamespace(monotonic=itertools.count(1).__next__, perf_counter=time.perf_counter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", clock)
        yield


class Keys:
    """Random keys that share prefixes, made of three kinds of pages that differ only in their last token."""

    def __init__(self, rng: random.Random, page_size: int) -> None:
        self._rng = rng
        self._page_size = page_size
        self._known: list[list[int]] = [[]]

    def draw(self, longest: int = 10) -> array[int]:
        """Draw a known key, mostly cut, and continue it. Some keys end with an incomplete page."""
        rng, page = self._rng, self._page_size
        stem = rng.choice(self._known[-30:])
        key = stem[: rng.randint(0, len(stem))] if rng.random() < 0.7 else list(stem)
        key = key[: len(key) // page * page] if rng.random() < 0.8 else key
        for _ in range(rng.randint(0, max(0, longest - len(key) // page))):
            key += [7] * (page - 1) + [rng.randrange(3)]
        if rng.random() < 0.3:
            key += [7] * rng.randrange(page + 1)
        self._known.append(key)
        return array("q", key)


class Pair:
    """Both trees, driven by the same calls. Every method asserts that their results are equal."""

    def __init__(self, theirs: sglang_trees.PythonTree | sglang_trees.RustTree, ours: RadixTree) -> None:
        self.theirs = theirs
        self.ours = ours
        self.locks: list[tuple[Any, Any]] = []
        self._next_slot = 0

    def lock_match(self, key: array[int], namespace: str | None) -> None:
        match = self.ours.match(key, namespace=namespace, lock=True)
        length, node = self.theirs.match(key, namespace)
        assert match.length == length
        assert self.ours.slots(match).values.tolist() == self.theirs.slots(node).tolist()
        self.locks.append((match, self.theirs.lock(node)))

    def unlock(self, index: int) -> None:
        match, token = self.locks.pop(index)
        self.ours.unlock(match)
        self.theirs.unlock(token)

    def insert(self, key: array[int], namespace: str | None, priority: int, inserted: int) -> None:
        slots = torch.arange(self._next_slot, self._next_slot + len(key))
        self._next_slot += len(key)
        result = self.ours.insert(key, slots, namespace=namespace, priority=priority, inserted_lengths=inserted)
        assert result.prefix_length == self.theirs.insert(key, slots, namespace, priority, inserted)

    def evict(self, num_tokens: int) -> None:
        assert self.ours.evict(num_tokens).slots.tolist() == self.theirs.evict(num_tokens).tolist()

    def compare_sizes(self) -> None:
        assert (self.ours.evictable_tokens, self.ours.protected_tokens) == (
            self.theirs.evictable,
            self.theirs.protected,
        )


def _step(pair: Pair, rng: random.Random, keys: Keys) -> None:
    draw = rng.random()
    namespace = rng.choice(NAMESPACES)
    if draw < 0.35:
        key = keys.draw()
        inserted = rng.choice([0, 0, rng.randint(0, len(key))])
        pair.insert(key, namespace, rng.randint(-2, 3), inserted)
    elif draw < 0.65:
        pair.lock_match(keys.draw(), namespace)
        if rng.random() < 0.6:
            pair.unlock(len(pair.locks) - 1)
    elif draw < 0.8 and pair.locks:
        pair.unlock(rng.randrange(len(pair.locks)))
    else:
        pair.evict(rng.choice([1, rng.randint(0, max(1, pair.theirs.evictable // 3))]))


def _run(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    keys = Keys(rng, pair.ours.page_size)
    for _ in range(STEPS):
        _step(pair, rng, keys)
        pair.compare_sizes()
    while pair.locks:
        pair.unlock(0)
        pair.compare_sizes()
    pair.ours.check()
    while pair.theirs.evictable:
        pair.evict(pair.theirs.evictable // 2 + 1)
    assert pair.ours.total_tokens == pair.ours.num_nodes == 0


def _tree(page_size: int, policy: str = "lru", bigram: bool = False) -> RadixTree:
    return RadixTree(200_000, page_size, device="cpu", policy=policy, bigram=bigram)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("page_size", [1, 2, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_same_answers_as_the_python_tree(policy: str, page_size: int, seed: int) -> None:
    _run(Pair(sglang_trees.PythonTree(page_size, policy), _tree(page_size, policy)), seed)


@pytest.mark.parametrize("page_size", [1, 2, 16])
@pytest.mark.parametrize("policy", ["lru", "slru", "priority"])
def test_same_answers_as_the_python_tree_for_eagle(policy: str, page_size: int) -> None:
    pair = Pair(sglang_trees.PythonTree(page_size, policy, is_eagle=True), _tree(page_size, policy, bigram=True))
    _run(pair, seed=9)


# SGLang's two trees differ in fifo and filo. The upper part of a split edge is a new node in the Python tree (and in
# flatradix), but as old as the edge in the Rust core.
@pytest.mark.parametrize("page_size", [1, 2, 16])
@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "mru", "priority"])
def test_same_answers_as_the_rust_core(policy: str, page_size: int) -> None:
    try:
        theirs = sglang_trees.RustTree(page_size, policy)
    except sglang_trees.PeerMissing as reason:
        pytest.skip(str(reason))
    _run(Pair(theirs, _tree(page_size, policy)), seed=5)
