"""Compiling the kernels of a tree on a GPU, in parallel: one core would need about a minute."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from flatradix.device.index import DeviceIndex
from flatradix.errors import CapacityError
from flatradix.host.warm_up import grow, use_cache, use_queue
from flatradix.inputs.devices import interpreted
from flatradix.inputs.ragged import Ragged
from flatradix.kernels import native
from flatradix.kernels.gpu.long import LEAST_TOKENS
from flatradix.layout import numbers
from flatradix.layout.handles import pack_handle
from flatradix.tree import RadixTree

_KINDS = (torch.int32, torch.int64)
_BEYOND_ONE_LAUNCH = 9  # one place has its own kernel, and up to 8 places take one launch


def warm_up_device(device: torch.device, page_size: int, bigram: bool) -> None:
    """Compile for single keys in host memory, and for batches of int32 and int64 tokens on the device.

    device: with its index. Operations run in as many threads as there are cores: compilers work without the GIL.
    Interpreted kernels run in one thread.
    """
    native.prepare()
    tokens = page_size + bigram
    in_python = interpreted()

    def run(operation: Callable[[RadixTree], object]) -> None:
        with nullcontext() if in_python else torch.cuda.device(device):  # a new thread's current device is cuda:0
            tree = RadixTree(64 * page_size, page_size, device=device, bigram=bigram)
            operation(tree)
            tree.raise_pending()

    operations = list(_operations(tokens))
    with ThreadPoolExecutor(1 if in_python else min(len(operations), os.cpu_count() or 1)) as threads:
        list(threads.map(run, operations))


def _operations(tokens: int) -> Iterator[Callable[[RadixTree], object]]:
    """Yield operations, each for its own empty tree, and most at the root: none waits for what another compiles.

    They cover most calls of PrefixCache: int64 keys with int32 slots, with and without a start, and with one argument
    at a time that differs from query to query.
    """
    one = np.arange(tokens)
    yield partial(_fill_and_empty, key=one)
    yield lambda tree: tree.insert(one, one, start=_root(tree, 1))
    for started in (False, True):
        yield partial(_insert_one, key=one, started=started)
        yield partial(_insert_there, key=one, started=started)
        yield partial(_insert_keys, key=one, started=started, names=[None, None])
        yield partial(_insert_keys, key=one, started=started, names=["a", "b"])
    yield from (partial(_insert_batch, kind=kind, tokens=tokens) for kind in _KINDS)
    for how in ({}, {"touch": False}, {"lock": True}, {"touch": False, "lock": True}, {"split": True}):
        yield partial(_match, how=how, key=one)
        yield from (partial(_match_batch, how=how, kind=kind, tokens=tokens) for kind in _KINDS)
    yield partial(_match, how={"touch": False, "lock": True, "namespace": [None, "a"]}, key=[one, one])
    long = np.zeros(LEAST_TOKENS, np.int64)  # matched by anchors
    for how in ({}, {"touch": False}, {"touch": False, "lock": True}, {"lock": True}, {"split": True}):
        yield partial(_match, how=how, key=long)
    for how in ({}, {"touch": False, "lock": True}):
        yield partial(_match_long_batch, how=how, count=len(long))
    yield partial(_insert_long, key=long)
    yield partial(_insert_compacting, key=one)
    yield partial(_insert_keys, key=one, names=None, started=True, options={"inserted_lengths": [0, 1]})
    yield partial(_insert_keys, key=one, names=None, started=True, options={"priority": [0, 1]})
    for count in (1, 2, _BEYOND_ONE_LAUNCH):
        yield partial(_lock, count=count)
        yield partial(_unlock, count=count)
    yield lambda tree: tree.evict(1)
    yield _evict_into
    yield partial(_drop, key=one)
    yield lambda tree: tree.slots(_root(tree, 1))
    yield lambda tree: tree.split(_root(tree, 1))
    yield _write_slots
    yield lambda tree: tree.reset()
    yield use_queue
    yield lambda tree: grow(RadixTree(None, tree.page_size, tree.device, bigram=tree.bigram))
    yield _use_cache


def _root(tree: RadixTree, count: int) -> SimpleNamespace:
    handle = pack_handle(0, tree.content(slots=False).number(numbers.GENERATION))
    lengths = torch.zeros(count, dtype=torch.int32, device=tree.device)
    return SimpleNamespace(handles=torch.full_like(lengths, handle, dtype=torch.int64), lengths=lengths)


def _batch(tree: RadixTree, kind: torch.dtype, tokens: int) -> Ragged:
    values = torch.zeros(2 * tokens, dtype=kind, device=tree.device)
    return Ragged(values, torch.arange(3, device=tree.device) * tokens)


def _fill_and_empty(tree: RadixTree, key: np.ndarray) -> None:
    tree.insert(key, key)
    tree.compact()
    tree.digest()
    tree.evict(1)


def _evict_into(tree: RadixTree) -> None:
    out = torch.zeros(1, dtype=tree.slot_dtype, device=tree.device)
    tree.evict(torch.zeros(1, dtype=torch.int64, device=tree.device), out=out)


def _drop(tree: RadixTree, key: np.ndarray) -> None:
    """Drop a part that is locked, which makes evictions order nodes in another way."""
    places = tree.insert(key, key)
    tree.lock(places)
    tree.drop(places)
    tree.evict(1)


def _slots(tree: RadixTree, key: np.ndarray) -> torch.Tensor:
    return torch.arange(len(key), dtype=torch.int32, device=tree.device)


def _insert_one(tree: RadixTree, key: np.ndarray, started: bool) -> None:
    tree.insert(key, _slots(tree, key), start=_root(tree, 1) if started else None)


def _insert_there(tree: RadixTree, key: np.ndarray, started: bool) -> None:
    tokens = torch.from_numpy(key).to(tree.device)
    tree.insert(tokens, _slots(tree, key), start=_root(tree, 1) if started else None)


def _insert_keys(
    tree: RadixTree, key: np.ndarray, started: bool, names: Any, options: dict[str, Any] | None = None
) -> None:
    slots = _slots(tree, key)
    tree.insert([key, key], [slots, slots], names, start=_root(tree, 2) if started else None, **options or {})


def _insert_batch(tree: RadixTree, kind: torch.dtype, tokens: int) -> None:
    batch = _batch(tree, kind, tokens)
    tree.insert(batch, batch)


def _match(tree: RadixTree, how: dict[str, Any], key: Any) -> None:
    tree.match(key, **how)


def _match_batch(tree: RadixTree, how: dict[str, Any], kind: torch.dtype, tokens: int) -> None:
    tree.match(_batch(tree, kind, tokens), **how)


def _match_long_batch(tree: RadixTree, how: dict[str, Any], count: int) -> None:
    values = torch.zeros(2 * count, dtype=torch.int32, device=tree.device)
    tree.match(Ragged(values, torch.arange(3, device=tree.device) * count), **how)


def _insert_compacting(tree: RadixTree, key: np.ndarray) -> None:
    """Insert one key as if a compaction might be needed. It then takes the launches of a batch."""
    index = tree.index
    assert isinstance(index, DeviceIndex)
    index.rehearse(lambda: tree.insert(key, _slots(tree, key)))
    index.rehearse(lambda: tree.insert(key, _slots(tree, key), start=_root(tree, 1)))


def _insert_long(tree: RadixTree, key: np.ndarray) -> None:
    """Insert a long key, which does not fit: the kernels run and refuse it."""
    tokens = torch.from_numpy(key).to(tree.device)
    with suppress(CapacityError):
        tree.insert(tokens, torch.zeros(len(tokens), dtype=torch.int32, device=tree.device))
        tree.raise_pending()


def _lock(tree: RadixTree, count: int) -> None:
    tree.lock(_root(tree, count))


def _unlock(tree: RadixTree, count: int) -> None:
    tree.unlock(_root(tree, count))


def _use_cache(tree: RadixTree) -> None:
    if not tree.bigram:
        use_cache("cuda" if interpreted() else tree.device, tree.device, tree.page_size)


def _write_slots(tree: RadixTree) -> None:
    table = torch.zeros((1, 1), dtype=torch.int32, device=tree.device)
    tree.write_slots(_root(tree, 1), table, torch.arange(1, device=tree.device))
