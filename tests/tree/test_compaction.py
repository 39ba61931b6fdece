"""Compaction of the pools: it changes no content, and a key as long as the free space always fits."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from flatradix import RadixTree
from tests.support.devices import interpreted


def _fill_with_holes(tree: RadixTree, rng: random.Random, keys: int = 400) -> dict[int, list[int]]:
    """Insert keys of random lengths, lock some, and leave gaps between them. Return the locked keys by first token."""
    kept = {}
    for first in range(1, keys):
        length = rng.randrange(2, 24, 2)
        key = [first] + [rng.randrange(5) for _ in range(length - 1)]
        if tree.total_tokens + length > tree.max_tokens:
            tree.evict(tree.total_tokens + length - tree.max_tokens)
        r = tree.insert(key, list(range(1000 * first, 1000 * first + length)))
        if rng.random() < 0.2 and tree.protected_tokens < tree.max_tokens // 2:
            tree.lock(r)
            kept[first] = key
    return kept


@pytest.mark.parametrize("bigram", [False, True])
@pytest.mark.parametrize("slot_device", [None, "cpu"])
def test_compaction_keeps_everything(bigram: bool, slot_device: str | None, device: str) -> None:
    size, keys = (60, 20) if interpreted(device) else (600, 400)
    tree = RadixTree(size, page_size=2 - bigram, device=device, bigram=bigram, slot_device=slot_device)
    kept = _fill_with_holes(tree, random.Random(5), keys)
    before = tree.digest()
    tree.compact()
    tree.check()
    assert tree.digest() == before
    for first, key in kept.items():
        m = tree.match(key)
        assert m.length == len(key) - bigram
        assert tree.slots(m).to_list() == [list(range(1000 * first, 1000 * first + m.length))]


def test_a_key_as_long_as_the_free_space_always_fits(device: str) -> None:
    rng = random.Random(8)
    size, keys, cases = (60, 15, 2) if interpreted(device) else (600, 400, 20)
    compactions = []
    for seed in range(cases):
        tree = RadixTree(size, page_size=2, device=device)
        _fill_with_holes(tree, random.Random(seed), keys)
        tree.evict(size // 3)
        free = (tree.max_tokens - tree.total_tokens) // 2 * 2
        compacted = _watch_compactions(tree)
        r = tree.insert([[9, 9] + [rng.randrange(5) for _ in range(free - 2)]], [list(range(free))])
        assert tree.total_tokens + 1 >= tree.max_tokens
        assert tree.slots(r).to_list() == [list(range(free))]
        tree.check()
        compactions.append(compacted())
    assert any(compactions), "no case compacted: this tests nothing"


def _watch_compactions(tree: RadixTree) -> Callable[[], bool]:
    """Return a function that tells whether the pools were compacted since: edges in another half, or without gaps."""

    def gaps() -> int:
        content = tree.content()
        ends = (content.column("start") + content.column("length"))[content.live()]
        return int(ends.max()) - content.first - tree.total_tokens

    first, had_gaps = tree.content().first, gaps() > 0
    return lambda: tree.content().first != first or (had_gaps and gaps() == 0)


@pytest.mark.parametrize("tokens", [1, 2, 7, 31, 63, 64, 127])
def test_a_tree_full_of_the_smallest_nodes(tokens: int, device: str) -> None:
    if interpreted(device) and tokens > 7:
        pytest.skip("a kernel in Python takes 20 ms for each query of the batch")
    tree = RadixTree(tokens, device=device)
    for _ in range(2):
        r = tree.insert([[i] for i in range(tokens)], [[i] for i in range(tokens)])
        tree.insert([0], [0])
        tree.lock(r)
        tree.check()
        tree.unlock(r)
        assert tree.num_nodes == tokens
    assert tree.evict(tokens).num_nodes == tokens
