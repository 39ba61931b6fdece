"""Limits of the numbers in a tree: large counts and clocks, deep trees, full trees, large batches."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flatradix import CapacityError, PrefixCache, QueryError, RadixTree, Ragged
from flatradix.device.index import DeviceIndex
from flatradix.inspect.content import saved_of
from flatradix.inspect.nodes import nodes_of
from flatradix.layout import numbers
from flatradix.layout.numbers import MAX_HITS, MAX_LOCKS
from tests.support.devices import interpreted, settled
from tests.support.inside import clock_of, index_of
from tests.support.oracle import Oracle

PAGE = 2


def changed(tree: RadixTree, change: Callable[[dict[str, Any]], None], **settings: Any) -> RadixTree:
    """Return a copy of a tree whose saved arrays went through `change`. Handles of the tree hold in the copy."""
    tree.compact()
    saved = saved_of(tree.content())
    change(saved)
    device = "cuda" if isinstance(index_of(tree), DeviceIndex) else "cpu"  # interpreted kernels run on the CPU
    copy = RadixTree(tree.max_tokens, tree.page_size, device, tree.policy, evict_by=tree.evict_by, **settings)
    index_of(copy).restore(saved)
    return copy


def raise_locks(saved: dict[str, Any], to: int) -> None:
    """Raise the locks of the deepest node that is locked, and of those above it, to `to`."""
    row = int(saved["own_locks"].argmax())
    more = to - int(saved["lock_ref"][row])
    saved["own_locks"][row] += more
    while row > 0:
        saved["lock_ref"][row] += more
        row = int(saved["parent"][row])


def locked_often(locks: int) -> tuple[RadixTree, Any]:
    """Return a tree with three nodes, two of them on a path that has so many locks, and the place of the lower one."""
    tree = RadixTree(64, PAGE, "cpu")
    tree.insert([[1, 2, 3, 4], [1, 2, 5, 6]], [[0, 1, 2, 3], [0, 1, 4, 5]])
    place = tree.match([[1, 2, 3, 4]], lock=True)
    return changed(tree, lambda saved: raise_locks(saved, locks)), place


def lock_of(tree: RadixTree, key: list[int]) -> int:
    """Return the lock count of the node at the end of a key."""
    return next(node.lock_ref for node in nodes_of(tree.content()) if list(node.path) == key)


def refuses_locks(tree: RadixTree, call: Callable[[], Any], query: int) -> None:
    before, nodes = tree.digest(), tree.num_nodes
    with pytest.raises(QueryError, match=rf"query {query}: a node on its path has {MAX_LOCKS} locks") as caught:
        settled(tree, call)
    assert caught.value.query == query
    tree.check()
    assert (tree.digest(), tree.num_nodes) == (before, nodes)


def test_locks_stop_at_their_limit() -> None:
    tree, place = locked_often(MAX_LOCKS - 2)
    other = tree.match([1, 2, 5, 6], touch=False)
    settled(tree, lambda: tree.lock(place))
    settled(tree, lambda: tree.lock(other))
    assert (lock_of(tree, [1, 2]), lock_of(tree, [1, 2, 3, 4])) == (MAX_LOCKS, MAX_LOCKS - 1)
    for again in (place, other, tree.match([1, 2, 3, 4], touch=False), tree.match([1, 2], touch=False)):
        refuses_locks(tree, lambda again=again: tree.lock(again), 0)
    refuses_locks(tree, lambda: tree.match([1, 2, 3, 4], touch=False, lock=True), 0)
    refuses_locks(tree, lambda: tree.match([[8, 8], [1, 2, 3, 4]], touch=False, lock=True), 1)
    tree.unlock(other)
    settled(tree, lambda: tree.match([1, 2], touch=False, lock=True))
    refuses_locks(tree, lambda: tree.lock(other), 0)
    assert tree.evict(100).slots.tolist() == [4, 5]
    tree.unlock(place)
    settled(tree, lambda: tree.lock(place))
    tree.check()


@pytest.mark.parametrize(("batch", "room"), [(3, 1), (40, 20)])
def test_a_batch_that_exceeds_the_limit_locks_nothing(batch: int, room: int) -> None:
    tree, _place = locked_often(MAX_LOCKS - room)
    keys = [[[1, 2, 3, 4], [1, 2], [7, 7]][query % 3] for query in range(batch)]
    exceeds = [query for query, key in enumerate(keys) if key[0] == 1][room]
    places = tree.match(keys, touch=False)
    refuses_locks(tree, lambda: tree.lock(places), exceeds)
    refuses_locks(tree, lambda: tree.match(keys, touch=False, lock=True), exceeds)
    settled(tree, lambda: tree.lock(tree.match([[1, 2]] * room, touch=False)))
    assert lock_of(tree, [1, 2]) == MAX_LOCKS
    refuses_locks(tree, lambda: tree.lock(places), 0)
    refuses_locks(tree, lambda: tree.match(keys, touch=False, lock=True), 0)


def test_a_refused_lock_cuts_no_edge() -> None:
    tree = RadixTree(64, PAGE, "cpu")
    tree.insert([1, 2, 3, 4], range(4))
    place = tree.match([[1, 2, 3, 4]], lock=True)
    tree = changed(tree, lambda saved: raise_locks(saved, MAX_LOCKS - 1))
    piece = tree.match([1, 2], touch=False)
    refuses_locks(tree, lambda: tree.lock(tree.match([[3, 3], [1, 2], [1, 2]], touch=False)), 2)
    settled(tree, lambda: tree.lock(piece))
    assert (lock_of(tree, [1, 2]), lock_of(tree, [1, 2, 3, 4])) == (MAX_LOCKS, MAX_LOCKS - 1)
    refuses_locks(tree, lambda: tree.lock(place), 0)


@pytest.mark.parametrize(
    "locks",
    [
        lambda tree, place: tree.lock(place),
        lambda tree, place: tree.lock(SimpleNamespace(handles=place.handles, lengths=place.lengths)),
        lambda tree, place: tree.split(place),
        lambda tree, place: tree.match([1, 2], touch=False, lock=True),
        lambda tree, place: tree.match([[1, 2], [7, 7]], touch=False, lock=True),
    ],
)
def test_locks_on_a_gpu_stop_at_their_limit(locks: Callable[[RadixTree, Any], Any], cuda: str) -> None:
    """The host counts locks, and looks up the largest count where its own is too high."""
    tree = RadixTree(64, PAGE, cuda)
    tree.insert([[1, 2, 3, 4], [7, 7]], [[0, 1, 2, 3], [4, 5]])
    place = tree.match([1, 2, 3, 4], lock=True)
    tree.raise_pending()
    copy = changed(tree, lambda saved: raise_locks(saved, MAX_LOCKS))
    before = copy.digest()
    with pytest.raises(QueryError, match=f"a node has {MAX_LOCKS} locks, and . more may exceed {MAX_LOCKS}.*unlock"):
        locks(copy, place)
    assert (copy.digest(), copy.num_nodes) == (before, 2)
    index_of(tree)._locks.most = MAX_LOCKS
    locks(tree, place)
    assert index_of(tree)._locks.most <= 3
    tree.check()


def test_wants_on_a_gpu_stop_at_their_limit(cuda: str) -> None:
    tree = RadixTree(64, PAGE, cuda)
    place = tree.insert([1, 2, 3, 4], range(4))
    tree.want(place)
    tree.raise_pending()
    state = index_of(tree)._state
    state.wanted[1] = state.own_wants[1] = MAX_LOCKS
    index_of(tree)._wants.most = MAX_LOCKS
    with pytest.raises(QueryError, match=r"want: a node has .* wants, and 1 more may exceed .* unwant once for each"):
        tree.want(tree.match([1, 2], touch=False))
    assert tree.num_nodes == 1
    state.wanted[1] = state.own_wants[1] = 1
    tree.want(place)
    assert index_of(tree)._wants.most == 2
    tree.unwant(place)
    tree.check()


def test_replays_of_locks_count(gpu: str) -> None:
    tree = RadixTree(64, PAGE, gpu)
    keys = Ragged(torch.tensor([1, 2, 3, 4], device=gpu), torch.tensor([0, 4], device=gpu))
    tree.insert(keys, Ragged(torch.arange(4, dtype=torch.int32, device=gpu), keys.offsets))
    step = tree.capture(lambda: tree.match(keys, lock=True))
    for _ in range(4):
        tree.unlock(step())
    assert index_of(tree)._locks.most == 5  # three runs of the function, one of them the capture, and two replays
    index_of(tree)._locks.most = MAX_LOCKS
    tree.unlock(step())
    assert index_of(tree)._locks.most == 1


def test_a_cache_begins_nothing_above_the_limit() -> None:
    cache = PrefixCache(64, PAGE)
    cache.finish(cache.begin([[1, 2, 3, 4, 5]]))
    state = cache.tree.content().state
    place = cache.tree.match([1, 2, 3, 4], lock=True)
    state.lock_ref[1] = state.own_locks[1] = state.numbers[numbers.MOST_LOCKS] = MAX_LOCKS
    with pytest.raises(QueryError, match=r"begin: query 1: a node on its path"):
        cache.begin([[7, 7, 7], [1, 2, 3, 4, 6]])
    assert len(cache.running) == 0
    state.lock_ref[1] = state.own_locks[1] = 1
    cache.tree.unlock(place)
    cache.check()
    assert cache.begin([[7, 7, 7], [1, 2, 3, 4, 6]])[1].cached_length == 4


def test_wants_stop_at_their_limit() -> None:
    tree = RadixTree(64, PAGE, "cpu")
    place = tree.insert([[1, 2, 3, 4]], [range(4)])
    tree.want(place)
    state = tree.content().state
    state.wanted[1] = state.own_wants[1] = state.numbers[numbers.MOST_WANTS] = MAX_LOCKS - 1
    tree.want(place)
    before = tree.digest()
    with pytest.raises(QueryError, match=rf"want: query 0: a node on its path has {MAX_LOCKS} wants"):
        tree.want(tree.match([[1, 2]], touch=False))
    tree.check()
    assert (tree.digest(), tree.num_nodes) == (before, 1)
    tree.unwant(place)
    tree.want(place)
    tree.check()


def test_the_bound_of_locks_falls_when_it_is_looked_up() -> None:
    """The bound counts locks alone, not unlocks: it passes the limit while the nodes have few locks."""
    tree = RadixTree(64, PAGE, "cpu")
    place = tree.insert([[1, 2, 3, 4]], [range(4)])
    found = tree.content().state.numbers
    found[numbers.MOST_LOCKS] = MAX_LOCKS
    tree.lock(place)
    assert found[numbers.MOST_LOCKS] == 1
    found[numbers.MOST_LOCKS] = MAX_LOCKS - 1
    tree.match([[1, 2, 3, 4]] * 5, lock=True)
    assert found[numbers.MOST_LOCKS] == 6


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru"])
def test_hits_stop_at_their_limit(policy: str, device: str) -> None:
    tree = RadixTree(64, PAGE, device, policy)
    tree.insert([[1, 2, 3, 4], [7, 7]], [[0, 1, 2, 3], [4, 5]])

    def near(saved: dict[str, Any]) -> None:
        saved["hit_count"][1:] = MAX_HITS - 2

    tree = changed(tree, near)
    tree.insert([1, 2, 3, 4], range(4))
    tree.insert([[1, 2, 5, 5]] * 3 + [[7, 7]], [range(4)] * 3 + [range(2)])  # cuts an edge
    hits = {node.path: node.hit_count for node in nodes_of(tree.content())}
    assert hits == {(1, 2): MAX_HITS, (1, 2, 3, 4): MAX_HITS - 1, (1, 2, 5, 5): 3, (7, 7): MAX_HITS - 1}
    tree.insert([[7, 7]] * 40, [range(2)] * 40)
    hits = {node.path: node.hit_count for node in nodes_of(tree.content())}
    assert hits[7, 7] == hits[1, 2] == MAX_HITS
    tree.check()


@pytest.mark.parametrize("clock", [2**31, 2**32, 2**53, 2**58])
@pytest.mark.parametrize("policy", ["lru", "mru", "fifo", "lfu"])
def test_clocks_pass_powers_of_two(policy: str, clock: int, device: str) -> None:
    """The victims of a tree whose clock passes a limit of 32 bits are those of a tree with a new clock."""
    plain = RadixTree(64, PAGE, device, policy)
    plain.insert([[1, 2, 3, 4], [1, 2, 5, 6], [7, 7]], [[0, 1, 2, 3], [0, 1, 4, 5], [6, 7]])

    def later(saved: dict[str, Any]) -> None:
        more = clock - 10
        saved["numbers"] = [*saved["numbers"][:1], saved["numbers"][1] + more, *saved["numbers"][2:]]
        saved["tick"][1:] += more
        saved["created"][1:] += more

    late = changed(plain, later)
    for tree in (plain, late):
        tree.match([1, 2, 3, 4])
        tree.insert([[8, 8], [7, 7, 9, 9]], [[8, 9], [6, 7, 10, 11]])
        tree.match([[1, 2], [8, 8]])
        tree.check()
    assert clock_of(late) > clock > clock_of(late) - 20
    for _ in range(6):
        assert late.evict(2).slots.tolist() == plain.evict(2).slots.tolist()


def test_a_clock_at_its_end_is_not_loaded(tmp_path: Any) -> None:
    """2**62 queries are more than a machine can do. A file that says so is refused."""
    tree = RadixTree(64, PAGE, "cpu")
    tree.insert([1, 2], [0, 1])
    tree.content().state.numbers[numbers.CLOCK] = 2**63 - 1
    tree.save(tmp_path / "tree")
    with pytest.raises(ValueError, match="its clock is"):
        RadixTree.load(tmp_path / "tree", "cpu")


def test_locks_above_the_limit_are_not_loaded(tmp_path: Any) -> None:
    tree = RadixTree(64, PAGE, "cpu")
    tree.insert([1, 2], [0, 1])
    state = tree.content().state
    tree.match([1, 2], lock=True)
    state.lock_ref[1] = state.own_locks[1] = MAX_LOCKS + 1
    tree.save(tmp_path / "tree")
    with pytest.raises(ValueError, match="lock_ref is above"):
        RadixTree.load(tmp_path / "tree", "cpu")


def test_a_path_of_many_nodes(device: str) -> None:
    """A path of nodes of one page each: walks, locks and evictions go along it without recursion."""
    depth = 14 if interpreted(device) else 100_000
    tree = RadixTree(depth + 8, device=device)
    key = np.arange(depth, dtype=np.int64)
    for length in range(1, depth + 1) if interpreted(device) else ():
        tree.insert(key[:length], key[:length])
    if not interpreted(device):
        place = tree.insert(key, key)
        places = SimpleNamespace(
            handles=place.handles.expand(depth).clone(),
            lengths=torch.arange(1, depth + 1, dtype=torch.int32, device=tree.device),
        )
        tree.split(places)
    assert tree.num_nodes == depth
    whole = tree.match(key, lock=True)
    assert whole.length == depth
    assert tree.evict(10).num_tokens == 0
    tree.unlock(whole)
    assert tree.slots(tree.match(key)).to_list() == [key.tolist()]
    assert tree.evict(3).slots.tolist() == [depth - 1, depth - 2, depth - 3]
    assert (tree.total_tokens, tree.match(key, touch=False).length) == (depth - 3, depth - 3)
    assert len(tree.evict(depth).slots) == depth - 3
    tree.check()


def test_a_batch_of_65536_queries(device: str) -> None:
    batch = 16 if interpreted(device) else 65_536
    tree = RadixTree(4 * batch, PAGE, device)
    firsts = torch.arange(batch)
    keys = torch.stack([firsts // 2, firsts // 2, firsts, firsts], dim=1)
    offsets = torch.arange(0, 4 * batch + 1, 4)
    ragged = Ragged(keys.reshape(-1), offsets)
    inserted = tree.insert(ragged, Ragged(torch.arange(4 * batch), offsets))
    assert inserted.prefix_lengths.tolist() == [0, 2] * (batch // 2)
    found = tree.match(ragged, lock=True)
    assert found.lengths.tolist() == [4] * batch
    assert (tree.evictable_tokens, tree.protected_tokens) == (0, 3 * batch)
    tree.unlock(found)
    assert tree.slots(found).offsets.tolist() == offsets.tolist()
    assert tree.evict(3 * batch).num_nodes == batch + batch // 2
    tree.check()


@pytest.mark.parametrize("evict_by", ["node", "page"])
def test_a_full_tree_and_one_page_short(evict_by: str, device: str) -> None:
    tree = RadixTree(16, PAGE, device, evict_by=evict_by)
    tree.insert(list(range(14)), range(14))
    with pytest.raises(CapacityError) as caught:
        settled(tree, lambda: tree.insert([20, 21, 22, 23], range(4)))
    assert (caught.value.needed, caught.value.free) == (4, 2)
    tree.insert([20, 21], [14, 15])
    assert (tree.total_tokens, tree.evictable_tokens) == (16, 16)
    with pytest.raises(CapacityError) as caught:
        settled(tree, lambda: tree.insert([*range(14), 30, 30], range(16)))
    assert (caught.value.needed, caught.value.free) == (2, 0)
    tree.insert(list(range(14)), range(14))  # all of it is cached
    tree.check()
    freed = tree.evict(1)
    assert freed.slots.tolist() == [14, 15]
    tree.insert([*range(14), 30, 30], range(16))
    assert tree.total_tokens == 16
    tree.check()


def test_lengths_and_offsets_near_powers_of_two() -> None:
    """Numbers of 32 and 64 bits that are too large are refused, not wrapped."""
    tree = RadixTree(64, PAGE, "cpu")
    with pytest.raises(ValueError):
        Ragged(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2**63 - 1, 4]))
    with pytest.raises(ValueError):
        Ragged(torch.zeros(4, dtype=torch.int64), torch.tensor([-(2**63), 4]))
    for length in (2**31, 2**62, 2**63 - 1, -(2**63)):
        place = SimpleNamespace(handles=tree.match([1]).handles, lengths=torch.tensor([length]))
        with pytest.raises(ValueError):
            tree.lock(place)
    with pytest.raises(ValueError):
        tree.evict(-1)
    assert tree.evict(2**63 - 1).num_tokens == tree.evict(2**80).num_tokens == 0
    tree.check()


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "priority", "fifo"])
def test_an_eviction_after_all_leaves_were_used(policy: str) -> None:
    """Most entries of the eviction queue are out of date, so an eviction fills the queue anew. Victims are the same."""
    random = Random(policy)
    leaves = 600
    tree, oracle = RadixTree(4 * leaves, PAGE, "cpu", policy), Oracle(4 * leaves, PAGE, policy)
    keys = [[at // 3, at // 3, at, at] for at in range(leaves)]
    slots = [list(range(4 * at, 4 * at + 4)) for at in range(leaves)]
    for begin in range(0, leaves, 100):
        part = slice(begin, begin + 100)
        priorities = [random.randint(0, 3) for _ in keys[part]]
        tree.insert(keys[part], slots[part], priority=priorities)
        oracle.insert(keys[part], slots[part], [None] * 100, priorities)
    for _ in range(6):
        random.shuffle(keys)
        used = [key for key in keys if random.random() < 0.9]
        for begin in range(0, len(used), 64):
            tree.match(used[begin : begin + 64])
            oracle.match(used[begin : begin + 64], [None] * len(used[begin : begin + 64]))
        wanted = tree.match([keys[0], keys[1]], touch=False)
        tree.want(wanted)
        places = oracle.match([keys[0], keys[1]], [None] * 2, touch=False)
        oracle.want(places)
        for count in (1, 1, 40):
            assert tree.evict(count).slots.tolist() == oracle.evict(count).slots
            tree.check()
        for key in random.choices(keys, k=20):
            tree.insert(key, slots[key[2]])
            oracle.insert([key], [slots[key[2]]], [None], [0])
    assert tree.evict(10**6).slots.tolist() == oracle.evict(10**6).slots
    tree.check()
