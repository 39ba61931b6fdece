"""What only a tree on a GPU does: errors that come later, calls that wait for nothing, streams, graphs, memory.

Where there is no GPU, Triton's interpreter stands in for it under TRITON_INTERPRET=1, with fewer and smaller batches.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flatradix
from flatradix import CapacityError, DeviceUnavailableError, RadixTree, Ragged, StaleHandleError, backend, meta
from tests.devices import interpreted, settled


class Pair:
    """A tree on the CPU and one on the GPU, driven through the same calls."""

    def __init__(self, device: str, max_tokens: int, page_size: int = 1, **options: Any) -> None:
        self.host = RadixTree(max_tokens, page_size, "cpu", **options)
        self.tree = RadixTree(max_tokens, page_size, device, **options)

    def insert(self, keys: list[list[int]], slots: list[list[int]], **options: Any) -> tuple[Any, Any]:
        results = self.host.insert(keys, slots, **options), self.tree.insert(keys, slots, **options)
        host, tree = results
        assert tree.lengths.tolist() == host.lengths.tolist()
        assert tree.prefix_lengths.tolist() == host.prefix_lengths.tolist()
        return results

    def match(self, keys: list[list[int]], **options: Any) -> tuple[Any, Any]:
        results = self.host.match(keys, **options), self.tree.match(keys, **options)
        assert results[1].lengths.tolist() == results[0].lengths.tolist()
        return results

    def on_each(self, name: str, places: tuple[Any, Any]) -> None:
        getattr(self.host, name)(places[0])
        getattr(self.tree, name)(places[1])

    def evict(self, num_tokens: int) -> None:
        host, tree = self.host.evict(num_tokens), self.tree.evict(num_tokens)
        assert tree.slots.tolist() == host.slots.tolist()
        assert tree[1:] == host[1:]

    def compare(self) -> None:
        assert self.tree.digest() == self.host.digest()
        for name in ("evictable_tokens", "protected_tokens", "num_nodes"):
            assert getattr(self.tree, name) == getattr(self.host, name), name
        self.tree.check()


def numbered(keys: Sequence[Sequence[int]]) -> list[list[int]]:
    """Slots for keys: a number of its own for each token."""
    return [[1000 * query + position for position in range(len(key))] for query, key in enumerate(keys)]


def ragged(keys: list[list[int]], tree: RadixTree, dtype: torch.dtype = torch.int64) -> Ragged:
    """Keys on the tree's device, of which the host knows no more than how many they are."""
    found = Ragged.from_sequences(keys)
    return Ragged(found.values.to(tree.device, dtype), found.offsets.to(tree.device))


# Which device


def test_auto_takes_the_gpu_and_the_variable_speaks_for_it(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.device_tree import DeviceTree
    from flatradix.host_tree import HostTree

    auto = HostTree if interpreted() else DeviceTree  # an interpreter is for those who ask for it
    monkeypatch.delenv("FLATRADIX_DEVICE", raising=False)
    assert type(RadixTree(8)) is auto
    for name, kind in (("cpu", HostTree), ("cuda", DeviceTree), ("cuda:0", DeviceTree), ("auto", auto)):
        monkeypatch.setenv("FLATRADIX_DEVICE", name)
        assert type(RadixTree(8)) is kind
        assert type(RadixTree(8, device="cpu")) is HostTree
        assert type(RadixTree(8, device=torch.device("cuda"))) is DeviceTree


def test_a_device_that_is_not_there(gpu: str) -> None:
    with pytest.raises(
        DeviceUnavailableError, match=r"cuda:99 cannot be used: there are \d+ CUDA devices, from cuda:0 on"
    ):
        RadixTree(8, device="cuda:99")


def test_a_tree_says_where_it_is(gpu: str) -> None:
    tree = RadixTree(8, device="cuda")
    assert tree.device == torch.device("cuda", 0)
    assert tree.match([[1]]).handles.device == tree.device
    assert "cuda:0" in repr(tree)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Whether CUDA can be used is looked at anew, here and afterwards."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FLATRADIX_DEVICE", raising=False)
    monkeypatch.setattr(backend, "why_not_cuda", backend.why_not_cuda.__wrapped__)
    monkeypatch.setattr(backend, "_told", False)
    return monkeypatch


