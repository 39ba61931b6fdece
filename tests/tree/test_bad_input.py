"""Every kind of bad input raises an error with a helpful message, and changes nothing."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import flatradix
from flatradix import CapacityError, QueryError, RadixTree, Ragged, StaleHandleError
from flatradix.inputs import devices
from tests.support.devices import settled
from tests.support.inside import clock_of, names_of


@pytest.fixture
def tree(device: str) -> RadixTree:
    tree = RadixTree(64, page_size=2, device=device)
    tree.insert([[1, 2, 3, 4], [1, 2, 5, 6], [9, 9]], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], namespace=[None, None, "a"])
    tree.lock(tree.match([1, 2, 3, 4]))
    return tree


def refuses(
    tree: RadixTree, call: Callable[[], Any], message: str, error: type[Exception] = ValueError
) -> pytest.ExceptionInfo[Exception]:
    """Assert that a call raises, and that the tree, its clock and its namespaces stay the same."""

    def state() -> tuple:
        return tree.digest(), clock_of(tree), tree.total_tokens, names_of(tree)

    before = state()
    with pytest.raises(error, match=message) as raised:
        settled(tree, call)
    tree.check()
    assert state() == before
    named = re.search(r"\bquery (\d+)\b", str(raised.value))
    if named:
        assert isinstance(raised.value, QueryError)
        assert raised.value.query == int(named[1])
    return raised


def place(tree: RadixTree, handles: list[int], lengths: list[int]) -> SimpleNamespace:
    """Return places that no call has returned."""
    return SimpleNamespace(
        handles=torch.tensor(handles, device=tree.device), lengths=torch.tensor(lengths, device=tree.device)
    )


BAD_TOKENS = [
    ([[1, 2], [1, 2, 3, -1]], "query 1: the token at position 3"),
    ([array("q", [1, 2]), array("q", [2**31, 0])], "query 1: the token at position 0"),
    ([np.array([1, 2]), np.array([2**40, 1])], "query 1: the token at position 0"),
    (torch.tensor([1, 2, -5, 7], dtype=torch.int32), "query 0: the token at position 2"),
    ([1, 2, 2**70, 3], "beyond 64 bits"),
    ([1, 2, 3.5, 4], "3.5 of type float among the integers"),
    ([[1, 2], [1, "2"]], "tokens of query 1: '2' of type str"),
    ([[1, 2], 7], "tokens of query 1: a int is no sequence"),
    (["ab", "cd"], "tokens of query 0: a str is no sequence"),
    (np.array([1.0, 2.0]), "dtype float64"),
    (torch.tensor([True, False]), "dtype torch.bool"),
    (torch.zeros(2, 2, dtype=torch.int64), r"a tensor of shape \(2, 2\)"),
    ([np.zeros((2, 2), np.int64)], "tokens of query 0: an array of shape"),
    (array("d", [1.0, 2.0]), "typecode 'd'"),
    (np.array([2**63], dtype=np.uint64), "dtype uint64"),
    (5, "a int is no sequence"),
]


@pytest.mark.parametrize(("q", "message"), BAD_TOKENS)
def test_tokens(tree: RadixTree, q: Any, message: str) -> None:
    refuses(tree, lambda: tree.match(q), message)
    refuses(tree, lambda: tree.insert(q, _some_slots(q)), message)


def _some_slots(q: Any) -> Any:
    """Return good slots in the shape of a bad batch, so that the error is about the tokens."""
    if isinstance(q, list) and q and not isinstance(q[0], int):
        return [list(range(len(part))) if hasattr(part, "__len__") else [0] for part in q]
    return list(range(len(q))) if hasattr(q, "__len__") else [0]


# For a tree on a GPU only the device knows the wrong number, so the messages differ.
BAD_SLOTS = [
    ([[7, 8], [7, 8]], [[10, 11], [12]], "query 1: it has 2 tokens, but 1 slots"),
    ([[7, 8], [7, 8]], [[10, 11]], "2 queries, but slots for 1"),
    ([7, 8], [10, 11, 12], "query 0: it has 2 tokens, but 3 slots"),
    ([[7, 8], [7, 8]], [[10, 11], [12, -1]], "slots of query 1: (-1|the slot) at position 1 is negative"),
    ([7, 8], [10, -3], "slots of query 0: (-3|the slot) at position 1 is negative"),
    (
        [7, 8],
        [10, 2**31],
        "slots of query 0: (2147483648 at position 1 does not fit .* slot_dtype=torch.int64|"
        "the slot at position 1 is negative, or does not fit the pool's torch.int32)",
    ),
    ([7, 8], torch.tensor([1.0, 2.0]), "dtype torch.float32"),
    ([[7, 8]], [["x", 1]], "slots of query 0: 'x' of type str"),
]


@pytest.mark.parametrize(("q", "slots", "message"), BAD_SLOTS)
def test_slots(tree: RadixTree, q: Any, slots: Any, message: str) -> None:
    refuses(tree, lambda: tree.insert(q, slots, namespace="new"), message)


@pytest.mark.parametrize(("q", "slots", "message"), BAD_SLOTS)
def test_slots_of_a_separate_pool(device: str, q: Any, slots: Any, message: str) -> None:
    tree = RadixTree(64, page_size=2, device=device, slot_device="cpu")
    refuses(tree, lambda: tree.insert(q, slots, namespace="new"), message)


def test_a_batch_is_all_or_nothing(tree: RadixTree) -> None:
    good = [[20, 21], [22, 23], [24, 25]]
    slots = [[1, 2], [3, 4], [5, 6]]
    refuses(tree, lambda: tree.insert([*good, [26, -1]], [*slots, [7, 8]], namespace=list("xyzw")), "query 3")


def test_offsets() -> None:
    values = torch.arange(6)
    for offsets, message in (
        ([0, 3, 5], "run from 0 to 5, but there are 6 values"),
        ([1, 3, 6], "run from 1 to 6"),
        ([0, 4, 2, 6], "fall at query 1: from 4 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Ragged(values, torch.tensor(offsets))
    with pytest.raises(ValueError, match="int64 or int32"):
        Ragged(values, torch.tensor([0, 6], dtype=torch.int16))
    with pytest.raises(ValueError, match="1-D"):
        Ragged(values.reshape(2, 3), torch.tensor([0, 6]))


def test_offsets_that_were_spoilt_later(tree: RadixTree) -> None:
    q = Ragged(torch.arange(6), torch.tensor([0, 4, 6]))
    q.offsets[1] = 60
    refuses(tree, lambda: tree.match(q), "fall at query 1")


def test_namespaces(tree: RadixTree) -> None:
    refuses(tree, lambda: tree.match([1, 2], namespace=7.0), "namespace is a float")
    refuses(tree, lambda: tree.insert([1, 2], [1, 2], namespace=True), "namespace is a bool")
    refuses(tree, lambda: tree.match([[1, 2], [3, 4]], namespace=["a", 1.5]), "namespace of query 1 is a float")
    refuses(tree, lambda: tree.match([[1, 2]], namespace=["a", "b"]), "2 namespaces for 1 queries")


def test_stale_handles(tree: RadixTree) -> None:
    old = tree.match([[1, 2, 5, 6], [1, 2, 3, 4]])
    tree.evict(4)
    assert tree.num_nodes == 2, "the locked path alone stays"
    for call in (tree.lock, tree.unlock, tree.slots):
        refuses(
            tree, lambda call=call: call(old), "query 0: its handle names a node that was evicted", StaleHandleError
        )
    refuses(tree, lambda: tree.match([[1, 2], [3, 4]], start=old), "query 0", StaleHandleError)
    refuses(tree, lambda: tree.insert([[1, 2], [3, 4]], [[1, 2], [3, 4]], start=old), "query 0", StaleHandleError)


def test_a_row_that_is_used_again_is_another_node(device: str) -> None:
    tree = RadixTree(2, device=device)
    old = tree.insert([1, 2], [1, 2])
    tree.evict(2)
    new = tree.insert([3, 4], [3, 4])
    refuses(tree, lambda: tree.lock(old), "evicted", StaleHandleError)
    tree.lock(new)


def test_handles_of_another_tree(tree: RadixTree, device: str) -> None:
    other = RadixTree(64, page_size=2, device=device)
    foreign = other.insert([[1, 2, 3, 4]], [[0, 1, 2, 3]])
    nothing = other.match([7, 7])
    for places in (foreign, nothing, other.match([1, 2])):
        refuses(tree, lambda places=places: tree.lock(places), "another tree", StaleHandleError)
        refuses(tree, lambda places=places: tree.match([5, 6], start=places), "another tree", StaleHandleError)
    made_up = place(tree, [-5, 2**62], [2, 2])
    refuses(tree, lambda: tree.lock(made_up), "query 0", StaleHandleError)


def test_lengths_that_do_not_fit_their_handles(tree: RadixTree) -> None:
    m = tree.match([[1, 2, 3, 4]])
    for length in (1, 6, -2):
        places = SimpleNamespace(handles=m.handles, lengths=torch.tensor([length], device=tree.device))
        refuses(tree, lambda places=places: tree.lock(places), f"query 0: length {length} is no page boundary")


def test_places(tree: RadixTree) -> None:
    m = tree.match([[1, 2], [1, 2]])
    refuses(tree, lambda: tree.lock(m.handles), "a Tensor names no place")
    refuses(tree, lambda: tree.match([[3, 4]], start=m.handles), "names no place")
    refuses(tree, lambda: tree.match([[3, 4]], start=m), "start has 2 places for 1 queries")
    three = torch.zeros(3, dtype=torch.int32, device=tree.device)
    refuses(tree, lambda: tree.lock(SimpleNamespace(handles=m.handles, lengths=three)), "3")
    refuses(tree, lambda: tree.lock(SimpleNamespace(handles=m.handles.float(), lengths=m.lengths)), "int64")
    refuses(tree, lambda: tree.lock(SimpleNamespace(handles=m.handles, lengths=[2, 2])), "lengths must be")


def test_an_unlock_too_many(tree: RadixTree) -> None:
    held = tree.match([[1, 2, 3, 4]])
    above = tree.match([[1, 2]])
    refuses(tree, lambda: tree.unlock(above), "no lock ends at its length 2")
    both = tree.match([[1, 2, 3, 4], [1, 2, 3, 4]])
    refuses(tree, lambda: tree.unlock(both), "query 1: no lock ends")
    tree.unlock(held)
    refuses(tree, lambda: tree.unlock(held), "query 0: no lock ends")
    single = tree.match([1, 2, 3, 4])
    refuses(tree, lambda: tree.unlock(single), "no lock ends")


def test_start_in_another_namespace(tree: RadixTree) -> None:
    m = tree.match([[9, 9]], namespace="a")
    refuses(tree, lambda: tree.match([[1, 2]], start=m, namespace="b"), "its start is in another namespace")
    refuses(tree, lambda: tree.insert([1, 2], [1, 2], start=m, namespace="b"), "its start is in another namespace")
    assert tree.insert([1, 2], [1, 2], start=m, namespace="a").lengths.tolist() == [4]
    assert tree.match([[1, 2]], start=m).lengths.tolist() == [4]


def test_start_of_bigrams_that_does_not_join(device: str) -> None:
    tree = RadixTree(64, device=device, bigram=True)
    r = tree.insert([1, 2, 3], [0, 1, 2])
    refuses(tree, lambda: tree.match([4, 5], start=r), "a key begins with the last token of its start")
    assert tree.insert([3, 5], [2, 3], start=r).lengths.tolist() == [3]


def test_capacity(tree: RadixTree) -> None:
    keys = [list(range(100 * i, 100 * i + 20)) for i in range(1, 4)]
    slots = [list(range(20))] * 3
    message = r"60 new tokens, but 56 of 64 are free: 4 too few; evict\(4\) first \(4 tokens are evictable\)"
    raised = refuses(tree, lambda: tree.insert(keys, slots, namespace=["x", "y", "z"]), message, CapacityError)
    error = raised.value
    assert isinstance(error, CapacityError)
    assert (error.needed, error.free) == (60, 56)
    refuses(tree, lambda: tree.insert(list(range(80)), list(range(80)), namespace="x"), "80 new", CapacityError)
    shared = [[*range(100, 140), 1, 2], [*range(100, 140), 3, 4], [*range(100, 140), 5, 6]]
    tree.insert(shared, [list(range(42))] * 3)
    assert tree.total_tokens == 8 + 46, "what the batch shares was counted once"


def test_priorities_and_inserted_lengths(tree: RadixTree) -> None:
    refuses(tree, lambda: tree.insert([1, 2], [1, 2], priority=1.5), "priority must be an integer")
    refuses(
        tree, lambda: tree.insert([[1, 2]], [[1, 2]], priority=[1, 2]), "priority must be an integer, or 1 integers"
    )
    refuses(tree, lambda: tree.insert([[1, 2]], [[1, 2]], inserted_lengths=[None]), "inserted_lengths must be")


def test_write_slots(tree: RadixTree) -> None:
    m = tree.match([[1, 2, 3, 4], [1, 2]])
    table = torch.full((3, 4), -1, dtype=torch.int32, device=tree.device)

    def refused(message: str, table: Any, rows: Any, places: Any = m, error: type[Exception] = ValueError) -> None:
        refuses(tree, lambda: tree.write_slots(places, table, rows), f"write_slots: .*{message}", error)

    refused("query 1: the table has no row 3", table, [0, 3])
    refused("query 0: the table has no row -1", table, [-1, 0])
    refused("query 0: its 4 slots are more than a row of the table holds", table[:, :2], [0, 1])
    refused("query 1: length 1 is no page boundary", table, [0, 1], place(tree, m.handles.tolist(), [4, 1]))
    refused("query 0: its handle names a node", table, [0], place(tree, [2**62], [2]), StaleHandleError)
    refused("rows must be 2 integers, one a query", table, [0])
    refused("rows must be 2 integers", table, [0.5, 1.0])
    refused("int32 or int64 tensor", table.float(), [0, 1])
    refused("int32 or int64 tensor", table.tolist(), [0, 1])
    refused("int32 or int64 tensor", table[0], [0, 1])
    refused("must lie next to each other", table.t(), [0, 1])
    refused("rows of the table overlap", table[:1].expand(3, -1), [0, 1])
    refused("the table is on meta", table.to("meta"), [0, 1])
    assert (table == -1).all()
    tree.write_slots(m, table, [0, 1])
    assert table.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1], [-1, -1, -1, -1]]


def test_write_slots_of_64_bits(device: str) -> None:
    tree = RadixTree(8, device=device, slot_dtype=torch.int64)
    m = tree.insert([[1, 2]], [[2**40, 1]])
    table = torch.zeros((1, 2), dtype=torch.int32, device=tree.device)
    refuses(tree, lambda: tree.write_slots(m, table, [0]), "slots are torch.int64, which a table of torch.int32 does")


def test_evict(tree: RadixTree) -> None:
    refuses(tree, lambda: tree.evict(-1), "give a number >= 0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a positive integer"),
        ({"max_tokens": 8, "page_size": 0}, "page_size must be a positive integer"),
        ({"max_tokens": 8, "page_size": 16}, "less than one page"),
        ({"max_tokens": 2.5}, "max_tokens must be a positive integer"),
        ({"max_tokens": 2**31}, "too large"),
        ({"max_tokens": 8, "policy": "tlru"}, "policy 'tlru' is unknown: one of lru, lfu"),
        ({"max_tokens": 8, "device": "tpu"}, 'device="tpu" is no device'),
        ({"max_tokens": 8, "device": "meta"}, "lives on cpu or cuda"),
        ({"max_tokens": 8, "slot_dtype": torch.int16}, "slot_dtype must be"),
    ],
)
def test_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadixTree(**arguments)


def test_the_environment_variable_speaks_for_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATRADIX_DEVICE", "cpu")
    assert RadixTree(8).device.type == "cpu"
    monkeypatch.setenv("FLATRADIX_DEVICE", "tpu")
    assert RadixTree(8, device="cpu").device.type == "cpu"
    with pytest.raises(ValueError, match="FLATRADIX_DEVICE=tpu is no device"):
        RadixTree(8)
    assert devices.auto_reason().startswith("nothing: FLATRADIX_DEVICE=tpu is no device")


def test_cuda_where_there_is_none() -> None:
    if not devices.why_not_cuda():
        pytest.skip("a CUDA device is there, or an interpreter in its place")
    with pytest.raises(
        flatradix.DeviceUnavailableError, match=r'device="cuda" cannot be used: .*; take "cpu" or "auto"'
    ):
        RadixTree(8, device="cuda")


def test_numbers_beyond_64_bits(tree: RadixTree) -> None:
    refuses(tree, lambda: tree.insert([1, 2], [1, 2], namespace="new", priority=2**70), "priority 1.* does not fit")
    refuses(tree, lambda: tree.insert([[1, 2]], [[1, 2]], namespace="new", inserted_lengths=-(2**64)), "does not fit")
    refuses(tree, lambda: tree.insert([[1, 2]], [[1, 2]], priority=np.array([2**63], np.uint64)), "does not fit")
    assert tree.evict(2**70).num_tokens == 4


def test_a_start_that_was_never_given_out(tree: RadixTree) -> None:
    nowhere = place(tree, [-1], [0])
    refuses(tree, lambda: tree.match([[1, 2]], start=nowhere), "query 0", StaleHandleError)
    refuses(tree, lambda: tree.insert([[1, 2]], [[1, 2]], start=nowhere), "query 0", StaleHandleError)


def test_a_bad_token_is_told_before_want_of_room(tree: RadixTree) -> None:
    key = [*range(100), -1]
    refuses(tree, lambda: tree.insert(key, list(range(101))), "the token at position 100")
    refuses(tree, lambda: tree.insert([key], [list(range(101))]), "the token at position 100")


def test_a_handle_from_before_a_load_in_another_process(tmp_path: Path, device: str) -> None:
    """The generations of each tree begin at a random number, so a loaded tree refuses the handles of another tree."""
    code = f"""
