"""A namespace that has lost all its tokens leaves nothing behind."""

from __future__ import annotations

import pytest

import flatradix
from flatradix import RadixTree
from tests.support.depth import THOROUGH
from tests.support.devices import interpreted, settled
from tests.support.inside import names_of


def _insert_in(tree: RadixTree, names: range) -> None:
    for i in names:
        if tree.total_tokens + 4 > tree.max_tokens:
            tree.evict(1000)
        tree.insert([1, 2, 3, i], [1, 2, 3, 4], namespace=f"tenant {i}")


@pytest.mark.slow
def test_a_million_namespaces_leave_nothing_behind(device: str) -> None:
    import resource

    if interpreted(device):
        pytest.skip("a million calls of kernels in Python would take a day")
    many = 1_000_000 if device == "cpu" and THOROUGH else 200_000
    tree = RadixTree(10_000, device=device)
    _insert_in(tree, range(many // 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _insert_in(tree, range(many // 20, many))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2048, f"{grown} KiB more at its highest"
    names = names_of(tree)
    assert len(names) == tree.num_nodes + 1 <= 2501
    tree.check()
    tree.evict(10_000)
    assert names_of(tree) == [None]


def test_namespaces_of_a_refused_batch_leave_nothing_behind(device: str) -> None:
    tree = RadixTree(10, device=device)
    count = 12 if interpreted(device) else 50
    one_each = [[i] for i in range(count)]
    for _ in range(3):
        with pytest.raises(flatradix.CapacityError):
            settled(tree, lambda: tree.insert(one_each, one_each, namespace=[str(i) for i in range(count)]))
        tree.insert(one_each[:10], one_each[:10], namespace=[f"{i}!" for i in range(10)])
        tree.check()
        assert len(names_of(tree)) == 11
        tree.evict(10)