def test_why_not_without_a_device(no_interpreter: pytest.MonkeyPatch) -> None:
    no_interpreter.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_not_cuda() == "torch sees no CUDA device"
    for device, asked in (("cuda", 'device="cuda"'), ("cuda:1", 'device="cuda:1"')):
        with pytest.raises(DeviceUnavailableError, match=f"{asked} cannot be used: torch sees no CUDA device; take "):
            RadixTree(8, device=device)
    no_interpreter.setenv("FLATRADIX_DEVICE", "cuda")
    with pytest.raises(DeviceUnavailableError, match="FLATRADIX_DEVICE=cuda cannot be used: torch sees no CUDA device"):
        RadixTree(8)


def test_why_not_without_triton(no_interpreter: pytest.MonkeyPatch) -> None:
    no_interpreter.setattr(torch.cuda, "is_available", lambda: True)
    no_interpreter.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceUnavailableError, match=r"Triton is not installed \(pip install 'flatradix\[gpu\]'\)"):
        RadixTree(8, device="cuda")


def test_why_not_where_kernels_do_not_run(no_interpreter: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise RuntimeError("no ptxas\nand more")

    no_interpreter.setattr(torch.cuda, "is_available", lambda: True)
    no_interpreter.setattr(importlib, "import_module", lambda name: SimpleNamespace(probe=probe))
    no_interpreter.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(DeviceUnavailableError, match="a first kernel does not compile and run: no ptxas; take"):
        RadixTree(8, device="cuda")


def test_auto_falls_back_and_says_so_once(no_interpreter: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    no_interpreter.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="flatradix"):
        assert [RadixTree(8).device.type for _ in range(3)] == ["cpu"] * 3
    assert [record.getMessage() for record in caplog.records] == ["device auto takes cpu: torch sees no CUDA device"]


# Memory


def no_memory(*arguments: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("allocate_device", no_memory, torch.OutOfMemoryError, "CUDA out of memory"),
        ("MAX_UNITS", 100, ValueError, "max_tokens 64 is too large for a tree on a GPU"),
    ],
)
def test_auto_takes_the_cpu_where_a_gpu_has_no_room(
    name: str,
    value: Any,
    error: type[Exception],
    message: str,
    cuda: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flatradix import device_tree

    monkeypatch.delenv("FLATRADIX_DEVICE", raising=False)
    monkeypatch.setattr(backend, "_why_not_auto", lambda: "")
    monkeypatch.setattr(device_tree, name, value)
    with pytest.raises(error, match=message):
        RadixTree(64, device="cuda")
    with caplog.at_level(logging.WARNING, logger="flatradix"):
        tree = RadixTree(64, page_size=2, device="auto", policy="lfu", slot_dtype=torch.int64)
    assert f"device auto takes the CPU: {message}" in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelno == logging.WARNING
    assert (tree.device.type, tree.page_size, tree.policy, tree.slot_dtype) == ("cpu", 2, "lfu", torch.int64)
    tree.insert([[1, 2], [3, 4]], [[2**40, 1], [3, 4]])
    assert tree.evict(1).slots.tolist() == [2**40, 1]
    tree.check()
    monkeypatch.setenv("FLATRADIX_DEVICE", "cuda")
    with pytest.raises(error, match=message):
        RadixTree(64)


def test_out_of_the_memory_of_a_gpu(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATRADIX_DEVICE", raising=False)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            RadixTree(4_000_000, device="cuda")
        tree = RadixTree(4_000_000, device="auto")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tree.device.type == "cpu"
    assert tree.insert([1, 2], [1, 2]).length == 2


def test_too_large(cuda: str) -> None:
    with pytest.raises(ValueError, match=r"too large for a tree on a GPU: at most 8.5e8 tokens"):
        RadixTree(1_000_000_000, page_size=64, device=cuda)


# Errors that come later


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
    """What takes a place of a refused call is refused too."""
    with pytest.raises(StaleHandleError):
        settled(tree, call)


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
    count = meta.REFUSALS + 30
    for call in range(count):
        tree.match([*key[:call], -1])
    with pytest.raises(ValueError, match=rf"match: query 0: .* \({count - 1} later calls were refused too\)$") as told:
        tree.raise_pending()
    position = int(str(told.value).split("position ")[1].split()[0])
    assert count - meta.REFUSALS <= position < count, "one of those that are still known"
    tree.raise_pending()
    tree.match([[-1]])
    with pytest.raises(ValueError, match=r"2\*\*31 - 1\]$"):
        tree.raise_pending()


def test_more_single_calls_than_there_are_answers(cuda: str) -> None:
    tree = RadixTree(64, device=cuda)
    key = list(range(7))
    first = tree.insert(key, key)
    second = tree.insert([*key[:3], 9], [0] * 4)
    inside = tree.match([0])
    tree.lock(inside)
    lengths = [1 + call % 7 for call in range(meta.ANSWERS + 20)]
    results = [tree.match(key[:length], touch=False) for length in lengths]
    assert [result.length for result in results] == lengths
    assert len({result.handle for result in results}) == 3, "the path is in three parts"
    assert (first.prefix_length, first.length, second.prefix_length, second.length) == (0, 7, 3, 4)
    assert inside.handle == int(inside.handles[0]) == results[0].handle != first.handle
    tree.unlock(inside)
    tree.check()


def test_numbers_of_calls_begin_anew(cuda: str) -> None:
    tree = RadixTree(16, device=cuda)
    tree._calls = meta.CALL_MASK - 4
    results = [tree.insert([call], [call]) for call in range(9)]
    assert [result.length for result in results] == [1] * 9
    assert tree.total_tokens == tree.num_nodes == 9
    tree.match([-1])
    with pytest.raises(ValueError, match="position 0"):
        tree.raise_pending()
    tree.check()


def test_what_only_the_device_can_know(cuda: str) -> None:
    """Bad batches in device memory are refused by the kernels, with the query that is bad, and change nothing."""
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
            continue  # then the host sees it, as it does with all batches in its memory
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
    assert [name for _, name in tree._namespaces.items()] == [None, "a", "b", "e"]
    tree.check()


def test_namespaces_of_empty_keys_are_forgotten(cuda: str) -> None:
    """The host does not see how long a key in device memory is."""
    tree = RadixTree(8, page_size=2, device=cuda)
    keys = ragged([[], [1, 2], [3]], tree)
    tree.insert(keys, keys, namespace=["a", "b", "c"])
    tree.check()
    assert [name for _, name in tree._namespaces.items()] == [None, "b"]


def test_more_names_than_the_tree_can_hold(cuda: str) -> None:
    tree = RadixTree(6, device=cuda)
    keys = [[i] for i in range(9)]
    for _ in range(2):
        tree.insert(keys, keys, namespace=[str(i) for i in range(9)])
    with pytest.raises(CapacityError, match="1 later call"):
        tree.raise_pending()
    tree.insert(keys[:6], keys[:6], namespace=[f"{i}!" for i in range(6)])
    tree.check()
    assert len(tree._namespaces.items()) == 7


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
    """More lanes than one program has, and more than the counting of the surplus looks at once."""
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
    host = pair.host.insert(more, numbered(more), start=host)
    result = tree.insert(ragged(more, tree), ragged(numbered(more), tree, torch.int32), start=result)
    assert result.lengths.tolist() == host.lengths.tolist()
    pair.compare()
    for dtype in (torch.int16, torch.uint8):
        assert tree.match(torch.tensor([6, 7, 8], dtype=dtype, device=tree.device), namespace="b").length == 3
        pair.host.match([6, 7, 8], namespace="b")
    pair.compare()


def test_places_in_other_forms(cuda: str) -> None:
    """Handles that lie apart are renewed where they lie, and lengths of 64 bits are taken."""
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
    """Tensors in host memory are brought over, those of places are refused."""
    tree = RadixTree(64, device=gpu)
    tree.insert(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3]).cuda())
    assert tree.match([torch.tensor([1, 2]).cuda(), torch.tensor([1, 3]), [1, 2, 3]]).lengths.tolist() == [2, 1, 3]
    m = tree.match([[1, 2]])
    there = SimpleNamespace(handles=m.handles.cpu(), lengths=m.lengths)
    with pytest.raises(ValueError, match="handles on cpu and lengths on cuda:0, but the tree is on cuda:0"):
        tree.lock(there)
    with pytest.raises(ValueError, match="the table is on cpu, but the slots are on cuda:0"):
        tree.write_slots(m, torch.zeros((1, 4), dtype=torch.int64), [0])


