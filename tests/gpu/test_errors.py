"""Errors that a tree on a GPU can only raise later, and input that only the device knows.

Without a GPU, Triton's interpreter replaces it under TRITON_INTERPRET=1, with fewer and smaller batches.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatradix import CapacityError, QueryError, RadixTree, Ragged, StaleHandleError
from flatradix.layout import mail, scratch
from tests.support.depth import skip_unless_thorough
from tests.support.devices import interpreted, settled
from tests.support.inside import arrays_of, index_of, names_of
from tests.support.pairs import Pair, numbered, ragged


def test_the_first_of_several_refused_calls_is_told(cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    tree.insert([[1, 2], [1, 3]], [[1, 2], [1, 3]])
    before = tree.digest()
    tree.match([[1], [1, -1]])
    tree.insert([[5, -7]], [[1, 2]])
    tree.unlock(tree.match([[1, 2]], touch=False))
    with pytest.raises(
        ValueError, match=r"match: query 1: the token at position 1 .* \(2 later calls were refused too\)$"
    ):
        tree.raise_pending()
    tree.raise_pending()
    assert tree.digest() == before
    tree.check()


def test_a_single_refused_call_is_not_counted(cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    tree.match([[1], [-1]])
    with pytest.raises(ValueError, match=r"query 1: the token at position 0 is outside \[0, 2\*\*31 - 1\]$"):
        tree.raise_pending()


WAITING: list[Callable[[RadixTree], Any]] = [
    lambda tree: tree.raise_pending(),
    lambda tree: tree.evictable_tokens,
    lambda tree: tree.protected_tokens,
    lambda tree: tree.total_tokens,
    lambda tree: tree.num_nodes,
    lambda tree: tree.slots(tree.match([[1]])),
    lambda tree: tree.evict(1),
    lambda tree: tree.check(),
    lambda tree: tree.digest(),
    lambda tree: tree.to("cpu"),
    lambda tree: repr(tree),
]


def test_whatever_waits_tells(cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    tree.insert([[1, 2]], [[1, 2]])
    for wait in WAITING:
        tree.match([[-1]])
        with pytest.raises(ValueError, match="match: query 0: the token at position 0"):
            wait(tree)
        wait(tree)


def test_a_refused_call_returns_places_that_are_none(cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    tree.insert([[1, 2, 3]], [[1, 2, 3]])
    m = tree.match([[1, 2], [-1], [1]], lock=True)
    r = tree.insert([[1, 2], [1, 9], [7, -1]], [[1, 2]] * 3)
    single, one = tree.match([-1]), tree.insert([1, 4, -1], [1, 2, 3])
    with pytest.raises(ValueError, match=r"match: query 1.* \(3 later calls"):
        tree.raise_pending()
    for result in (m, r, single, one):
        assert result.lengths.tolist() == result.handles.tolist() == [-1] * len(result)
    assert r.prefix_lengths.tolist() == [-1] * 3
    assert one.prefix_lengths.tolist() == [-1]
    refused_again(tree, lambda: tree.lock(m))
    refused_again(tree, lambda: tree.unlock(single))
    refused_again(tree, lambda: tree.match([[5], [6], [7]], start=r))
    assert (tree.total_tokens, tree.protected_tokens) == (3, 0)
    tree.check()


def refused_again(tree: RadixTree, call: Callable[[], Any]) -> None:
    """Assert that a call with a place of a refused call is refused too."""
    with pytest.raises(StaleHandleError):
        settled(tree, call)


@pytest.mark.parametrize("what", ["length", "handle", "prefix_length"])
@pytest.mark.parametrize("form", [list, lambda key: [list(key)]])
def test_a_refused_key_that_might_need_a_compaction(form: Callable[[Any], Any], what: str, cuda: str) -> None:
    """Such a key takes the launches of a batch. Its integers still raise the error of the call."""
    tree = RadixTree(64, device=cuda)
    for first in range(12):
        tree.insert(range(10 * first, 10 * first + 5), range(5 * first, 5 * first + 5))
    assert index_of(tree)._may_compact(30)
    result = tree.insert(form(range(500, 530)), form(range(100, 130)))
    with pytest.raises(CapacityError, match="30 new tokens, but 4 of 64 are free"):
        _ = getattr(result, what)
    tree.raise_pending()
    tree.check()


def test_a_single_result_tells_why_its_own_call_was_refused(cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    for name in ("length", "handle"):
        result = tree.match([-1])
        with pytest.raises(ValueError, match="match: query 0: the token at position 0"):
            getattr(result, name)
        with pytest.raises(ValueError, match="this call was refused, as was told before"):
            getattr(result, name)
    told = tree.match([-1])
    with pytest.raises(ValueError, match="position 0"):
        tree.raise_pending()
    with pytest.raises(ValueError, match="this call was refused, as was told before"):
        _ = told.length
    full = tree.insert(list(range(65)), list(range(65)))
    with pytest.raises(CapacityError, match="65 new tokens, but 64 of 64 are free: 1 too few"):
        _ = full.prefix_length
    tree.check()


def test_more_refusals_than_there_is_room_for(cuda: str) -> None:
    key = list(range(100))
    tree = RadixTree(100, device=cuda)
    tree.insert(key, key)
    count = mail.REFUSAL_RING + 30
    for call in range(count):
        tree.match([*key[:call], -1])
    with pytest.raises(ValueError, match=rf"match: query 0: .* \({count - 1} later calls were refused too\)$") as told:
        tree.raise_pending()
    position = int(str(told.value).split("position ")[1].split()[0])
    assert count - mail.REFUSAL_RING <= position < count, "one of those that are still known"
    tree.raise_pending()
    tree.match([[-1]])
    with pytest.raises(ValueError, match=r"2\*\*31 - 1\]$"):
        tree.raise_pending()


def test_more_single_calls_than_there_are_answers(cuda: str) -> None:
    skip_unless_thorough(cuda)
    tree = RadixTree(64, device=cuda)
    key = list(range(7))
    first = tree.insert(key, key)
    second = tree.insert([*key[:3], 9], [10, 11, 12, 13])
    inside = tree.match([0])
    tree.lock(inside)
    lengths = [1 + call % 7 for call in range(mail.ANSWER_RING + 20)]
    results = [tree.match(key[:length], touch=False) for length in lengths]
    assert [result.length for result in results] == lengths
    assert len({result.handle for result in results}) == 3, "the path is in three parts"
    assert (first.prefix_length, first.length, second.prefix_length, second.length) == (0, 7, 3, 4)
    assert inside.handle == int(inside.handles[0]) == results[0].handle != first.handle
    tree.unlock(inside)
    tree.check()


def test_numbers_of_calls_begin_anew(cuda: str) -> None:
    tree = RadixTree(16, device=cuda)
    index_of(tree)._calls._last = mail.CALL_MASK - 4
    results = [tree.insert([call], [call]) for call in range(9)]
    assert [result.length for result in results] == [1] * 9
    assert tree.total_tokens == tree.num_nodes == 9
    tree.match([-1])
    with pytest.raises(ValueError, match="position 0"):
        tree.raise_pending()
    tree.check()


def test_what_only_the_device_can_know(cuda: str) -> None:
    """Kernels refuse a bad batch in device memory and name its bad query. Nothing changes."""
    tree = RadixTree(64, page_size=2, device=cuda)
    tree.insert([[1, 2, 3, 4]], [[1, 2, 3, 4]])
    before = tree.digest()

    def refused(call: Callable[[], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            settled(tree, call)
        assert tree.digest() == before

    values = torch.arange(6, device=tree.device)
    for offsets, query in (
        ([0, 4, 2, 6], 1),
        ([0, 2, 4, 5], 2),
        ([1, 2, 4, 6], 0),
        ([0, 2, 4, 7], 2),
        ([0, -2, 4, 6], 0),
    ):
        q = Ragged.trusted(values, torch.tensor(offsets, device=tree.device))
        if tree.device.type == "cpu":
            continue  # the host checks the offsets of batches in its own memory
        refused(lambda q=q: tree.match(q), f"match: query {query}: its offsets fall")
        refused(lambda q=q: tree.insert(q, q), f"insert: query {query}: its offsets fall")
    good, short = ragged([[5, 6], [7, 8, 9]], tree), ragged([[1, 2], [3, 4]], tree)
    refused(lambda: tree.insert(good, short, namespace="new"), "query 1: it has 3 tokens, but 2 slots")
    refused(lambda: tree.match(ragged([[1, 2], [1, -2]], tree)), "query 1: the token at position 1")
    refused(lambda: tree.insert(good, ragged([[1, 2], [3, -4, 5]], tree)), "slots of query 1: the slot at position 1")
    refused(lambda: tree.insert(good, ragged([[1, 2], [3, 4, 2**31]], tree)), "at position 2 is negative, or does not")
    tree.check()


def test_the_error_of_a_full_tree(cuda: str) -> None:
    tree = RadixTree(8, device=cuda)
    tree.insert([[1, 2, 3]], [[1, 2, 3]])
    r = tree.insert([[1, 2, 4, 5], [6, 7, 8, 9]], [[0] * 4] * 2)
    with pytest.raises(CapacityError, match=r"6 new tokens, but 5 of 8 are free: 1 too few; evict\(1\) first") as told:
        tree.raise_pending()
    assert (told.value.needed, told.value.free) == (6, 5)
    assert r.lengths.tolist() == [-1, -1]


def test_namespaces_of_refused_inserts_are_forgotten(cuda: str) -> None:
    tree = RadixTree(8, device=cuda)
    tree.insert([[1], [2]], [[1], [2]], namespace=["a", "b"])
    for _ in range(3):
        tree.insert([[1], [-2]], [[1], [2]], namespace=["c", "d"])
    tree.insert([[1]], [[1]], namespace="e")
    with pytest.raises(ValueError, match="query 1"):
        tree.raise_pending()
    assert names_of(tree) == [None, "a", "b", "e"]
    tree.check()


def test_namespaces_of_empty_keys_are_forgotten(cuda: str) -> None:
    """The host does not know the length of a key in device memory."""
    tree = RadixTree(8, page_size=2, device=cuda)
    keys = ragged([[], [1, 2], [3]], tree)
    tree.insert(keys, keys, namespace=["a", "b", "c"])
    tree.check()
    assert names_of(tree) == [None, "b"]


def test_more_names_than_the_tree_can_hold(cuda: str) -> None:
    tree = RadixTree(6, device=cuda)
    keys = [[i] for i in range(9)]
    for _ in range(2):
        tree.insert(keys, keys, namespace=[str(i) for i in range(9)])
    with pytest.raises(CapacityError, match="1 later call"):
        tree.raise_pending()
    tree.insert(keys[:6], keys[:6], namespace=[f"{i}!" for i in range(6)])
    tree.check()
    assert len(names_of(tree)) == 7


def test_a_surplus_of_unlocks_names_the_query(cuda: str) -> None:
    pair = Pair(cuda, 64)
    pair.insert([[1, 2], [1, 3]], [[1, 2], [1, 3]])
    keys = [[1, 2], [1, 3], [1, 2], [1, 2], [1, 3]]
    for _ in range(2):
        pair.match([[1, 2]], lock=True)
    pair.match([[1, 3]], lock=True)
    for order, query in ((keys, 3), ([*keys[:3], [1], [1, 2]], 3), ([[1, 3], *keys], 2)):
        places = pair.match(order, touch=False)
        for tree, place in zip((pair.host, pair.tree), places, strict=True):
            with pytest.raises(ValueError, match=f"unlock: query {query}: no lock ends"):
                settled(tree, lambda tree=tree, place=place: tree.unlock(place))
        pair.compare()
    pair.on_each("unlock", pair.match(keys[:3], touch=False))
    pair.compare()


def test_a_surplus_far_back_in_a_batch(cuda: str) -> None:
    """The batch has more queries than one program has lanes, and than the count of the surplus reads at once."""
    count = 34 if interpreted(cuda) else 700
    pair = Pair(cuda, 64)
    pair.insert([[1], [2], [3]], [[1], [2], [3]])
    keys = [[1 + query % 2] for query in range(count)]
    pair.match(keys, lock=True)
    places = pair.match([*keys, [3], [1], [2]], touch=False)
    for tree, place in zip((pair.host, pair.tree), places, strict=True):
        with pytest.raises(ValueError, match=f"unlock: query {count}: no lock ends"):
            settled(tree, lambda tree=tree, place=place: tree.unlock(place))
    places = pair.match([*keys, [2], [1]], touch=False)
    for tree, place in zip((pair.host, pair.tree), places, strict=True):
        with pytest.raises(ValueError, match=f"unlock: query {count}: no lock ends"):
            settled(tree, lambda tree=tree, place=place: tree.unlock(place))
    pair.compare()
    pair.on_each("unlock", pair.match(keys, touch=False))
    pair.compare()
    assert pair.tree.protected_tokens == 0


# Input on the device


def test_everything_may_come_from_the_device(cuda: str) -> None:
    pair = Pair(cuda, 256)
    tree = pair.tree
    keys = [[1, 2, 3], [1, 2, 4, 5], [], [6, 7]]
    names = ["a", "a", None, "b"]
    priorities, inserted = [3, -1, 7, 2**40], [0, 2, 0, 1]
    host = pair.host.insert(keys, numbered(keys), names, priorities, None, inserted)
    there = {
        "priority": torch.tensor(priorities, device=tree.device),
        "inserted_lengths": torch.tensor(inserted, dtype=torch.int32, device=tree.device),
    }
    result = tree.insert(ragged(keys, tree, torch.int32), ragged(numbered(keys), tree), names, **there)
    assert result.prefix_lengths.tolist() == host.prefix_lengths.tolist()
    pair.compare()
    more = [[8, 9], [8], [4], [8, 9, 9]]
    slots = [[5000 + slot for slot in own] for own in numbered(more)]
    host = pair.host.insert(more, slots, start=host)
    result = tree.insert(ragged(more, tree), ragged(slots, tree, torch.int32), start=result)
    assert result.lengths.tolist() == host.lengths.tolist()
    pair.compare()
    for dtype in (torch.int16, torch.uint8):
        assert tree.match(torch.tensor([6, 7, 8], dtype=dtype, device=tree.device), namespace="b").length == 3
        pair.host.match([6, 7, 8], namespace="b")
    pair.compare()


def test_places_in_other_forms(cuda: str) -> None:
    """Strided handles are renewed in place, and lengths of 64 bits are accepted."""
    tree = RadixTree(64, device=cuda)
    tree.insert([[1, 2, 3, 4]], [[1, 2, 3, 4]])
    m = tree.match([[1], [1, 2], [1, 2, 3]])
    apart = torch.zeros(6, dtype=torch.int64, device=tree.device)[::2]
    apart.copy_(m.handles)
    places = SimpleNamespace(handles=apart, lengths=m.lengths.long())
    tree.lock(places)
    assert tree.protected_tokens == 3
    assert len(set(apart.tolist())) == 3
    tree.unlock(places)
    assert tree.protected_tokens == 0
    assert tree.slots(places).to_list() == [[1], [1, 2], [1, 2, 3]]
    tree.check()


def test_values_of_another_device(gpu: str) -> None:
    """Tokens and slots in host memory are copied to the device; places and tables of another device are refused."""
    tree = RadixTree(64, device=gpu)
    tree.insert(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]).cuda())
    assert tree.match([torch.tensor([1, 2]).cuda(), torch.tensor([1, 3]), [1, 2, 3]]).lengths.tolist() == [2, 1, 3]
    m = tree.match([[1, 2]])
    there = SimpleNamespace(handles=m.handles.cpu(), lengths=m.lengths)
    with pytest.raises(ValueError, match="handles on cpu and lengths on cuda:0, but the tree is on cuda:0"):
        tree.lock(there)
    with pytest.raises(ValueError, match="the table is on cpu, but the slots are on cuda:0"):
        tree.write_slots(m, torch.zeros((1, 4), dtype=torch.int64), [0])


READS: dict[str, Callable[[RadixTree, Any], Any]] = {
    "slots": lambda tree, places: tree.slots(places),
    "tokens": lambda tree, places: tree.tokens(places),
    "path_slots": lambda tree, places: index_of(tree).path_slots(places),
    "length": lambda tree, places: places.length,
    "host_lengths": lambda tree, places: places.host_lengths,
}


@pytest.mark.parametrize("compacts", [False, True], ids=["at once", "as a batch"])
@pytest.mark.parametrize("read", READS)
def test_a_refused_key_raises_its_own_error_wherever_it_is_read(read: str, compacts: bool, cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    refused = tree.insert([[1, -5]], [[1, 2]]) if compacts else tree.insert([1, -5], [1, 2])
    with pytest.raises(QueryError, match=r"the token at position 1 is outside \[0, 2\*\*31 - 1\]$"):
        READS[read](tree, refused)
    if read in ("length", "host_lengths"):
        with pytest.raises(ValueError, match="refused, as was told before"):
            READS[read](tree, refused)
    assert tree.match([1]).length == 0
    tree.raise_pending()


@pytest.mark.parametrize("length", [0, 2, 3, 4])
def test_slots_are_those_of_the_lengths_that_the_caller_has_written(length: int, cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    tree.insert([1, 2, 3, 4], [5, 6, 7, 8])
    for keys in ([1, 2, 3, 4], [1, 2, 3]):
        one, several = tree.match(keys), tree.match([keys, [1, 2]])
        one.lengths.fill_(length)
        several.lengths[0] = length
        assert tree.slots(one).values.tolist() == [5, 6, 7, 8][:length]
        assert index_of(tree).path_slots(one).tolist() == [5, 6, 7, 8][:length]
        assert tree.slots(several).values.tolist() == [*[5, 6, 7, 8][:length], 5, 6]
        assert tree.tokens(several).values.tolist() == [*[1, 2, 3, 4][:length], 1, 2]
    tree.check()


def test_all_nodes_of_a_small_tree_are_no_hint_for_a_larger_one(cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    tree.insert([[1], [2], [3]], [[1], [2], [3]])
    assert tree.evict(1).num_tokens == 1
    counters = arrays_of(tree).scratch.counters
    assert int(counters[scratch.EVICTION_HINT + 1]) == 0
    assert tree.evict(1).num_tokens == 1
    tree.check()
