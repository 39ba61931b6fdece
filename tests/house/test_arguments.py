"""Arguments of the public classes: a bad one raises ValueError or DeviceUnavailableError that names it."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flatradix import CapacityError, DeviceUnavailableError, PrefixCache, RadixTree, Ragged, WaitingQueue
from tests.support.devices import settled

ROOT = Path(__file__).parents[2]


def prefix_cache(**arguments: Any) -> PrefixCache:
    return PrefixCache(**{"num_slots": 64, "page_size": 2, "max_requests": 4, "max_length": 32} | arguments)


def tree(**arguments: Any) -> RadixTree:
    return RadixTree(**{"max_tokens": 64, "device": "cpu"} | arguments)


def queue() -> Any:
    return prefix_cache().queue()


NOT_POSITIVE = (0, -1, 1000.0, "10", None, True, [4], np.float32(3))
CALLS: dict[str, Callable[[Any], object]] = {
    "num_slots": lambda value: prefix_cache(num_slots=value),
    "max_requests": lambda value: prefix_cache(max_requests=value),
    "max_length": lambda value: prefix_cache(max_length=value),
    "page_size": lambda value: prefix_cache(page_size=value),
    "max_tokens": lambda value: (
        tree(max_tokens=5 if value is None else value) if value is not None else tree(max_tokens=0)
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", NOT_POSITIVE, ids=repr)
def test_a_count_must_be_a_positive_integer(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be a positive integer, not "):
        CALLS[name](value)


def test_integers_of_numpy_are_taken() -> None:
    cache = prefix_cache(num_slots=np.int64(64), page_size=np.int32(2), max_length=np.int16(32))
    assert (type(cache.page_size), cache.max_length) == (int, 32)
    assert RadixTree(np.int32(8), np.int8(2), device="cpu").max_tokens == 8


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: prefix_cache(num_slots=2**31), "num_slots"),
        (lambda: prefix_cache(num_slots=1), "num_slots"),
        (lambda: prefix_cache(policy="best"), "policy"),
        (lambda: prefix_cache(evict_by="slot"), "evict_by"),
        (lambda: prefix_cache().begin([[1, 2]], chunk="x"), "chunk"),
        (lambda: prefix_cache().begin([[1, 2]], priority="x"), "priority"),
        (lambda: prefix_cache().fork(prefix_cache().begin([[1, 2]])[0], "x"), "fork"),
        (lambda: tree(slot_dtype="int32"), "slot_dtype"),
        (lambda: tree(page_size="4"), "page_size"),
        (lambda: tree().evict("x"), "evict"),
        (lambda: tree().insert([1], [1], priority="x"), "priority"),
        (lambda: tree().insert([1], [1], inserted_lengths=1.5), "inserted_lengths"),
        (lambda: queue().begin(max_requests="x"), "max_requests"),
        (lambda: queue().begin(token_budget=1.5), "token_budget"),
        (lambda: queue().plan(reserve="x"), "reserve"),
        (lambda: queue().add([1, 2], priority="x"), "priority"),
        (lambda: queue().add([1, 2], arrival="x"), "arrival"),
        (lambda: WaitingQueue("tree"), "RadixTree"),
    ],
)
def test_an_argument_is_named(call: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(name)):
        call()


MAKERS = {"kv_device": prefix_cache, "slot_device": tree, "device": tree}


@pytest.mark.parametrize("name", MAKERS)
def test_devices(name: str) -> None:
    for bad in ("tpu", "gpu", 1.5, "cpu:x", "meta"):
        with pytest.raises(ValueError, match=rf'^{name}="{bad}"'):
            MAKERS[name](**{name: bad})
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises((DeviceUnavailableError, ValueError), match=f'^{name}="mps"'):
        MAKERS[name](**{name: "mps"})


@pytest.mark.parametrize("name", ["kv_device", "slot_device"])
def test_a_device_without_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailableError, match=f'^{name}="cuda" cannot be used: torch sees no CUDA device'):
        MAKERS[name](**{name: "cuda"})


def test_int32_offsets(device: str) -> None:
    tree = RadixTree(64, device=device)
    values = torch.tensor([1, 2, 3, 4, 5], device=device if torch.cuda.is_available() else "cpu")
    q = Ragged(values, torch.tensor([0, 2, 5], dtype=torch.int32, device=values.device))
    assert q.offsets.dtype == torch.int64
    tree.insert(q, q)
    assert tree.match([[1, 2], [3, 4, 5]]).lengths.tolist() == [2, 3]
    with pytest.raises(ValueError, match="offsets must be int64 or int32"):
        Ragged(values, torch.tensor([0, 5], dtype=torch.int16, device=values.device))


def test_priority_none_is_zero(device: str) -> None:
    given, none = (RadixTree(64, device=device) for _ in range(2))
    for tree, priority in ((given, 0), (none, None)):
        tree.insert([1, 2], [3, 4], priority=priority)
        tree.insert([[1, 2], [5]], [[6, 7], [8]], priority=priority)
    assert given.digest() == none.digest()
    cache = prefix_cache()
    assert [request.priority for request in cache.begin([[1, 2], [3]], priority=None)] == [0, 0]
    waiting = cache.queue()
    waiting.add([1, 2], priority=None)
    waiting.add([[3]], priority=None)
    assert waiting.order("fcfs").tolist() == waiting.ids().tolist()


NAMES = [None, 1, "1", b"1", -1, 0, "", b"", 2**63 - 1, np.int64(7), np.str_("x"), np.bytes_(b"x")]


def test_integers_are_namespaces_of_their_own(device: str, tmp_path: Path) -> None:
    tree = RadixTree(128, device=device)
    keys = [[5, 6]] * len(NAMES)
    tree.insert(keys, [[2 * at, 2 * at + 1] for at in range(len(NAMES))], namespace=NAMES)
    assert tree.num_nodes == len(NAMES)
    tree.save(tmp_path / "tree")
    for one in (tree, RadixTree.load(tmp_path / "tree", device=device), tree.to("cpu")):
        assert one.digest() == tree.digest()
        assert one.slots(one.match(keys, NAMES, touch=False)).to_list() == [
            [2 * at, 2 * at + 1] for at in range(len(NAMES))
        ]
        assert one.slots(one.match([5, 6], 7, touch=False)).to_list() == [[18, 19]]
        one.check()
    assert repr(NAMES[1]) in str(tree.content().names)
    for bad, reason in (
        (True, "is a bool"),
        (1.0, "is a float"),
        (2**63, "is 9223372036854775808, which does not fit 64 bits"),
    ):
        with pytest.raises(ValueError, match=f"the namespace {reason}"):
            tree.match([5], namespace=bad)
        with pytest.raises(ValueError, match=f"the namespace of query 1 {reason}"):
            tree.match([[5], [5]], namespace=[1, bad])
    digests = []
    for name in (1, "1", b"1"):
        tree.reset()
        tree.insert([5], [6], namespace=name)
        digests.append(tree.digest())
    assert len(set(digests)) == 3


def test_integers_are_namespaces_of_caches_and_queues() -> None:
    cache = prefix_cache()
    names = [1, "1", b"1", None]
    cache.finish(cache.begin([[1, 2, 3]] * 4, names))
    assert cache.probe([[1, 2, 3]] * 4, names).cached_lengths.tolist() == [2] * 4
    assert cache.probe([[1, 2, 3]], 2).cached_lengths.tolist() == [0]
    waiting = cache.queue()
    waiting.add([1, 2, 3], 1)
    waiting.add([[1, 2, 3]] * 2, [b"1", 2])
    assert waiting.cached_lengths().tolist() == [2, 2, 0]
    begun, _ = waiting.begin()
    assert [request.namespace for request in begun] == [1, b"1", 2]
    shared = prefix_cache().begin([[1, 2, 3]] * 4, names, share=True)
    assert shared[0].namespace == 1


@pytest.mark.parametrize("locked", [False, True])
def test_what_a_full_tree_advises_helps(device: str, locked: bool) -> None:
    tree = RadixTree(4, device=device)
    tree.insert([1, 2, 3], [1, 2, 3])

    def advice(count: int) -> str:
        key = list(range(10, 10 + count))
        with pytest.raises(CapacityError) as raised:
            settled(tree, lambda: tree.insert(key, key))
        return str(raised.value)

    assert "no eviction makes such room" in advice(5)
    if locked:
        tree.lock(tree.match([1, 2], split=True))
        assert "an eviction frees only 1, the other tokens are locked" in advice(4)
    else:
        tree.evict(int(re.findall(r"evict\((\d+)\) first", advice(4))[0]))
        tree.insert([10, 11, 12, 13], [0, 1, 2, 3])


def test_a_cache_is_neither_pickled_nor_copied() -> None:
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a PrefixCache is neither pickled nor copied"):
            call(prefix_cache())


BYTES = """
import flatradix
from flatradix.inspect.draw import draw
names = ["a", b"a", 1, None]
tree = flatradix.RadixTree(64, device="cpu")
tree.insert([[1, 2]] * 4, [[i, i + 9] for i in range(4)], namespace=names)
tree.match([[1, 2]] * 4, namespace=names)
draw(tree.content(), 9, False)
tree.check(), tree.digest()
cache = flatradix.PrefixCache(64, max_requests=8, max_length=9)
queue = cache.queue()
queue.add([[1, 2, 3]] * 4, names)
for name in names:
    queue.add([1, 2, 3], name)
queue.order("lpm")
requests, _ = queue.begin()
cache.commit(requests)
cache.finish(requests)
cache.begin([[1, 2, 3]] * 4, names, share=True)
cache.check()
tree.evict(64)
"""


def test_python_that_forbids_to_compare_bytes() -> None:
    done = subprocess.run([sys.executable, "-bb", "-c", BYTES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