# Batches that are hard


def shared_prefixes(count: int, seed: int = 0, page: int = 1) -> list[list[int]]:
    """Keys that share stems of stems, in pages of few kinds."""
    rng = random.Random(seed)
    stems: list[list[int]] = [[]]
    for _ in range(count):
        stem = rng.choice(stems[-60:])
        pages = [[7] * (page - 1) + [rng.randrange(3)] for _ in range(rng.randint(0, 4))]
        stems.append(stem[: rng.randint(0, len(stem))] + [token for one in pages for token in one])
    return stems[1:]


def use(pair: Pair, keys: list[list[int]]) -> None:
    """The whole life of a batch."""
    pair.insert(keys, numbered(keys))
    pair.compare()
    locked = pair.match([key[: 2 * len(key) // 3] for key in keys], lock=True)
    pair.compare()
    again = pair.match([*keys[1:], []], touch=False)
    assert pair.tree.slots(again[1]).to_list() == pair.host.slots(again[0]).to_list()
    pair.evict(pair.host.total_tokens // 3)
    pair.compare()
    pair.on_each("unlock", locked)
    pair.insert(keys[::-1], numbered(keys[::-1]))
    pair.compare()
    pair.evict(pair.host.total_tokens)
    pair.compare()


@pytest.mark.parametrize(("page", "bigram"), [(1, False), (2, False), (1, True), (16, False)])
def test_a_batch_of_shared_prefixes(cuda: str, page: int, bigram: bool) -> None:
    count = 35 if interpreted(cuda) else 1025
    use(Pair(cuda, 16384 * page, page, bigram=bigram), shared_prefixes(count, page=page))


def chains(count: int) -> dict[str, list[list[int]]]:
    longest = list(range(count))
    growing = [longest[: 1 + i] for i in range(count)]
    return {
        "each a page longer": growing,
        "each a page shorter": growing[::-1],
        "in no order": random.Random(1).sample(growing, count),
        "all equal": [longest] * count,
        "the last page differs": [[*longest, 1000 + i] for i in range(count)],
        "the first page differs": [[1000 + i, *longest[:5]] for i in range(count)],
        "pairs": [[*longest[: i // 2], 1000 + i] for i in range(count)],
        "one of two": [[*longest[: i % 7], i % 2] for i in range(count)],
    }


@pytest.mark.parametrize("kind", list(chains(1)))
def test_adversarial_batches(cuda: str, kind: str) -> None:
    count = 8 if interpreted(cuda) else 300
    use(Pair(cuda, 300 * count), chains(count)[kind])


def test_cuts_of_one_edge_everywhere(cuda: str) -> None:
    """Locks, and inserts, that end at every place of one long edge at once."""
    count = 12 if interpreted(cuda) else 300
    long = list(range(count))
    for cutting in ("lock", "insert"):
        pair = Pair(cuda, 4 * count)
        pair.insert([long], [long])
        prefixes = [long[: 1 + i * 7 % count] for i in range(count)] + [long[: count // 2]] * 3
        if cutting == "lock":
            places = pair.match(prefixes, touch=False)
            pair.on_each("lock", places)
            pair.compare()
            pair.on_each("unlock", places)
        else:
            pair.insert(prefixes, numbered(prefixes))
        pair.compare()
        pair.evict(count // 2)
        pair.compare()


def test_a_lock_names_what_it_locked(cuda: str) -> None:
    """Also where another lock cut the edge before: what is below may be evicted, and the lock is still to be undone."""
    tree = RadixTree(64, device=cuda)
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    first, second, third = tree.match([[1, 2]]), tree.match([1, 2]), tree.match([[1, 2], [1, 2]])
    for places in (first, second, third):
        tree.lock(places)
    assert tree.evict(100).slots.tolist() == [3, 4]
    for places in (first, second, third):
        settled(tree, lambda places=places: tree.unlock(places))
    assert tree.protected_tokens == 0
    tree.check()


def test_a_climb_believes_no_wrong_hint(cuda: str) -> None:
    """Locks climb by what was above a row some time ago; cuts, evictions and new rows make that wrong."""
    count = 14 if interpreted(cuda) else 70
    pair = Pair(cuda, 4 * count)
    key = list(range(count))
    pair.insert([key, [*key[:5], 99]], [key, key[:6]])
    for step in (3, 2, 1):
        pair.on_each("unlock", pair.match([key[:end] for end in range(1, count + 1, step)], lock=True))
        leaves = pair.match([key, key, key[: count // 2], [*key[:5], 99]])
        hints = pair.tree._workspace.above
        rows = int(pair.tree._state.meta[meta.ROWS])
        rng = torch.Generator().manual_seed(step)
        for wrong in (torch.zeros(len(hints)), torch.randint(rows, hints.shape, generator=rng), None, None):
            if wrong is not None:
                hints.copy_(wrong)
            for what in ("lock", "unlock"):
                pair.on_each(what, leaves)
                pair.compare()
    pair.evict(count // 3)
    pair.insert([[7, *key]], [[7, *key]])
    pair.on_each("lock", pair.match([key, [7, *key], key[:3]]))
    pair.compare()


def test_many_keys_in_a_small_table(cuda: str) -> None:
    """Thousands of one-page keys: entries of the child table collide, and tombs of evicted ones lie between."""
    size = 48 if interpreted(cuda) else 8192
    pair = Pair(cuda, size)
    rng = random.Random(3)
    for turn in range(3):
        keys = [[key] for key in rng.sample(range(4 * size), size // 2)]
        pair.evict(max(0, pair.host.total_tokens + len(keys) - size))
        pair.insert(keys, numbered(keys), namespace=["ab"[key[0] % 2] for key in keys])
        pair.match([[key] for key in range(0, 4 * size, 1 + 20 * interpreted(cuda))], namespace="a", touch=turn == 1)
        pair.compare()


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_evictions_of_all_sizes(cuda: str, policy: str) -> None:
    """Out of more nodes than a bin, or a sample, holds."""
    count = 20 if interpreted(cuda) else 60_000
    pair = Pair(cuda, 2 * count, policy=policy)
    rng = random.Random(9)
    keys = [[key] if key % 3 else [key, 1, key] for key in range(count)]
    pair.insert(keys, numbered(keys))
    for _ in range(2):
        pair.match(rng.sample(keys, count // 2))
    pair.insert(keys[::7], numbered(keys[::7]))
    for part in (0, 1, count // 500, count // 10, count // 3, count):
        pair.evict(part)
        pair.compare()
    pair.insert(keys[:5], numbered(keys[:5]))
    pair.evict(3)
    pair.compare()


def test_evictions_from_one_long_path(cuda: str) -> None:
    """All nodes were used last at the same time, so that only their depth tells them apart."""
    count = 20 if interpreted(cuda) else 20_000
    pair = Pair(cuda, 2 * count)
    key = [token % 5 for token in range(count)]
    ends = pair.insert([key], [key])
    lengths = torch.arange(1, count + 1)
    for tree, end in zip((pair.host, pair.tree), ends, strict=True):
        places = SimpleNamespace(handles=end.handles.repeat(count), lengths=lengths.to(tree.device))
        tree.lock(places)
        tree.unlock(places)
    pair.match([key])
    pair.compare()
    assert pair.tree.num_nodes == count
    for part in (count // 4, 1, count // 10, count):
        pair.evict(part)
        pair.compare()


def test_long_keys(cuda: str) -> None:
    length = 3000 if interpreted(cuda) else 200_000
    pair = Pair(cuda, 4 * length, 16)
    key = [token % 1000 for token in range(length)]
    other = [*key[: length // 2], *key[: length // 4]]
    pair.insert([key, other], numbered([key, other]))
    for single in (key, other, key[: length // 3], other[:-20]):
        host, tree = pair.host.match(single, lock=True), pair.tree.match(single, lock=True)
        assert (tree.length, tree.lengths.tolist()) == (host.length, [host.length])
        assert torch.equal(pair.tree.slots(tree).values.cpu(), pair.host.slots(host).values)
    pair.compare()


def test_batches_that_outgrow_the_scratch(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix import device_tree

    sizes = (1024, 3000, 1025, 5)
    if interpreted(cuda):
        monkeypatch.setattr(device_tree, "_SMALLEST_BATCH", 4)
        sizes = (4, 11, 5, 2)
    pair = Pair(cuda, 20_000)
    for seed, size in enumerate(sizes):
        keys = shared_prefixes(size, seed)
        pair.insert(keys, numbered(keys))
        places = pair.match(keys, lock=True)
        pair.compare()
        pair.on_each("unlock", places)
        pair.evict(50)
        pair.compare()


def test_calls_in_a_row_without_waiting(cuda: str) -> None:
    """Only evictions wait. Compactions happen as they must, and refused calls leave no trace, told or not."""
    rounds, size = (6, 60) if interpreted(cuda) else (300, 600)
    pair = Pair(cuda, size, 2)
    host, tree = (drive(tree, random.Random(7), rounds) for tree in (pair.host, pair.tree))
    assert tree == host
    pair.compare()


def drive(tree: RadixTree, rng: random.Random, rounds: int) -> list[list[int]]:
    """Insert, match, lock and unlock, and now and then evict; what all that returned, in the end."""
    results: list[Any] = []
    locked: list[Any] = []
    for turn in range(rounds):
        keys = shared_prefixes(5, turn // 2, page=2)
        try:
            results.append(tree.insert(keys, numbered(keys), namespace=rng.choice([None, "a"])))
        except CapacityError:
            results.append(SimpleNamespace(lengths=torch.full((len(keys),), -1)))
        results.append(tree.match(keys, touch=rng.random() < 0.5))
        locked.append(tree.match(keys[:3], lock=True))
        if len(locked) > 2:
            tree.unlock(locked.pop(0))
        if rng.random() < 0.4:
            with contextlib.suppress(CapacityError):
                tree.raise_pending()
            results.append(SimpleNamespace(lengths=tree.evict(tree.max_tokens // 3).slots))
    with contextlib.suppress(CapacityError):
        tree.raise_pending()
    return [result.lengths.tolist() for result in results]


def test_warm_up(cuda: str) -> None:
    flatradix.warm_up(cuda)
    flatradix.warm_up(cuda, page_size=2, bigram=True)


# Without waiting


Calls = list[Callable[[], Any]]


def calls_that_do_not_wait(tree: RadixTree) -> Calls:
    """Each operation that only enqueues, on input that is on the device, and short single keys."""
    keys = [[1, 2, 3, 4], [1, 2, 5], [6, 7, 8]]
    q, slots = ragged(keys, tree), ragged(numbered(keys), tree)
    table = torch.zeros((4, 8), dtype=torch.int32, device=tree.device)
    rows = torch.arange(3, device=tree.device)
    priority = torch.arange(3, device=tree.device)
    first, first_slots = q.values[:4], slots.values[:4]
    kept: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        kept[name] = value

    return [
        lambda: keep("inserted", tree.insert(q, slots, priority=priority)),
        lambda: keep("matched", tree.match(q)),
        lambda: keep("locked", tree.match(q, lock=True)),
        lambda: tree.unlock(kept["locked"]),
        lambda: tree.lock(kept["matched"]),
        lambda: tree.write_slots(kept["matched"], table, rows),
        lambda: tree.unlock(kept["matched"]),
        lambda: keep("more", tree.match(q, start=kept["inserted"], touch=False)),
        lambda: keep("single", tree.match([1, 2, 3, 9])),
        lambda: tree.lock(kept["single"]),
        lambda: tree.unlock(kept["single"]),
        lambda: keep("one", tree.match(first, lock=True)),
        lambda: tree.unlock(kept["one"]),
        lambda: tree.insert(first, first_slots, start=kept["one"]),
    ]


def calls_with_host_input(tree: RadixTree) -> Calls:
    """Batches in host memory go through pinned memory."""
    keys = [[1, 2, 3, 4], [1, 2, 5], [6, 7, 8]]
    long = list(range(40_000))
    table = torch.zeros((4, 8), dtype=torch.int32, device=tree.device)
    return [
        lambda: tree.insert(keys, numbered(keys), namespace=["a", None, "b"], priority=[1, 2, 3]),
        lambda: tree.insert([1, 2, 3], torch.tensor([7, 8, 9]), inserted_lengths=2),
        lambda: tree.insert(long, long),
        lambda: tree.match(keys, namespace=["a", "b", "c"]),
        lambda: tree.match(long),
        lambda: tree.match(Ragged.from_sequences(keys)),
        lambda: tree.write_slots(tree.match(keys), table, [2, 0, 1]),
    ]


def quiet(call: Callable[[], Any]) -> None:
    """Run a call in which torch raises an error for whatever waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", [calls_that_do_not_wait, calls_with_host_input])
def test_no_call_synchronises(gpu: str, make: Callable[[RadixTree], Calls]) -> None:
    tree = RadixTree(100_000, device=gpu)
    for call in make(tree):  # compiles, and fills the caches of memory
        call()
    tree.raise_pending()
    for call in make(tree):
        quiet(call)
    tree.check()


def test_no_call_waits_for_the_device(gpu: str) -> None:
    """Also not for its own mail, which torch knows nothing of: the device is kept busy meanwhile."""
    tree = RadixTree(1000, device=gpu)
    for _ in range(2):
        for call in calls_that_do_not_wait(tree):
            call()
    calls = calls_that_do_not_wait(tree)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    busy.record()
    for number, call in enumerate(calls):
        call()
        assert not busy.query(), f"call {number} waited for the device"
    tree.check()
    assert busy.query()


def test_a_tree_may_go_while_its_calls_are_under_way(gpu: str) -> None:
    """What its kernels still write to does not belong to anybody else by then."""
    tree = RadixTree(64, device=gpu)
    for _ in range(3):
        tree.insert([[1, 2]], [[1, 2]])
        tree.match([1, 2])
    tree.raise_pending()
    torch.cuda._sleep(1_000_000_000)
    tree.insert([[1, 2, 3]], [[1, 2, 3]])
    tree.match([1, 2])
    del tree
    others = [torch.full((meta.MAIL,), 7, pin_memory=True) for _ in range(8)]
    torch.cuda.synchronize()
    assert all((other == 7).all() for other in others)


def test_pinned_batches_are_read_where_they_are(gpu: str) -> None:
    tree = RadixTree(64, device=gpu)
    q = Ragged(torch.tensor([1, 2, 3, 1, 2]).pin_memory(), torch.tensor([0, 3, 5]).pin_memory())
    single = torch.tensor([1, 2, 3, 4]).pin_memory()
    for _ in range(3):
        assert tree.insert(q, q).lengths.tolist() == [3, 2]
        assert tree.match(q).lengths.tolist() == [3, 2]
        assert tree.match(single).length == 3
    tree.check()


# Streams and graphs


def test_two_streams(gpu: str) -> None:
    pair = Pair(gpu, 4000)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    one.wait_stream(torch.cuda.current_stream())
    for turn in range(50):
        keys = shared_prefixes(20, turn)
        with torch.cuda.stream(one):
            inserted = pair.tree.insert(keys, numbered(keys))
        other.wait_event(one.record_event())
        with torch.cuda.stream(other):
            locked = pair.tree.match(keys, lock=True)
            single = pair.tree.match(keys[0] or [7])
        one.wait_event(other.record_event())
        with torch.cuda.stream(one):
            if turn % 2:
                pair.tree.unlock(locked)
            freed = pair.tree.evict(30).slots.tolist()
        host = pair.host.insert(keys, numbered(keys))
        host_locked = pair.host.match(keys, lock=True)
        assert single.length == pair.host.match(keys[0] or [7]).length
        if turn % 2:
            pair.host.unlock(host_locked)
        assert freed == pair.host.evict(30).slots.tolist()
        assert inserted.lengths.tolist() == host.lengths.tolist()
        assert locked.lengths.tolist() == host_locked.lengths.tolist()
        assert pair.tree.protected_tokens == pair.host.protected_tokens
    torch.cuda.current_stream().wait_stream(one)
    torch.cuda.current_stream().wait_stream(other)
    pair.compare()


def fixed_shape(seed: int) -> list[list[int]]:
    """Four keys of 6 tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(3) for _ in range(6)] for _ in range(4)]


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("at_once", [False, True])
def test_graphs(gpu: str, at_once: bool) -> None:
    """Match, lock and unlock are captured once and replayed on other contents of the same tensors."""
    pair = Pair(gpu, 1000)
    for seed in range(5):
        pair.insert(fixed_shape(seed), numbered(fixed_shape(seed)))
    q = ragged(fixed_shape(0), pair.tree)

    def enter(tree: RadixTree, keys: Any) -> Any:
        found = tree.match(keys, lock=at_once)
        if not at_once:
            tree.lock(found)
        return found

    pair.tree.unlock(enter(pair.tree, q))  # compiles
    pair.host.unlock(enter(pair.host, fixed_shape(0)))
    entering, found = captured(lambda: enter(pair.tree, q))
    leaving, _ = captured(lambda: pair.tree.unlock(found))
    for seed in (3, 1, 11, 4, 12):
        keys = fixed_shape(seed)
        q.values.copy_(torch.tensor([token for key in keys for token in key]))
        host = enter(pair.host, keys)
        entering.replay()
        assert pair.tree.protected_tokens == pair.host.protected_tokens > 0
        assert found.lengths.tolist() == host.lengths.tolist()
        pair.compare()
        assert pair.tree.slots(found).to_list() == pair.host.slots(host).to_list()
        pair.host.unlock(host)
        leaving.replay()
        assert pair.tree.protected_tokens == 0
        pair.compare()
        pair.insert([[*keys[0], seed]], [[0] * 7])
        pair.evict(3)
    q.values[6] = -1
    entering.replay()
    with pytest.raises(ValueError, match="match: query 1: the token at position 0"):
        pair.tree.raise_pending()
    pair.compare()


def test_a_graph_needs_scratch_for_its_batch(gpu: str) -> None:
    tree = RadixTree(10_000, device=gpu)
    q = ragged([[1]] * 2000, tree)
    settled(tree, lambda: tree.match(ragged([[1]] * 10, tree)))
    with pytest.raises(RuntimeError, match="run a batch of 2000 once before a CUDA graph is captured with it"):
        captured(lambda: tree.match(q))
    settled(tree, lambda: tree.match(q))
    graph, found = captured(lambda: tree.match(q))
    tree.insert([1], [1])
    graph.replay()
    assert tree.total_tokens == 1
    assert found.lengths.tolist() == [1] * 2000


def test_a_single_key_in_a_graph(gpu: str) -> None:
    tree = RadixTree(64, device=gpu)
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    key = torch.tensor([1, 2, 9], device=tree.device)
    settled(tree, lambda: tree.match([[1]]))
    settled(tree, lambda: tree.match(ragged([[1]], tree)))
    graph, found = captured(lambda: tree.match(key))
    for tokens, length in (([1, 2, 9], 2), ([7, 7, 7], 0), ([1, 2, 3], 3)):
        key.copy_(torch.tensor(tokens))
        graph.replay()
        tree.raise_pending()
        assert found.lengths.tolist() == [length]


def test_what_a_graph_cannot_hold(gpu: str) -> None:
    tree = RadixTree(64, device=gpu)
    q = ragged([[1], [2]], tree)
    for call, message in (
        (lambda: tree.match([1, 2]), "cannot hold inputs in host memory"),
        (lambda: tree.match([[1], [2]]), "cannot hold inputs in host memory"),
        (lambda: tree.match(q, namespace="a"), "cannot hold a namespace"),
        (lambda: tree.insert(q, q), "insert cannot be part of a CUDA graph"),
    ):
        with pytest.raises(RuntimeError, match=message):
            captured(call)
    assert tree.insert(q, q).lengths.tolist() == [1, 1]
    tree.check()


# Launching


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_insert_leaves_nothing_behind(cuda: str, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of its launches is the one that does not come about."""
    from flatradix.kernels.gpu.launch import Kernel

    launch, launches = Kernel.__call__, []

    def interrupt(*arguments: Any) -> None:
        launches.append(arguments[0])
        if len(launches) > done:
            raise KeyboardInterrupt
        launch(*arguments)

    pair = Pair(cuda, 64)
    keys = [[1, 2, 3], [1, 2, 4], [1, 5]]
    pair.insert([[1, 2, 3, 6]], [[1, 2, 3, 6]])
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "__call__", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            pair.tree.insert([*keys, [-1]], numbered([*keys, [-1]]), namespace=["new", None, None, None])
    if len(launches) <= done:
        pytest.skip(f"an insert has {len(launches)} launches")
    pair.compare()
    assert len(pair.tree._namespaces.items()) == 1
    use(pair, keys)


def test_a_launch_that_never_was(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for its numbers is told, and does not wait for ever."""
    from flatradix.kernels.gpu.launch import Kernel

    tree = RadixTree(64, device=cuda)
    tree.insert([[1, 2]], [[1, 2]])
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "__call__", lambda *arguments: None)
        result = tree.match([1, 2])
        for wait in (tree.raise_pending, lambda: result.length):
            with pytest.raises(RuntimeError, match="has not told its numbers: its launch failed or was interrupted"):
                wait()
    assert tree.match([1, 2]).length == 2
    tree.check()


@pytest.mark.parametrize("missing", ["_launcher", "_direct_launch"])
def test_the_public_ways_to_launch_do_the_same(gpu: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.kernels.gpu import launch

    keys = shared_prefixes(200)
    for kernel in launch.Kernel.made:
        monkeypatch.setattr(kernel, "_compiled", {})
    pair = Pair(gpu, 4000)
    for _ in range(2):
        use(pair, keys)
    assert pair.tree._bound.direct, "nothing is launched directly: Triton or the driver has changed"
    monkeypatch.setattr(launch, missing, lambda *arguments: None)
    for kernel in launch.Kernel.made:
        monkeypatch.setattr(kernel, "_compiled", {})
    pair = Pair(gpu, 4000)
    for _ in range(2):
        use(pair, keys)
    assert not pair.tree._bound.direct
    assert any(kernel._compiled for kernel in launch.Kernel.made) == (missing != "_launcher")
