"""Drop: what no lock protects goes at once, and no look-up finds the rest. The state machines drop, too."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flatradix import QueryError, RadixTree, StaleHandleError, WaitingQueue
from flatradix.inspect.nodes import nodes_of
from flatradix.kernels import cpu
from tests.support.devices import interpreted, settled
from tests.support.inside import names_of

POLICIES = ["lru", "lfu", "slru", "fifo", "mru", "filo", "priority", lambda nodes: -nodes.created]


def slots_from(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def filled(device: str, **options: Any) -> RadixTree:
    """Return a tree with three keys in namespace "a", and one in none."""
    tree = RadixTree(64, 2, device, **options)
    keys = [[1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 4, 4], [5, 5], [1, 1, 2, 2]]
    slots = [slots_from(10 * number, len(key)) for number, key in enumerate(keys)]
    tree.insert(keys, slots, namespace=["a", "a", "a", None])
    return tree


def lengths(tree: RadixTree, *keys: list[int], namespace: Any = "a") -> list[int]:
    found: list[int] = tree.match(list(keys), namespace=namespace, touch=False).lengths.tolist()
    return found


@pytest.mark.parametrize("slot_device", [None, "cpu"])
def test_a_prefix_goes_with_all_below(slot_device: str | None, device: str) -> None:
    tree = filled(device, slot_device=slot_device)
    tree.match([1, 1, 2, 2, 3, 3], namespace="a")
    gone = tree.drop(tree.match([1, 1], namespace="a"))  # the place lies on the edge of [1, 1, 2, 2]
    assert gone.slots.tolist() == [14, 15, 4, 5, 0, 1, 2, 3]
    assert (gone.num_tokens, gone.num_nodes) == (8, 3)
    assert lengths(tree, [1, 1, 2, 2, 3, 3], [5, 5]) == [0, 2]
    assert lengths(tree, [1, 1, 2, 2], namespace=None) == [4]
    tree.check()


def test_a_split_keeps_what_is_above_a_place(device: str) -> None:
    tree = filled(device)
    tree.split(tree.match([1, 1], namespace="a"))
    assert tree.drop(tree.match([1, 1, 2, 2], namespace="a")).num_tokens == 6
    assert lengths(tree, [1, 1, 2, 2, 3, 3]) == [2]
    tree.check()


def test_places_may_overlap(device: str) -> None:
    tree = filled(device)
    keys = [[1, 1, 2, 2, 3, 3], [1, 1, 2, 2], [1, 1, 2, 2], [5, 5]]
    assert tree.drop(tree.match(keys, namespace="a")).num_tokens == 10
    assert set(names_of(tree)) == {None}
    assert tree.drop(tree.match([[1, 1], [1, 1]])).slots.tolist() == slots_from(30, 4)
    assert tree.num_nodes == 0
    tree.check()


def test_a_namespace_goes(device: str) -> None:
    tree = filled(device)
    assert tree.drop(namespace="b").num_tokens == 0
    assert tree.drop(namespace="a").num_tokens == 10
    assert set(names_of(tree)) == {None}
    assert lengths(tree, [1, 1, 2, 2], namespace=None) == [4]
    assert tree.drop(namespace=None).slots.tolist() == slots_from(30, 4)
    assert tree.total_tokens == 0
    tree.check()


def test_what_is_locked_is_hidden_until_it_is_unlocked(device: str) -> None:
    tree = filled(device)
    holder = tree.match([1, 1, 2, 2, 3, 3], namespace="a", lock=True)
    assert tree.drop(namespace="a").num_tokens == 4
    assert lengths(tree, [1, 1, 2, 2, 3, 3], [5, 5]) == [0, 0]
    assert tree.alive(holder).tolist() == [False]
    assert tree.slots(holder).to_list() == [[0, 1, 2, 3, 4, 5]]
    assert tree.protected_tokens == 6
    assert set(names_of(tree)) == {None, "a"}

    fresh = tree.insert([1, 1, 2, 2, 3, 3], slots_from(50, 6), namespace="a")
    assert (fresh.prefix_length, fresh.length) == (0, 6)
    assert tree.slots(tree.match([1, 1, 2, 2, 3, 3], namespace="a")).to_list() == [slots_from(50, 6)]
    tree.check()

    tree.match([9], touch=True)
    tree.unlock(holder)
    tree.match([6, 6], start=holder)  # the holder may use it still
    assert tree.evict(1).slots.tolist() == [4, 5]
    assert tree.drop(namespace="b").slots.tolist() == [0, 1, 2, 3]  # a drop frees what earlier drops left
    with pytest.raises(StaleHandleError):
        tree.slots(holder)
    assert lengths(tree, [1, 1, 2, 2, 3, 3]) == [6]
    tree.check()


def test_a_holder_goes_on_from_its_place(device: str) -> None:
    tree = filled(device)
    holder = tree.match([1, 1, 2, 2, 3, 3], namespace="a", lock=True)
    tree.drop(tree.match([1, 1, 2, 2], namespace="a"))
    ends = SimpleNamespace(handles=holder.handles.repeat(2), lengths=holder.lengths.repeat(2))
    more = tree.insert([[7, 7, 8, 8], [7, 7, 9, 9]], [slots_from(60, 4), slots_from(70, 4)], start=ends)
    assert more.prefix_lengths.tolist() == [6, 8]
    assert tree.slots(more).to_list() == [[0, 1, 2, 3, 4, 5, 60, 61, 62, 63], [0, 1, 2, 3, 4, 5, 60, 61, 72, 73]]
    assert tree.match([7, 7, 8, 8], start=holder).length == 10
    assert tree.alive(more).tolist() == [False, False]
    assert lengths(tree, [1, 1, 2, 2, 3, 3, 7, 7]) == [0]
    cut = tree.match([7, 7], start=holder, split=True)
    tree.lock(cut)
    assert all(node.dropped for node in nodes_of(tree.content()) if node.path[:2] == (1, 1) and node.namespace == "a")
    tree.check()
    tree.unlock(holder)
    assert sorted(tree.drop(namespace="a").slots.tolist()) == [20, 21, 62, 63, 72, 73]
    tree.unlock(cut)
    assert tree.evict(100).slots.tolist()[:8] == [60, 61, 4, 5, 0, 1, 2, 3]


def test_a_lock_within_a_hidden_edge_splits_it(device: str) -> None:
    tree = filled(device)
    holder = tree.match([1, 1, 2, 2, 3, 3], namespace="a", lock=True)
    tree.drop(namespace="a")
    short = SimpleNamespace(
        handles=holder.handles.clone(), lengths=torch.full((1,), 2, dtype=torch.int32, device=tree.device)
    )
    tree.lock(short)
    assert tree.slots(short).to_list() == [[0, 1]]
    assert lengths(tree, [1, 1, 2, 2, 3, 3], [1, 1]) == [0, 0]
    tree.check()
    again = tree.insert([1, 1, 2, 2], slots_from(50, 4), namespace="a")
    tree.lock(again)
    tree.drop(again)  # two hidden nodes with one first page
    tree.check()
    tree.unlock(holder)
    assert tree.drop(namespace="a").slots.tolist() == [4, 5, 2, 3]
    tree.unlock(short)
    tree.unlock(again)
    assert sorted(tree.evict(6).slots.tolist()) == [0, 1, 50, 51, 52, 53]
    tree.check()


def test_a_hidden_part_stays_hidden_below_a_later_drop(device: str) -> None:
    """Two locked parts with one key below a node: one from before a first drop, one from after."""
    tree = filled(device)
    old = tree.match([1, 1, 2, 2, 3, 3], namespace="a", lock=True)
    tree.drop(old)
    new = tree.insert([1, 1, 2, 2, 3, 3], slots_from(50, 6), namespace="a")
    tree.lock(new)
    stem = tree.match([1, 1, 2, 2], namespace="a", touch=False)
    tree.drop(stem)
    assert tree.match([3, 3], start=stem).length == 6
    assert tree.slots(tree.match([3, 3], start=stem)).to_list() == [[0, 1, 2, 3, 54, 55]]
    assert tree.slots(old).to_list() == [slots_from(0, 6)]
    tree.check()
    copy = tree.to("cpu")
    assert copy.digest() == tree.digest()
    copy.check()


@pytest.mark.parametrize("evict_by", ["node", "page"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_dropped_goes_first_with_every_policy(policy: Any, evict_by: str, device: str) -> None:
    if interpreted(device) and (evict_by == "page" or policy not in ("lru", "filo", "mru")):
        pytest.skip("slow")
    tree = filled(device, policy=policy, evict_by=evict_by)
    first = tree.match([5, 5], namespace="a", lock=True)
    tree.drop(first)
    for number in range(3):
        tree.insert([5, 5], slots_from(50 + 2 * number, 2), namespace="a", priority=-5)
    tree.insert([6, 6], [90, 91], priority=-9)
    last = tree.insert([8, 8], [80, 81], priority=9)
    tree.lock(last)
    tree.drop(last)
    tree.want(tree.match([6, 6]))
    tree.unlock(last)
    tree.unlock(first)
    tree.match([9], start=last)
    assert tree.evict(4).slots.tolist() == [20, 21, 80, 81]
    tree.check()


def test_soft_pins_end(device: str) -> None:
    tree = filled(device)
    tree.split(tree.match([1, 1], namespace="a"))
    wanted = tree.match([[1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 4, 4], [1, 1]], namespace="a")
    tree.want(wanted)
    holder = tree.match([1, 1, 2, 2, 3, 3], namespace="a", lock=True)
    assert tree.drop(tree.match([1, 1, 2, 2], namespace="a")).slots.tolist() == [14, 15]
    tree.check()
    content = tree.content()
    assert content.column("wanted")[content.live()].sum() == 1  # that of [1, 1]
    tree.want(holder)  # no effect
    tree.unwant(holder)
    tree.unwant(SimpleNamespace(handles=wanted.handles[:2], lengths=wanted.lengths[:2]))
    twice = SimpleNamespace(handles=wanted.handles[2:].repeat(2), lengths=wanted.lengths[2:].repeat(2))
    with pytest.raises(QueryError):
        settled(tree, lambda: tree.unwant(twice))
    tree.unlock(holder)
    assert tree.evict(4).slots.tolist() == [4, 5, 2, 3]
    tree.check()


@pytest.mark.parametrize("keep", [False, True])
def test_a_waiting_queue_looks_afresh(keep: bool, device: str) -> None:
    tree = filled(device)
    queue = WaitingQueue(tree, keep=keep)
    queue.add([[1, 1, 2, 2, 3, 3, 9], [1, 1, 2, 2], [5, 5, 5]], ["a", None, "a"])
    assert queue.cached_lengths().tolist() == [6, 4, 2]
    tree.split(tree.match([1, 1], namespace="a"))
    holder = tree.match([1, 1, 2, 2, 3, 3], namespace="a", lock=True)
    tree.drop(tree.match([1, 1, 2, 2], namespace="a"))
    assert queue.cached_lengths().tolist() == [2, 4, 2]
    assert tree.rematch([[1, 1, 2, 2, 3, 3]], holder, namespace="a").lengths.tolist() == [2]
    tree.insert([1, 1, 2, 2], slots_from(50, 4), namespace="a")
    assert queue.cached_lengths().tolist() == [4, 4, 2]
    tree.unlock(holder)
    assert tree.evict(1).slots.tolist() == [4, 5]
    assert queue.cached_lengths().tolist() == [4, 4, 2]
    tree.drop(namespace="a")
    assert queue.cached_lengths().tolist() == [0, 4, 0]
    tree.check()


def test_long_keys_do_not_follow_what_was_dropped(device: str) -> None:
    """Long keys are matched by anchors on a GPU, which name nodes, not keys."""
    tree = RadixTree(40_000, 16, device)
    key = np.arange(16_384, dtype=np.int64)
    for end in range(4096, len(key) + 1, 4096):
        tree.insert(key[:end], key[:end])
    assert tree.match(key).length == len(key)
    holder = tree.match(key, lock=True)
    tree.drop(tree.match(key[:8192]))
    assert [tree.match(key, touch=touch).length for touch in (True, False)] == [4096, 4096]
    tree.insert(key, key + 20_000)
    found = tree.match(key)
    assert found.length == len(key)
    assert tree.slots(found).values[4096:].tolist() == list(range(24_096, 36_384))
    assert tree.slots(holder).values.tolist() == key.tolist()
    tree.check()


def test_it_grows_and_compacts_with_hidden_nodes(device: str) -> None:
    tree = RadixTree(None, 1, device)
    holders = []
    for number in range(12):
        holders.append(tree.insert([1, 2, 3], slots_from(10 * number, 3)))
        tree.lock(holders[-1])
        tree.drop(holders[-1])
    tree.compact()
    tree.insert(range(5000), range(1000, 6000))
    tree.check()
    assert tree.match([1, 2, 3]).length == 0
    for number, holder in enumerate(holders):
        assert tree.slots(holder).to_list() == [slots_from(10 * number, 3)]
        tree.unlock(holder)
    assert tree.drop(namespace="none").num_tokens == 36
    tree.check()


def test_on_evict_is_told(device: str) -> None:
    told: list[Any] = []
    tree = filled(device, on_evict=lambda *victim: told.append((victim[0], victim[1].tolist(), victim[2].tolist())))
    holder = tree.match([1, 1, 2, 2], namespace="a", lock=True)
    tree.drop(namespace="a")
    assert told == [("a", [1, 1, 2, 2, 3, 3], [4, 5]), ("a", [1, 1, 2, 2, 4, 4], [14, 15]), ("a", [5, 5], [20, 21])]
    tree.unlock(holder)
    tree.evict(1)
    assert told[3:] == [("a", [1, 1, 2, 2], [0, 1, 2, 3])]


def test_bad_input_changes_nothing(device: str) -> None:
    tree = filled(device)
    place, other = tree.match([5, 5], namespace="a"), filled(device)
    digest = tree.digest()
    both = SimpleNamespace(handles=place.handles.repeat(2), lengths=place.lengths * torch.arange(2, device=tree.device))
    calls: list[tuple[type[Exception], Callable[[], Any]]] = [
        (ValueError, lambda: tree.drop()),
        (ValueError, lambda: tree.drop(place, namespace=None)),
        (ValueError, lambda: tree.drop([1, 2])),
        (QueryError, lambda: tree.drop(namespace=1.5)),
        (QueryError, lambda: tree.drop(namespace=["a"])),
        (QueryError, lambda: tree.drop(tree.match([6]))),
        (QueryError, lambda: tree.drop(both)),
        (QueryError, lambda: tree.drop(SimpleNamespace(handles=place.handles, lengths=place.lengths - 1))),
        (QueryError, lambda: tree.drop(SimpleNamespace(handles=place.handles, lengths=place.lengths + 2))),
        (StaleHandleError, lambda: other.drop(place)),
        (StaleHandleError, lambda: tree.drop(SimpleNamespace(handles=place.handles - 2**28, lengths=place.lengths))),
    ]
    for kind, call in calls:
        with pytest.raises(kind):
            call()
        assert tree.match([5, 5], namespace="a", touch=False).length == 2
    assert tree.digest() == digest
    tree.drop(place)
    with pytest.raises(StaleHandleError, match="query 0"):
        tree.drop(place)
    tree.check()


def test_not_within_a_policy_function(device: str) -> None:
    def policy(nodes: Any) -> Any:
        if asked:
            tree.drop(namespace=None)
        return nodes.tick

    asked: list[int] = []
    tree = filled(device, policy=policy)
    asked.append(1)
    with pytest.raises(RuntimeError, match="called from within"):
        tree.evict(1)
    asked.clear()
    assert tree.total_tokens == 14
    tree.check()


@pytest.mark.parametrize("when", ["within the marks", "behind the marks", "behind the victims"])
def test_an_interrupted_drop_on_a_gpu(when: str, cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.kernels import gpu  # not without Triton

    tree = filled(cuda)
    tree.want(tree.match([5, 5], namespace="a"))
    tree.want(holder := tree.match([1, 1, 2, 2, 3, 3], namespace="a", lock=True))
    before, free = tree.digest(), gpu.free

    def cut(*arguments: Any, **options: Any) -> None:
        if when == "behind the victims":
            free(*arguments, **options)
        raise KeyboardInterrupt

    where = (gpu, "rebuild") if when == "within the marks" else (gpu, "free")
    with monkeypatch.context() as patch:
        patch.setattr(*where, cut)
        with pytest.raises(KeyboardInterrupt):
            tree.drop(namespace="a")
    done = when == "behind the victims"
    assert lengths(tree, [1, 1, 2, 2, 3, 3], [5, 5]) == ([0, 0] if done else [6, 2])
    assert (tree.digest() == before) == (not done)
    tree.check()
    assert tree.evict(0).slots.tolist() == ([14, 15, 20, 21] if done else [])
    assert tree.drop(namespace="a").num_tokens == (0 if done else 4)
    tree.unlock(holder)
    assert tree.evict(1).slots.tolist() == [4, 5]
    tree.check()


def test_an_interrupted_drop_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = filled("cpu")

    def interrupt(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    drop = cpu.drop

    def cut(*arguments: Any) -> None:
        drop(*arguments)
        raise KeyboardInterrupt

    for wrong, freed in ((interrupt, 0), (cut, 10)):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "drop", wrong)
            with pytest.raises(KeyboardInterrupt):
                tree.drop(namespace="a")
        tree.check()
        assert tree.total_tokens == 14 - freed
    assert tree.drop(namespace=None).num_tokens == 14
