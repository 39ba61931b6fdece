"""Faults that a review found: each with what is right."""

from __future__ import annotations

from typing import Any

import pytest

import flatradix
from flatradix import QueryError, RadixTree, WaitingQueue
from flatradix.kernels import cpu


def test_many_new_namespaces_in_one_batch_share_nothing(device: str) -> None:
    tree = RadixTree(400, device=device)
    names: list[Any] = [f"n{i}" for i in range(70)]
    tree.insert([[1, 2, i + 5] for i in range(70)], [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(70)], names)
    queue = WaitingQueue(tree)
    queue.add([[1, 2, i + 5] for i in range(70)], names)
    assert queue.cached_lengths().tolist() == [3] * 70
    assert queue.shared_lengths().tolist() == [0] * 70
    queue.remove(queue.ids()[:60])
    others: list[Any] = [f"m{i}" for i in range(200)]
    queue.add([[1, 2]] * 200, others)
    assert queue.cached_lengths().tolist() == [3] * 10 + [0] * 200
    assert queue.shared_lengths().tolist() == [0] * 210


def test_a_plan_of_huge_reserves_admits_nobody(device: str) -> None:
    queue = WaitingQueue(RadixTree(100, 2, device))
    queue.add([[1, 2], [3, 4]])
    for reserve in (2**31 - 1, 2**40, 2**70):
        for whole_pages in (False, True):
            plan = queue.plan(reserve=reserve, whole_pages=whole_pages)
            assert (plan.ids.tolist(), plan.new_tokens) == ([], 0)


def test_ids_given_twice_begin_nothing() -> None:
    cache = flatradix.PrefixCache(200)
    queue = cache.queue()
    queue.add([[1, 2, 3], [4, 5]])
    for call in (queue.begin, queue.plan):
        with pytest.raises(QueryError, match=r"query 1: id 0 .*once"):
            call([0, 0])
    assert cache.free_space() == (200, 256)
    assert len(queue) == 2


def test_an_order_that_adds_prompts_is_refused(device: str) -> None:
    queue = WaitingQueue(RadixTree(100, 2, device))
    queue.add([[1, 2], [3, 4]])

    def score(columns: Any) -> Any:
        queue.add([[5, 6], [7, 8]])
        return columns.cached

    with pytest.raises(RuntimeError, match="from within another call of the same object"):
        queue.order(score)
    assert queue.turns().tolist() == [0, 1]


def test_a_look_after_an_interrupted_insert_undoes_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the queue would want nodes that are then taken back, for ever."""
    from flatradix.host import index

    tree = RadixTree(100, device="cpu")
    queue = WaitingQueue(tree, keep=True)
    tree.insert([[1, 2]], [[0, 1]])
    queue.add([1, 2, 3, 4])
    assert queue.cached_lengths().tolist() == [2]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index.HostIndex, "last_result", property(lambda self: None, interrupted))
        with pytest.raises(KeyboardInterrupt):
            tree.insert([[1, 2, 3, 4]], [[0, 1, 2, 3]])
    assert queue.cached_lengths().tolist() == [2]
    tree.check()
    queue.remove(0)
    assert not tree.content().column("wanted")[1:3].any()


def test_an_interrupted_look_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = RadixTree(100, device="cpu")
    queue = WaitingQueue(tree)
    queue.add([1, 2, 3], "a")
    assert queue.cached_lengths().tolist() == [0]
    tree.insert([[1, 2, 3]], [[0, 1, 2]], "a")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "recode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            queue.cached_lengths()
    assert queue.cached_lengths().tolist() == [3]


def test_numbers_that_are_no_ids(device: str) -> None:
    queue = WaitingQueue(RadixTree(100, 2, device))
    queue.add([1, 2])
    for bad in (2**64, [2**63], [-(2**64)]):
        with pytest.raises(ValueError, match="ids must be integers of 64 bits"):
            queue.remove(bad)
    with pytest.raises(ValueError, match="one id"):
        queue.prompt([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every must be"):
        queue.order("k-lpm", every=2**70)
    assert len(queue) == 1