import flatradix
tree = flatradix.RadixTree(8, device={device!r})
print(tree.insert([1], [1]).handle)
tree.save({str(tmp_path / "tree")!r})
"""
    import subprocess
    import sys

    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = RadixTree.load(tmp_path / "tree", device=device)
    assert loaded.slots(place(loaded, [int(done.stdout)], [1])).to_list() == [[1]]
    stranger = RadixTree(8, device=device).insert([1], [1])
    refuses(loaded, lambda: loaded.slots(stranger), "another tree", StaleHandleError)


def test_slots_for_another_number_of_queries(tree: RadixTree) -> None:
    two = Ragged.from_sequences([[1, 2], [3, 4]])
    refuses(tree, lambda: tree.insert([1, 2], two), "1 queries, but slots for 2")
    refuses(tree, lambda: tree.insert([1, 2], Ragged.from_sequences([])), "1 queries, but slots for 0")
    assert tree.insert([7, 7], ([5, 6],)).length == 2


def test_handles_that_share_memory(tree: RadixTree) -> None:
    m = tree.match([1])
    one = tree.match([[1, 2]])
    same = SimpleNamespace(handles=one.handles.expand(3), lengths=one.lengths.expand(3))
    refuses(tree, lambda: tree.lock(same), "share memory")
    tree.lock(m)


def test_devices_of_slots() -> None:
    for device in ("nope", "meta", 1.5):
        with pytest.raises(ValueError, match="slot_device"):
            RadixTree(8, slot_device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize("evict_by", ["node", "page"])
def test_check_finds_a_slot_that_is_twice_on_a_path(device: str, evict_by: str) -> None:
    tree = RadixTree(64, page_size=2, device=device, evict_by=evict_by)
    tree.insert([[7, 8], [1, 2, 3, 4]], [[4, 5], [0, 1, 2, 3]])
    tree.insert([1, 2, 3, 4], [9, 9, 9, 9])  # all of it is cached: these slots are not stored
    tree.evict(2)  # what was freed is still in the pools
    tree.insert([5, 5, 6, 6], [4, 3, 8, 9])  # another key may have slot 3 as well
    tree.check()
    place = tree.insert([1, 2, 9, 9], [0, 1, 7, 7])
    with pytest.raises(
        AssertionError,
        match=r"slot 7 is twice on a path, at path length 2 of row (\d+) and at path length 3 of row \1:",
    ):
        tree.check()
    assert tree.slots(place).to_list() == [[0, 1, 7, 7]]
    tree.reset()
    tree.insert([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 5])
    tree.split(tree.match([1, 2]))
    with pytest.raises(
        AssertionError, match=r"slot 0 is twice on a path, at path length 0 of row \d+ and at path length 4 of row \d+:"
    ):
        tree.check()
    tree.reset()
    tree.check()
