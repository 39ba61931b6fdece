"""The programs of tests/tree/test_ranks.py: what one rank does. A rank is a process of its own in a group over gloo."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from random import Random
from typing import Any

import torch
import torch.distributed as distributed

import flatradix
from flatradix import PrefixCache, RadixTree, RanksDifferError, assert_ranks_agree, watch_ranks

CALLS = 40


class Calls:
    """Draws the same calls of a tree on each rank. wrong: what to do instead of call number `at`."""

    def __init__(self, tree: RadixTree, seed: int) -> None:
        self.tree, self.random = tree, Random(seed)
        self.locks: list[Any] = []
        self.slot = 0

    def keys(self) -> list[list[int]]:
        count = self.random.choice((1, 2, 3))
        return [[self.random.randint(0, 2) for _ in range(self.random.randint(0, 9))] for _ in range(count)]

    def insert(self) -> None:
        keys = self.keys()
        missing = sum(map(len, keys)) - (self.tree.max_tokens - self.tree.total_tokens)  # type: ignore[operator]
        if missing > 0:
            self.tree.evict(missing)
        slots = []
        for key in keys:
            slots.append(list(range(self.slot, self.slot + len(key))))
            self.slot += len(key)
        self.tree.insert(keys, slots)

    def lock(self) -> None:
        if len(self.locks) < 2:
            self.locks.append(self.tree.match(self.keys(), lock=True))
        else:
            self.tree.unlock(self.locks.pop(0))

    def one(self) -> None:
        self.tree.match(self.random.choice(self.keys()))
        self.tree.match([1, 2], touch=bool(self.slot % 2))

    def step(self) -> None:
        self.random.choice((self.insert, self.insert, self.lock, self.one))()


def agree(rank: int, device: str) -> Any:
    """Make equal calls, and compare the digests after each. Return the number of digests that were seen."""
    tree = RadixTree(200, 1, device)
    watch_ranks(tree)
    calls, digests = Calls(tree, 1), set()
    for _ in range(CALLS):
        calls.step()
        if rank == 1:  # reading alone makes no difference
            tree.match([0, 1], touch=False)
        assert_ranks_agree(tree, digest=True)
        digests.add(tree.digest())
    assert_ranks_agree(tree)
    return len(digests)


def differ(rank: int, device: str, wrong: Callable[[RadixTree], Any], deep: bool = False) -> Any:
    """Make equal calls, but for one of rank 2. Return what each rank is told."""
    tree = RadixTree(200, 1, device)
    watch_ranks(tree, deep)
    tree.insert([1, 2, 3], [1, 2, 3])
    tree.insert([5, 6], [4, 5])
    assert_ranks_agree(tree)
    tree.match([[1, 2], [5]])  # call 3
    (wrong if rank == 2 else right)(tree)  # call 4
    tree.match([1, 2, 3])  # call 5
    tree.insert([7], [9])
    return told(tree)


def right(tree: RadixTree) -> None:
    tree.insert([1, 2, 8], [6, 7, 8])


WRONG: dict[str, Callable[[RadixTree], Any]] = {
    "another length": lambda tree: tree.insert([1, 2, 8, 9], [6, 7, 8, 9]),
    "a shared prefix": lambda tree: tree.insert([1, 4, 8], [6, 7, 8]),
    "another call": lambda tree: tree.evict(1),
    "another batch": lambda tree: tree.insert([[1, 2, 8], [1]], [[6, 7, 8], [6]]),
    "no call": lambda tree: None,
    "other tokens": lambda tree: tree.insert([1, 2, 7], [6, 7, 8]),
}


def told(tree: Any, **options: Any) -> Any:
    try:
        assert_ranks_agree(tree, **options)
    except RanksDifferError as error:
        return [error.call, error.operation, str(error)]
    return None


def all_wrongs(rank: int, device: str) -> Any:
    return {name: differ(rank, device, wrong) for name, wrong in WRONG.items()}


def contents(rank: int, device: str) -> Any:
    """Other tokens of equal number: sizes agree, digests do not, and a deep watch names the call."""
    tree = RadixTree(200, 1, device)
    watch_ranks(tree)
    (WRONG["other tokens"] if rank == 2 else right)(tree)
    found = {"sizes": told(tree), "digests": told(tree, digest=True)}
    plain = RadixTree(200, 1, device)
    plain.insert([1, 2], [3, 4 + (rank == 3)])
    found["not watched"] = told(plain, digest=True)
    return found | {"deep": differ(rank, device, WRONG["other tokens"], deep=True)}


def caches(rank: int, device: str) -> Any:
    """PrefixCaches: equal steps agree; a request that only rank 2 aborts is named."""
    cache = PrefixCache(200, 4, 4, 40, device=device, kv_device=device)
    watch_ranks(cache)
    for turn in range(6):
        requests = cache.begin([[turn, 1, 2, 3, 4, 5, 6, 7, 8], [1, turn, 2]])
        cache.commit(requests)
        cache.extend(requests)
        cache.step(requests, [turn, 7])
        assert_ranks_agree(cache, digest=True)
        cache.finish(requests)
    requests = cache.begin([[1, 2, 3], [4, 5, 6, 7, 8]])
    (cache.abort if rank == 2 else cache.finish)(requests)
    return told(cache)


def long_ago(rank: int, device: str) -> Any:
    """A difference that more calls have followed than a journal keeps."""
    tree = RadixTree(200, 1, device)
    watch_ranks(tree)
    tree.insert([1, 2], [1, 2 + (rank > 4)])
    if rank == 1:
        tree.evict(1)
    for _ in range(5000):
        tree.match([1])
    return told(tree)


def failing(rank: int, device: str) -> Any:
    """Rank 1 has an error of a GPU to raise, or does as if: nobody hangs, and everybody raises."""
    tree = RadixTree(200, 1, device)
    if rank == 1:

        def raise_pending() -> None:
            raise flatradix.QueryError("a token", 0)

        tree.raise_pending = raise_pending  # type: ignore[method-assign]
    try:
        return told(tree)
    except flatradix.QueryError as error:
        return str(error)


def mixed(rank: int, device: str) -> Any:
    """Ranks on a CPU and on a GPU: equal calls agree, and a call that one does not make is named."""
    tree = RadixTree(64, 1, device)
    watch_ranks(tree)
    tree.insert([[1, 2, 3], [1, 2, 4]], [[1, 2, 3], [4, 5, 6]])
    tree.match([1, 2], lock=True)
    assert_ranks_agree(tree, digest=True)
    tree.evict(1)
    if rank != 1:
        tree.insert([9], [7])
    return told(tree)


def main() -> None:
    """Arguments: rank, ranks, a file that all ranks meet at, a file for the results, names of programs, device."""
    rank, ranks, meeting, out, names, device = sys.argv[1:]
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(ranks), timeout=timedelta(seconds=400)
    )
    found = {name: globals()[name](int(rank), device) for name in names.split(",")}
    with open(out, "w") as file:
        json.dump(found, file)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
