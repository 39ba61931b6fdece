"""A tree that keeps page numbers instead of slots means the same as one that keeps slots."""

from __future__ import annotations

import io
from random import Random

import numpy as np
import pytest
import torch

from flatradix import QueryError, RadixTree
from flatradix.backend import open_index
from flatradix.inputs.options import read_options

PAGE = 4


def pair(evict_by: str) -> tuple[RadixTree, RadixTree]:
    options = read_options(160, PAGE, "lru", None, False, torch.int32, True, evict_by, None)
    one, other = (RadixTree.over(open_index(options, "cpu", paged)) for paged in (True, False))
    return one, other


def slots_of(pages: list[int]) -> list[int]:
    return [page * PAGE + within for page in pages for within in range(PAGE)]


@pytest.mark.parametrize("evict_by", ["node", "page"])
@pytest.mark.parametrize("seed", range(6))
def test_a_random_program(evict_by: str, seed: int) -> None:
    """Inserts one by one and in batches, locks, evictions, compactions: equal results and equal digests."""
    random, trees = Random(seed), pair(evict_by)
    fresh = iter(range(10_000))
    locked: list[tuple] = []
    for _ in range(150):
        what = random.random()
        keys = [[random.randrange(2) for _ in range(PAGE * random.randint(0, 6))] for _ in range(random.randint(1, 3))]
        names = random.choice([None, "a"])
        if what < 0.5:
            pages = [[next(fresh) for _ in range(len(key) // PAGE)] for key in keys]
            random.shuffle(pages[0])
            total = sum(map(len, keys))
            for tree in trees:
                if tree.total_tokens + total > tree.max_tokens:
                    tree.evict(total)
            if all(tree.total_tokens + total <= tree.max_tokens for tree in trees):
                found = [tree.insert(keys, [slots_of(part) for part in pages], names) for tree in trees]
                assert found[0].prefix_lengths.tolist() == found[1].prefix_lengths.tolist()
        elif what < 0.6:
            locked.append(tuple(tree.match(keys, names, lock=True) for tree in trees))
        elif what < 0.7 and locked:
            for tree, places in zip(trees, locked.pop(), strict=True):
                tree.unlock(places)
        elif what < 0.85:
            count = random.randint(0, 30)
            found = [tree.evict(count) for tree in trees]
            assert found[0].slots.tolist() == found[1].slots.tolist()
        elif what < 0.9:
            trees[0].compact()
        places = [tree.match(keys, names, touch=False) for tree in trees]
        slots = [tree.slots(found).to_list() for tree, found in zip(trees, places, strict=True)]
        assert slots[0] == slots[1]
        assert trees[0].slots(trees[0].match(keys[0], names, touch=False)).to_list() == slots[0][:1]
        tables = [torch.full((3, 30), -1, dtype=torch.int32) for _ in trees]
        for tree, found, table in zip(trees, places, tables, strict=True):
            tree.write_slots(found, table, list(range(len(keys))))
        assert tables[0].tolist() == tables[1].tolist()
        assert trees[0].digest() == trees[1].digest()
        trees[0].check()
    file = io.BytesIO()
    trees[0].save(file)
    file.seek(0)
    assert RadixTree.load(file, device="cpu").digest() == trees[0].digest()


@pytest.mark.parametrize("slots", [[0, 1, 2, 4], [1, 2, 3, 4], [3, 2, 1, 0], np.array([8, 9, 10, 12], np.int32)])
def test_slots_that_are_no_whole_pages_are_refused(slots: list[int]) -> None:
    tree, _ = pair("node")
    before = tree.digest()
    with pytest.raises(QueryError, match=r"slots of query 0: .*whole pages of 4"):
        tree.insert([1, 2, 3, 4], slots)
    with pytest.raises(QueryError, match=r"slots of query 1: .*whole pages of 4"):
        tree.insert([[5, 6, 7, 8], [1, 2, 3, 4]], [[4, 5, 6, 7], slots])
    with pytest.raises(QueryError, match="slots of query 0: -8 at position 0 is negative"):
        tree.insert([1, 2, 3, 4], [-8, -7, -6, -5])
    assert tree.digest() == before
    assert tree.total_tokens == 0
