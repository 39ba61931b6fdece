"""Evictions by pages: the last victim loses only its last pages. The state machines draw them, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatradix import EvictResult, PrefixCache, QueryError, RadixTree, StaleHandleError, WaitingQueue
from flatradix.inspect.nodes import nodes_of
from tests.support.depth import cuts
from tests.support.devices import settled
from tests.support.interrupts import bytecodes, interrupt_at

KEY = [1, 1, 2, 2, 3, 3, 4, 4]


def tree_with(device: str, *keys: list[int], **options: Any) -> RadixTree:
    """Return a tree by pages of 2 with these keys; the slots of key number n are 10 * n, 10 * n + 1 and so on."""
    tree = RadixTree(64, 2, device, evict_by="page", **options)
    for number, key in enumerate(keys):
        tree.insert(key, range(10 * number, 10 * number + len(key)))
    return tree


def place(tree: RadixTree, handle: int, length: int) -> Any:
    return SimpleNamespace(
        handles=torch.tensor([handle], device=tree.device),
        lengths=torch.tensor([length], dtype=torch.int32, device=tree.device),
    )


def test_the_last_victim_loses_its_last_pages(device: str) -> None:
    tree = tree_with(device, [7, 7, 8, 8], KEY)
    (before,) = (node for node in nodes_of(tree.content()) if node.length == 8)
    assert tree.evict(0)[1:] == (0, 0)
    result = tree.evict(5)
    assert result.slots.tolist() == [0, 1, 2, 3, 16, 17]
    assert result[1:] == (6, 1)
    (after,) = nodes_of(tree.content())
    assert after == before._replace(path=before.path[:6], slots=before.slots[:6], length=6)
    assert (tree.total_tokens, tree.evictable_tokens, tree.num_nodes) == (6, 6, 1)
    tree.check()
    assert tree.match(KEY, touch=False).length == 6
    tree.insert(KEY, range(20, 28))
    tree.check()
    assert tree.slots(tree.match(KEY)).to_list() == [[10, 11, 12, 13, 14, 15, 26, 27]]
    assert tree.evict(1).slots.tolist() == [26, 27]
    assert tree.evict(100)[1:] == (6, 1)
    assert (tree.total_tokens, tree.num_nodes) == (0, 0)
    tree.check()


def test_a_place_beyond_the_cut_is_stale_for_good(device: str) -> None:
    tree = tree_with(device, KEY)
    handle = tree.match(KEY).handle
    assert tree.evict(3).slots.tolist() == [4, 5, 6, 7]
    table = torch.zeros((1, 8), dtype=torch.int32, device=tree.device)
    calls: list[Callable[[Any], Any]] = [
        tree.slots, tree.lock, tree.unlock, tree.split, tree.want,
        lambda at: tree.match([9, 9], start=at),
        lambda at: tree.insert([9, 9], [1, 2], start=at),
        lambda at: tree.write_slots(at, table, [0]),
    ]  # fmt: skip
    for _ in range(2):
        for length in (6, 8):
            stale = place(tree, handle, length)
            for call in calls:
                with pytest.raises(StaleHandleError, match="query 0"):
                    settled(tree, lambda call=call, stale=stale: call(stale))
            assert tree.alive(stale).tolist() == [False]
            tree.unwant(stale)
            assert tree.rematch([KEY], stale).length == tree.match(KEY, touch=False).length
        # What is inserted again is another node: the old place stays stale.
        tree.insert(KEY, range(20, 28))
        tree.compact()
    for length in (2, 4):
        good = place(tree, handle, length)
        assert tree.alive(good).tolist() == [True]
        assert tree.slots(good).to_list() == [list(range(length))]
        tree.lock(good)
        tree.unlock(good)
    for length in (-2, 3, 5, 9):
        with pytest.raises(QueryError, match="no page boundary"):
            settled(tree, lambda length=length: tree.slots(place(tree, handle, length)))
    tree.check()


def test_what_is_locked_is_never_cut(device: str) -> None:
    tree = tree_with(device, KEY)
    held = tree.match(KEY[:5], lock=True)
    assert tree.evict(2).slots.tolist() == [6, 7]
    assert tree.evict(100).slots.tolist() == [4, 5]
    assert tree.slots(held).to_list() == [[0, 1, 2, 3]]
    assert (tree.protected_tokens, tree.evictable_tokens) == (4, 0)
    tree.unlock(held)
    assert tree.evict(1).slots.tolist() == [2, 3]
    tree.check()


def test_a_pin_ends_when_its_place_is_cut(device: str) -> None:
    longer = [*KEY, 5, 5, 6, 6]
    tree = tree_with(device, KEY)
    tree.insert([longer, [9, 9]], [range(20, 32), [40, 41]])
    pins = tree.match([longer, KEY, [9, 9]], touch=False)
    tree.want(pins)
    assert tree.evict(1).slots.tolist() == [30, 31]
    assert tree.alive(pins).tolist() == [False, True, True]
    assert tree.evict(1).slots.tolist() == [28, 29]  # what is left of the node is not wanted any more
    assert tree.evict(1).slots.tolist() == [6, 7]
    assert tree.alive(pins).tolist() == [False, False, True]
    tree.check()
    tree.unwant(pins)
    tree.want(again := tree.match(KEY, touch=False))
    assert tree.evict(2).slots.tolist() == [40, 41]
    tree.unwant(again)
    with pytest.raises(QueryError, match="want"):
        settled(tree, lambda: tree.unwant(again))
    tree.check()


def test_a_queue_sees_that_a_match_was_cut(device: str) -> None:
    tree = tree_with(device, KEY, [9, 9])
    queue = WaitingQueue(tree, keep=True)
    queue.add([KEY, KEY[:4], [*KEY[:6], 7, 7]])
    assert queue.cached_lengths().tolist() == [8, 4, 6]
    assert tree.evict(2).slots.tolist() == [10, 11]  # nobody wants it
    assert tree.evict(3).slots.tolist() == [4, 5, 6, 7]
    assert queue.cached_lengths().tolist() == [4, 4, 4]
    assert queue.shared_lengths().tolist() == [0, 0, 2]
    tree.insert(KEY, range(30, 38))
    assert queue.cached_lengths().tolist() == [8, 4, 6]
    assert tree.evict(7)[1:] == (8, 2)
    assert queue.cached_lengths().tolist() == [0, 0, 0]
    tree.check()


@pytest.mark.parametrize("keep", [False, True])
def test_a_match_that_left_an_edge_where_it_ends_now_can_go_on(keep: bool, device: str) -> None:
    tree = tree_with(device, KEY)
    queue = WaitingQueue(tree, keep=keep)
    queue.add([[*KEY[:4], 7, 7], [*KEY[:4], 7, 7, 8, 8], KEY[:4]])
    assert queue.cached_lengths().tolist() == [4, 4, 4]
    assert tree.evict(4).slots.tolist() == [4, 5, 6, 7]
    assert queue.cached_lengths().tolist() == [4, 4, 4]
    tree.insert([*KEY[:4], 7, 7], range(20, 26))
    assert queue.cached_lengths().tolist() == [6, 6, 4]
    tree.check()


@pytest.mark.parametrize("policy", ["lfu", "mru", lambda nodes: nodes.end])
def test_other_policies(policy: Any, device: str) -> None:
    tree = tree_with(device, KEY, [5, 5, 6, 6], policy=policy)
    found = [tree.evict(1).slots.tolist() for _ in range(6)]
    short, long = [[12, 13], [10, 11]], [[6, 7], [4, 5], [2, 3], [0, 1]]
    assert found == (long + short if policy == "lfu" else short + long)
    tree.check()


def test_slots_apart(device: str) -> None:
    tree = tree_with(device, [7, 7, 8, 8], KEY, slot_device="cpu")
    assert tree.evict(5).slots.tolist() == [0, 1, 2, 3, 16, 17]
    assert tree.slots(tree.match(KEY)).to_list() == [[10, 11, 12, 13, 14, 15]]
    tree.check()


def test_files_and_copies_keep_the_option(device: str, tmp_path: Any) -> None:
    tree = tree_with(device, KEY)
    tree.evict(1)
    tree.save(tmp_path / "tree")
    for copy in (RadixTree.load(tmp_path / "tree", device), tree.to("cpu")):
        assert copy.evict_by == "page"
        assert copy.digest() == tree.digest()
        assert copy.evict(1).slots.tolist() == [4, 5]


def test_only_two_units_are_known() -> None:
    for make in (RadixTree, PrefixCache):
        with pytest.raises(ValueError, match='evict_by must be "node" or "page", not \'block\''):
            make(8, evict_by="block")  # type: ignore[operator]
    assert (RadixTree(8, device="cpu").evict_by, PrefixCache(8).tree.evict_by) == ("node", "page")


@pytest.mark.parametrize("slot_device", [None, "cpu"])
def test_interrupted_at_many_bytecodes(slot_device: str | None, device: str) -> None:
    """Whatever happens, each slot is in the tree, in the result, or in that of the next eviction."""

    def scene() -> RadixTree:
        tree = tree_with(device, [7, 7, 8, 8], KEY, slot_device=slot_device)
        tree.want(tree.match(KEY))
        return tree

    tree = scene()
    total = bytecodes(partial(tree.evict, 7))
    for at in cuts(total, device, f"evict {slot_device}"):
        tree = scene()
        changes = tree.changes()
        interrupt_at(at, partial(tree.evict, 7))
        done = tree.changes() != changes
        tree.check()
        told = tree.last_result
        untold = tree.evict(0).slots.tolist()
        assert isinstance(told, EvictResult) or not done
        freed = told.slots.tolist() + untold if done and isinstance(told, EvictResult) else untold
        assert freed in ([], [0, 1, 2, 3, 14, 15, 16, 17])
        left = sorted(slot for node in nodes_of(tree.content()) for slot in node.slots)
        assert left == sorted({*range(4), *range(10, 18)} - {*freed})
        tree.check()
