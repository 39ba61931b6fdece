"""User-defined policies, and the order of evictions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flatradix import Nodes, RadixTree


def evicted(policy: str | Callable[[Nodes], torch.Tensor], device: str) -> list[int]:
    """Return the order in which four leaves of 1 to 4 tokens are evicted. Their slots begin at 10, 20, 30 and 40."""
    tree = RadixTree(100, device=device, policy=policy)
    for count in (3, 1, 4, 2):
        tree.insert([count * 100 + i for i in range(count)], [count * 10 + i for i in range(count)])
    order = []
    while tree.num_nodes:
        order.append(int(tree.evict(1).slots[0]) // 10)
        tree.check()
    return order


def test_scores_order_the_nodes(device: str) -> None:
    assert evicted(lambda nodes: nodes.length, device) == [1, 2, 3, 4]
    assert evicted(lambda nodes: -nodes.length.to(torch.float32), device) == [4, 3, 2, 1]
    assert evicted(lambda nodes: (nodes.length.double() - 2.5) * 0.1, device) == [1, 2, 3, 4]


def test_equal_scores_go_by_last_use(device: str) -> None:
    assert evicted(lambda nodes: torch.zeros_like(nodes.tick), device) == [3, 1, 4, 2] == evicted("lru", device)
    assert evicted(lambda nodes: -0.0 * nodes.tick, device) == [3, 1, 4, 2]


def test_mru(device: str) -> None:
    assert evicted("mru", device) == [2, 4, 1, 3]


def test_a_parent_goes_by_its_own_score_once_it_is_childless(device: str) -> None:
    tree = RadixTree(100, device=device, policy=lambda nodes: nodes.end)
    tree.insert([[1, 2, 3], [1, 2, 4, 5], [7, 7, 7, 7, 7]], [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11]])
    assert tree.evict(100).slots.tolist() == [2, 5, 6, 0, 1, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda nodes: 5, "returned int"),
        (lambda nodes: nodes.tick[:-1], "one score a row"),
        (lambda nodes: nodes.tick * float("nan"), "NaN"),
        (lambda nodes: nodes.tick.to(torch.complex64), "complex64"),
    ],
)
def test_bad_scores(policy: Callable[[Nodes], torch.Tensor], message: str, device: str) -> None:
    tree = RadixTree(100, device=device, policy=policy)
    tree.insert([1, 2], [1, 2])
    before = tree.digest()
    with pytest.raises(ValueError, match=message):
        tree.evict(1)
    tree.check()
    assert tree.digest() == before


def test_scores_of_rows_without_a_node_do_not_matter(device: str) -> None:
    tree = RadixTree(8, device=device, policy=lambda nodes: nodes.tick / (nodes.length * (nodes.end > 0)))
    tree.insert([1], [1])
    assert tree.evict(1).slots.tolist() == [1]
