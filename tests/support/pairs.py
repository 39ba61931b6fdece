"""A tree on a GPU and a tree on the CPU that must do the same, and keys and slots for both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from flatradix import RadixTree, Ragged


class Pair:
    """A tree on the CPU and one on the GPU, driven through the same calls."""

    def __init__(self, device: str, max_tokens: int, page_size: int = 1, **options: Any) -> None:
        self.host = RadixTree(max_tokens, page_size, "cpu", **options)
        self.tree = RadixTree(max_tokens, page_size, device, **options)

    def insert(self, keys: list[list[int]], slots: list[list[int]], **options: Any) -> tuple[Any, Any]:
        results = self.host.insert(keys, slots, **options), self.tree.insert(keys, slots, **options)
        host, tree = results
        assert tree.lengths.tolist() == host.lengths.tolist()
        assert tree.prefix_lengths.tolist() == host.prefix_lengths.tolist()
        return results

    def match(self, keys: list[list[int]], **options: Any) -> tuple[Any, Any]:
        results = self.host.match(keys, **options), self.tree.match(keys, **options)
        assert results[1].lengths.tolist() == results[0].lengths.tolist()
        return results

    def on_each(self, name: str, places: tuple[Any, Any]) -> None:
        getattr(self.host, name)(places[0])
        getattr(self.tree, name)(places[1])

    def evict(self, num_tokens: int) -> None:
        host, tree = self.host.evict(num_tokens), self.tree.evict(num_tokens)
        assert tree.slots.tolist() == host.slots.tolist()
        assert tree[1:] == host[1:]

    def compare(self) -> None:
        assert self.tree.digest() == self.host.digest()
        for name in ("evictable_tokens", "protected_tokens", "num_nodes"):
            assert getattr(self.tree, name) == getattr(self.host, name), name
        self.tree.check()


def numbered(keys: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return slots for keys: 1000 * query + position for each token."""
    return [[1000 * query + position for position in range(len(key))] for query, key in enumerate(keys)]


def ragged(keys: list[list[int]], tree: RadixTree, dtype: torch.dtype = torch.int64) -> Ragged:
    """Return keys on the tree's device. The host knows only the number of keys and of tokens."""
    found = Ragged.from_sequences(keys)
    return Ragged(found.values.to(tree.device, dtype), found.offsets.to(tree.device))


def shared_prefixes(count: int, seed: int = 0, page: int = 1) -> list[list[int]]:
    """Return keys that continue prefixes of earlier keys, made of three kinds of pages."""
    rng = random.Random(seed)
    stems: list[list[int]] = [[]]
    for _ in range(count):
        stem = rng.choice(stems[-60:])
        pages = [[7] * (page - 1) + [rng.randrange(3)] for _ in range(rng.randint(0, 4))]
        stems.append(stem[: rng.randint(0, len(stem))] + [token for one in pages for token in one])
    return stems[1:]


def use(pair: Pair, keys: list[list[int]]) -> None:
    """Insert, lock, match, evict and unlock a batch, and compare the trees after each step."""
    pair.insert(keys, numbered(keys))
    pair.compare()
    locked = pair.match([key[: 2 * len(key) // 3] for key in keys], lock=True)
    pair.compare()
    again = pair.match([*keys[1:], []], touch=False)
    assert pair.tree.slots(again[1]).to_list() == pair.host.slots(again[0]).to_list()
    pair.evict(pair.host.total_tokens // 3)
    pair.compare()
    pair.on_each("unlock", locked)
    pair.insert(keys[::-1], numbered(keys[::-1]))
    pair.compare()
    pair.evict(pair.host.total_tokens)
    pair.compare()
