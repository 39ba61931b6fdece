"""FlatRadixCache under SGLang's own scheduler code, compared with its caches: equal hits, sizes, slots and victims.

In a pool that is too small, requests are chunked, finished, retracted and aborted, and nodes are evicted. After every
step both sides have equal sizes, free slots and rows, and available + evictable + protected + held = total.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.sglang_engine import Plan, load_or_skip
from tests.support.sglang_pair import Pair, default_cache, ever_later, is_drained, python_cache

SGLANG = load_or_skip()
POLICIES = ["lru", "lfu", "slru", "fifo", "mru", "filo", "priority"]


@pytest.fixture(autouse=True)
def _clock() -> Iterator[None]:
    with ever_later(SGLANG):
        yield


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("eviction", POLICIES)
def test_in_step_with_the_python_tree(eviction: str, page_size: int) -> None:
    pair = Pair(SGLANG, Plan(page_size=page_size, eviction=eviction, seed=page_size), python_cache).run()
    pair.ours.cache.tree.check()
    is_drained(SGLANG, pair.ours)


# In fifo and filo SGLang's two trees differ where an edge is split: tests/sglang/test_trees.py.
@pytest.mark.parametrize("eviction", ["lru", "lfu", "slru", "mru", "priority"])
def test_in_step_with_the_default_tree(eviction: str) -> None:
    pair = Pair(SGLANG, Plan(page_size=4, eviction=eviction, seed=3), default_cache).run()
    pair.ours.cache.tree.check()
    is_drained(SGLANG, pair.ours)


@pytest.mark.parametrize("theirs", [python_cache, default_cache])
@pytest.mark.parametrize("page_size", [1, 16])
def test_in_step_for_eagle(page_size: int, theirs: Any) -> None:
    pair = Pair(SGLANG, Plan(page_size=page_size, is_eagle=True, seed=5), theirs).run()
    is_drained(SGLANG, pair.ours)


@pytest.mark.parametrize("schedule", ["fcfs", "lof", "hrrn"])
def test_in_step_with_other_schedules(schedule: str) -> None:
    is_drained(SGLANG, Pair(SGLANG, Plan(schedule=schedule, seed=7), python_cache).run().ours)


def test_in_step_where_freed_pages_are_taken_first() -> None:
    """Without sorting, SGLang's paged allocator reuses the last freed page first: slots differ, sizes are equal."""
    Pair(SGLANG, Plan(page_size=16, need_sort=False, seed=2), default_cache).run(compare_slots=False)


def test_in_step_with_the_index_on_a_gpu(cuda: str) -> None:
    pair = Pair(SGLANG, Plan(page_size=4, seed=8), python_cache, device=cuda, count=5).run()
    pair.ours.cache.tree.check()
    is_drained(SGLANG, pair.ours)


def test_the_work_has_all_that_can_happen() -> None:
    pair = Pair(SGLANG, Plan(seed=0), python_cache)
    evictions = []
    evict = pair.ours.cache.evict
    pair.ours.cache.evict = lambda params: evictions.append(params.num_tokens) or evict(params)
    engine = pair.run().ours
    assert engine.chunks > 10
    assert engine.retracted > 2
    assert len(evictions) > 20
    assert any(work.gives_up is not None for work in pair.work)
    assert sum(found for _, found in engine.admitted) > 1000


def test_depth_first_order() -> None:
    """SGLang breaks ties by the order of a dictionary. It gets our order, which must satisfy SGLang's own rule."""
    pair = Pair(SGLANG, Plan(schedule="dfs-weight", seed=4), python_cache)
    orders: list[list[int]] = []
    order_of = pair.ours.cache.dfs_weight_order
    pair.ours.cache.dfs_weight_order = lambda nodes: orders.append(order_of(nodes)) or orders[-1]

    def ours_if_allowed(nodes: list[Any]) -> list[int]:
        assert_depth_first(pair.theirs.cache.root_node, nodes, orders[-1])
        return orders[-1]

    pair.theirs.cache.dfs_weight_order = ours_if_allowed
    pair.run()
    assert sum(len(order) > 4 for order in orders) > 10


def assert_depth_first(root: Any, nodes: list[Any], order: list[int]) -> None:
    """Assert the order below each node: whole subtrees, heaviest first, then the node's own requests in queue order."""
    assert sorted(order) == list(range(len(nodes)))
    rank = {index: place for place, index in enumerate(order)}

    def places(node: Any) -> list[int]:
        below = [found for child in node.children.values() if (found := places(child))]
        below.sort()
        weights = [len(found) for found in below]
        assert weights == sorted(weights, reverse=True)
        own = [rank[index] for index, at in enumerate(nodes) if at is node]
        assert own == sorted(own)
        together = [place for found in below for place in found] + own
        assert together == list(range(min(together, default=0), min(together, default=0) + len(together)))
        return together

    places(root)
