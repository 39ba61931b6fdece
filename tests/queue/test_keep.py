"""What evictions keep: the nodes that waiting prompts match, and the nodes that `want` pins softly."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatradix import QueryError, RadixTree, StaleHandleError, WaitingQueue
from tests.support.devices import settled
from tests.support.forms import poison


def tree_with(device: str, *keys: list[int], **options: Any) -> RadixTree:
    """Return a tree with the keys, the first of them used longest ago. Token j of key i has the slot 10 * i + j."""
    tree = RadixTree(64, device=device, **options)
    tree.insert(list(keys), [[10 * i + j for j in range(len(key))] for i, key in enumerate(keys)])
    return tree


def victims(tree: RadixTree, tokens: int = 1) -> list[int]:
    """Evict, and return the freed slots."""
    found = tree.evict(tokens).slots
    slots: list[int] = found.tolist()
    poison(found)
    tree.check()
    return slots


def everything(tree: RadixTree) -> list[int]:
    """Evict node by node; return the first slot of each."""
    found = []
    while slots := victims(tree):
        found.append(slots[0])
    return found


# A queue that keeps


def test_what_nobody_wants_goes_first(device: str) -> None:
    tree = tree_with(device, [1], [2], [3], [4])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1, 9], [3]])
    assert everything(tree) == [10, 30, 20, 0]


def test_a_queue_keeps_nothing_by_default(device: str) -> None:
    tree = tree_with(device, [1], [2])
    queue = WaitingQueue(tree)
    queue.add([1])
    queue.order("lpm")
    assert everything(tree) == [0, 10]


def test_the_last_in_the_order_is_given_up_first(device: str) -> None:
    tree = tree_with(device, [1], [2], [3], [4], [5])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1], [2, 2], [3, 3, 3], [4, 4]])
    tree.match([5])
    assert victims(tree) == [40]
    queue.order(lambda columns: torch.tensor([2, 0, 3, 1]))  # the order 1, 3, 0, 2
    assert victims(tree) == [20]
    assert victims(tree) == [0]
    queue.order(lambda columns: columns.length)  # the order 0, 1, 3, 2
    assert victims(tree) == [30]
    assert victims(tree) == [10]


def test_prompts_that_came_after_the_order_are_given_up_first(device: str) -> None:
    tree = tree_with(device, [1], [2], [3], [4])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1], [2]])
    queue.order(lambda columns: -columns.arrival.argsort())  # the order 1, 0
    queue.add([[3], [4]], priority=5)
    queue.remove(1)
    assert everything(tree) == [10, 30, 20, 0]


def test_a_node_goes_with_the_first_that_wants_it(device: str) -> None:
    tree = tree_with(device, [1, 2, 3], [1, 2, 4], [1, 2, 3, 5], [6])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1, 2, 4], [6], [1, 2, 3, 5, 7]])
    # The last in the order wants [5], [3] and [1, 2]. The first wants [1, 2] too.
    assert victims(tree) == [23]
    assert victims(tree) == [2]
    assert victims(tree) == [30]
    assert victims(tree) == [12]
    assert victims(tree) == [0, 1]


@pytest.mark.interpreted
def test_one_eviction_goes_through_all_ranks(device: str) -> None:
    tree = tree_with(device, [1, 2, 3], [1, 2, 4], [5], [6, 7], [8])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1, 2, 3], [8, 8], [1, 2]])
    pin = tree.match([6], touch=False)
    tree.want(pin)  # cuts [6, 7]
    # Nobody wants [7], [4] and [5], by time of use. Prompt 1 wants [8], prompts 0 and 2 want [1, 2]. A pin wants [6].
    assert victims(tree, 64) == [12, 20, 31, 40, 2, 0, 1, 30]


def test_no_more_is_freed_than_needed(device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4], [1, 2, 5], [6, 6, 6])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1, 2, 3, 4, 9], [6, 6]])
    assert victims(tree, 1) == [12]
    assert victims(tree, 3) == [20, 21, 22]
    assert victims(tree, 3) == [2, 3, 0, 1]
    assert victims(tree, 1) == []


def test_a_match_inside_an_edge_keeps_the_whole_edge(device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4], [5])
    queue = WaitingQueue(tree, keep=True)
    queue.add([1, 2, 9])
    assert victims(tree) == [10]
    tree.split(tree.match([1, 2, 3], touch=False))
    assert victims(tree) == [3]
    tree.split(tree.match([1, 2], touch=False))
    assert everything(tree) == [2, 0]


def test_a_prompt_keeps_what_is_inserted_later(device: str) -> None:
    tree = tree_with(device, [1])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1, 2, 3], [4, 5]])
    tree.insert([[1, 2, 3, 4], [4], [7]], [[50, 51, 52, 53], [60], [70]])
    assert victims(tree) == [70]
    assert everything(tree) == [60, 51, 0]


def test_who_leaves_keeps_nothing(device: str) -> None:
    tree = tree_with(device, [1], [2], [3])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1], [2], [1]])
    queue.remove([0])
    assert victims(tree) == [20]
    queue.remove([2])
    assert everything(tree) == [0, 10]


def test_locked_nodes_stay(device: str) -> None:
    tree = tree_with(device, [1, 2], [3], [4])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[3], [1, 2]])
    m = tree.match([1], lock=True)
    assert victims(tree, 64) == [20, 1, 10]
    tree.unlock(m)
    assert everything(tree) == [0]


def test_nothing_is_locked(device: str) -> None:
    tree = tree_with(device, [1, 2], [3])
    before = tree.digest()
    queue = WaitingQueue(tree, keep=True)
    queue.add([1, 2])
    queue.order("lpm")
    queue.plan("lpm")
    assert tree.digest() == before
    assert (tree.protected_tokens, tree.evictable_tokens) == (0, 3)


@pytest.mark.parametrize("policy", ["lru", "mru", "fifo", "filo", "lfu", "slru", "priority", lambda nodes: -nodes.tick])
def test_the_policy_decides_among_what_nobody_wants(policy: Any, device: str) -> None:
    keys = [[1], [2], [3], [4], [5]]
    tree, alone = tree_with(device, *keys, policy=policy), tree_with(device, *keys, policy=policy)
    queue = WaitingQueue(tree, keep=True)
    queue.add([[2], [4]])
    for key in ([5], [1], [1], [3]):
        tree.match(key)
        alone.match(key)
        tree.insert(key, [90], priority=key[0] % 3)
        alone.insert(key, [90], priority=key[0] % 3)
    expected = [slot for slot in everything(alone) if slot not in (10, 30)]
    assert everything(tree) == [*expected, 30, 10]


def test_a_second_queue_that_keeps_is_refused(device: str) -> None:
    tree = tree_with(device, [1], [2])
    queue = WaitingQueue(tree, keep=True)
    queue.add([1])
    with pytest.raises(ValueError, match="keep=True"):
        WaitingQueue(tree, keep=True)
    beside = WaitingQueue(tree)  # this one keeps nothing
    beside.add([2])
    assert beside.cached_lengths().tolist() == [1]
    assert everything(tree) == [10, 0]


@pytest.mark.interpreted
def test_a_deleted_queue_keeps_nothing(device: str) -> None:
    tree = tree_with(device, [1], [2], [3])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1], [2]])
    queue.order("lpm")
    assert victims(tree) == [20]
    gone = weakref.ref(queue)
    del queue
    gc.collect()
    assert gone() is None
    tree.check()
    tree.match([1])
    assert victims(tree) == [10]
    again = WaitingQueue(tree, keep=True)
    again.add([1])
    tree.insert([5], [50])
    assert everything(tree) == [50, 0]


def test_a_queue_that_never_looked_is_deleted(device: str) -> None:
    tree = tree_with(device, [1], [2])
    queue = WaitingQueue(tree, keep=True)
    queue.add([1])
    del queue
    gc.collect()
    assert everything(tree) == [0, 10]


def test_a_tree_outlives_its_name(device: str) -> None:
    """The queue holds the tree."""
    queue = WaitingQueue(tree_with(device, [1, 2]), keep=True)
    gc.collect()
    queue.add([1, 2, 3])
    assert queue.cached_lengths().tolist() == [2]
    assert queue.tree.evict(2).slots.tolist() == [0, 1]


def test_a_namespace_that_comes_back_is_kept(device: str) -> None:
    tree = tree_with(device, [5])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1, 2], [3]], namespace=["a", "b"])
    for name, other in (("a", "b"), ("b", "a"), ("a", "c")):
        tree.insert([[1, 2], [1, 2]], [[30, 31], [40, 41]], namespace=[name, other])
        tree.match([[5], [1]], namespace=[None, other])
        kept = [30] if name == "a" else [40]
        assert everything(tree)[-1:] == kept
        assert queue.cached_lengths().tolist() == [0, 0]
        tree.insert([5], [0])


def test_counts_stay_right_when_nodes_are_used_again(device: str) -> None:
    """Rows of freed nodes come back with other keys: nothing of a want may stay on them."""
    tree = tree_with(device, [1, 2])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1, 2], [3]])
    tree.want(tree.match([1, 2], touch=False))
    assert everything(tree) == [0]
    tree.insert([[7, 7], [3]], [[50, 51], [60]])
    tree.check()
    assert everything(tree) == [50, 60]
    tree.insert([[1, 2], [8]], [[70, 71], [80]])
    assert everything(tree) == [80, 70]


# Soft pins


def test_wanted_places_go_last(device: str) -> None:
    tree = tree_with(device, [1, 2], [3], [4])
    pin = tree.match([1, 2], touch=False)
    tree.want(pin)
    assert tree.protected_tokens == 0
    assert victims(tree, 2) == [10, 20]
    assert victims(tree, 1) == [0, 1]
    tree.unwant(pin)  # its want has ended


def test_soft_pins_go_after_waiting_prompts(device: str) -> None:
    tree = tree_with(device, [1], [2], [3], [4])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[4], [3]])
    tree.want(tree.match([[1], [3]], touch=False))
    assert everything(tree) == [10, 30, 0, 20]


def test_a_want_is_counted(device: str) -> None:
    tree = tree_with(device, [1], [2], [3])
    pins = tree.match([[1], [1]], touch=False)
    tree.want(pins)
    tree.unwant(tree.match([1], touch=False))
    assert victims(tree) == [10]
    tree.unwant(tree.match([1], touch=False))
    assert everything(tree) == [0, 20]


def test_a_want_covers_the_path(device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4], [5], [6])
    pin = tree.match([1, 2, 3], touch=False)
    tree.want(pin)  # cuts the edge behind 3
    assert pin.lengths.tolist() == [3]
    assert victims(tree) == [3]
    tree.split(tree.match([1], touch=False))
    tree.insert([1, 9], [70, 71])
    assert everything(tree)[:3] == [10, 20, 71]


@pytest.mark.interpreted
def test_soft_pins_go_by_their_own_scores(device: str) -> None:
    """What lies below a pin has gone before, so its score does not hold the pin back."""
    tree = RadixTree(64, device=device, policy=lambda nodes: nodes.length)
    keys = [[1], [1, 2, 2, 2], [5, 5]]
    tree.insert(keys, [[10], [10, 11, 12, 13], [20, 21]])
    tree.want(tree.match([[1], [5, 5]], touch=False))
    assert tree.evict(100).slots.tolist() == [11, 12, 13, 10, 20, 21]


def test_wants_of_a_child_end_with_the_child(device: str) -> None:
    tree = tree_with(device, [1, 2, 3], [1, 2, 4], [5])
    tree.want(tree.match([1, 2, 4], touch=False))
    tree.match([5])
    tree.want(tree.match([5], touch=False))
    assert victims(tree) == [2]
    assert victims(tree) == [12]  # the wanted node that was used longest ago
    tree.insert([7], [70])
    # Nobody wants [1, 2] any more, and it was used longest ago.
    assert everything(tree) == [0, 70, 20]


def test_one_eviction_goes_by_the_wants_at_its_start(device: str) -> None:
    """[1, 2] loses its want with its child, but only after the eviction: [5] goes before it."""
    tree = tree_with(device, [1, 2], [1, 2, 3], [5], policy="mru")
    tree.want(tree.match([[1, 2, 3], [5]], touch=False))
    for key in ([5], [1, 2, 3]):
        tree.match(key)
    tree.insert([1, 2], [0, 1])  # of the path, [1, 2] alone is the most recently used
    assert victims(tree, 64) == [12, 0, 1, 20]
    tree = tree_with(device, [1, 2], [1, 2, 3], [5])
    tree.want(tree.match([[1, 2, 3], [5]], touch=False))
    tree.match([1, 2])
    assert victims(tree, 64) == [12, 20, 0, 1]


@pytest.mark.parametrize("lengths", [[2], [4], [0]])
def test_places_of_wants_are_renewed(lengths: list[int], device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4], [1, 2, 3, 4, 5])
    pin = tree.match([1, 2, 3, 4, 5][: lengths[0]], touch=False)
    tree.want(pin)
    assert pin.lengths.tolist() == lengths
    assert tree.slots(pin).to_list() == [[0, 1, 2, 3][: lengths[0]]]
    tree.unwant(pin)
    assert tree.num_nodes == 2 + (lengths == [2])
    tree.check()


def refuses(tree: RadixTree, call: Callable[[], Any], message: str, error: type[Exception] = QueryError) -> None:
    before = tree.digest()
    with pytest.raises(error, match=message) as raised:
        settled(tree, call)
    assert tree.digest() == before
    assert isinstance(raised.value, QueryError)
    assert f"query {raised.value.query}" in str(raised.value)
    tree.check()


@pytest.mark.interpreted
def test_a_surplus_unwant_changes_nothing(device: str) -> None:
    tree = tree_with(device, [1, 2, 3], [4])
    pin = tree.match([1, 2], touch=False)
    tree.want(pin)
    both = SimpleNamespace(handles=pin.handles.repeat(2), lengths=pin.lengths.repeat(2))
    refuses(tree, lambda: tree.unwant(both), "query 1: .*want")
    refuses(tree, lambda: tree.unwant(tree.match([[1, 2], [1, 2, 3]], touch=False)), "query 1: .*want")
    refuses(tree, lambda: tree.unwant(tree.match([1], touch=False)), "query 0: .*want")
    assert everything(tree) == [2, 10, 0]


@pytest.mark.interpreted
def test_an_unwant_takes_nothing_from_a_queue(device: str) -> None:
    tree = tree_with(device, [1], [2])
    queue = WaitingQueue(tree, keep=True)
    queue.add([1])
    assert queue.cached_lengths().tolist() == [1]
    refuses(tree, lambda: tree.unwant(tree.match([1], touch=False)), "query 0: .*want")
    assert everything(tree) == [10, 0]
    queue.remove(0)
    tree.check()


@pytest.mark.interpreted
def test_stale_places(device: str) -> None:
    tree = tree_with(device, [1], [2], [3])
    pins = tree.match([[1], [2], [9]], touch=False)
    assert tree.alive(pins).tolist() == [True, True, True]  # the root is always there
    tree.want(pins)
    tree.unwant(pins)
    assert victims(tree) == [0]
    alive = tree.alive(pins)
    assert (alive.dtype, alive.tolist(), alive.device.type) == (torch.bool, [False, True, True], tree.device.type)
    refuses(tree, lambda: tree.want(pins), "query 0", StaleHandleError)
    assert everything(tree) == [10, 20]
    tree.insert([1], [70])
    assert tree.alive(pins).tolist() == [False, False, True]  # a new node is another one
    tree.unwant(pins)
    tree.reset()
    assert tree.alive(pins).tolist() == [False, False, True]


@pytest.mark.interpreted
def test_rematch(device: str) -> None:
    tree = tree_with(device, [1, 2, 3], [5, 6], page_size=1)
    keys = [[1, 2, 3, 4], [1, 9], [5, 6, 7], [8], []]
    m = tree.match(keys, touch=False)
    assert m.lengths.tolist() == [3, 1, 2, 0, 0]
    before = tree.digest()
    again = tree.rematch(keys, m)
    assert again.lengths.tolist() == [3, 1, 2, 0, 0]
    assert again.handles.tolist() == m.handles.tolist()
    assert tree.digest() == before
    tree.match([1])  # [5, 6] was used longest ago
    assert victims(tree) == [10, 11]
    tree.insert([[1, 2, 3, 4, 5], [1, 9], [5], [8]], [[20, 21, 22, 23, 24], [30, 31], [40], [50]])
    again = tree.rematch(keys, m)
    assert again.lengths.tolist() == [4, 2, 1, 1, 0]
    assert tree.slots(again).to_list() == [[0, 1, 2, 23], [0, 31], [40], [50], []]
    assert tree.match(keys, touch=False).handles.tolist() == again.handles.tolist()


def test_rematch_in_a_namespace(device: str) -> None:
    tree = RadixTree(64, device=device)
    tree.insert([[1, 2], [1]], [[0, 1], [9]], namespace=["a", "b"])
    keys = [[1, 2, 3], [1, 2, 3], [1, 2, 3]]
    m = tree.match(keys, namespace=["a", "b", None], touch=False)
    assert tree.rematch(keys, m, namespace=["a", "b", None]).lengths.tolist() == [2, 1, 0]
    tree.evict(1)
    assert tree.rematch(keys, m, namespace=["a", "b", None]).lengths.tolist() == [0, 1, 0]
    tree.insert([[1, 2, 3]], [[4, 5, 6]], namespace="a")
    assert tree.rematch(keys, m, namespace=["a", "b", None]).lengths.tolist() == [3, 1, 0]


def test_bad_arguments_of_a_rematch(device: str) -> None:
    tree = tree_with(device, [1, 2])
    m = tree.match([[1, 2], [3]], touch=False)
    refuses(tree, lambda: tree.rematch([[1, 2], [-1, 3]], m), "query 1: .*position 0")
    with pytest.raises(ValueError, match="1 places for 2 queries"):
        settled(tree, lambda: tree.rematch([[1, 2], [3]], tree.match([1, 2], touch=False)))


def test_a_closed_queue_keeps_nothing(device: str) -> None:
    tree = tree_with(device, [1], [2])
    queue = WaitingQueue(tree, keep=True)
    queue.add([1])
    queue.close()
    queue.close()
    tree.check()
    other = WaitingQueue(tree, keep=True)
    other.add([2])
    assert tree.evict(1).slots.tolist() == [0]
    assert queue.cached_lengths().tolist() == [0]
    assert other.cached_lengths().tolist() == [1]
