"""The tree as SGLang's cache uses it: a key at a time, with splits where SGLang's trees split.

With the index on the CPU nothing here waits for a GPU. With the index on a GPU its kernels go on a stream of their own:
SGLang's current stream may stand behind a whole forward pass, and a look-up on it would too.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from flatradix import backend, meta
from flatradix.kernels.scalar import ROW_MASK
from flatradix.results import EvictResult, InsertResult, MatchResult, Places
from flatradix.tree import RadixTree


class HostIndex:
    """An index on the CPU. Places are what the tree returns; a lock or a split keeps them good."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.lock = tree.lock
        self.unlock = tree.unlock
        self._ends: Any = tree._state.end.numpy().data if tree._state.end.is_cpu else None  # of each row

    def match(self, tokens: Any, limit: int | None, namespace: str | bytes | None) -> MatchResult:
        """`RadixTree.match` of the first `limit` tokens, and an edge on which it ends is split.

        What is evicted later is then what SGLang's trees would evict. Calls the kernel itself: a look-up of a waiting
        request costs half of what it does through the tree's own method, which takes all kinds of sequences.
        """
        if type(tokens) is not array or tokens.typecode != "q":
            place = self.tree.match(before_foreign(up_to(tokens, limit)), namespace)
        else:
            tree = self.tree
            address, count = tokens.buffer_info()
            if limit is not None and limit < count:
                count = limit
            code = 0 if namespace is None else tree._namespaces.find(namespace)
            length, handle = tree._kernels.match_one(tree._table, address, True, count, code, True, False)
            if length < 0:
                return self.match(before_foreign(up_to(tokens, limit)), None, namespace)
            place = MatchResult.single(length, handle)
        if self._ends[place.handle & ROW_MASK] != place.length:
            self.tree.lock(place)
            self.tree.unlock(place)
        return place

    def insert(self, tokens: Any, slots: torch.Tensor, **options: Any) -> InsertResult:
        """`RadixTree.insert`, of the tokens before the first that is none of a vocabulary."""
        try:
            return self.tree.insert(tokens, slots, **options)
        except ValueError:
            known = before_foreign(tokens)
            if len(known) == len(tokens):
                raise
            return self.tree.insert(known, slots[: len(known)], **options)

    def slots(self, place: Places) -> torch.Tensor:
        """int64 [length of the place] on the slot device."""
        slots: torch.Tensor = self.tree._path_slots(place)  # without the offsets, which are an upload of their own
        return slots

    def evict(self, num_tokens: int) -> EvictResult:
        return self.tree.evict(num_tokens)

    def above(self, place: Places, length: int) -> Places:
        """The place on the same path, `length` units from the root."""
        return MatchResult.single(length, place.handle)

    @contextmanager
    def aside(self, after_current: bool = False) -> Iterator[None]:
        """Around whatever else looks at the tree or changes it: where its own work is under way.

        after_current: behind what the current stream does.
        """
        yield


class DeviceIndex(HostIndex):
    """An index on a GPU, on its own stream."""

    def __init__(self, tree: RadixTree) -> None:
        super().__init__(tree)
        real = tree.device.type == "cuda"
        self._stream = torch.cuda.Stream(tree.device) if real else None  # none where kernels are interpreted
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(tree.device))  # that makes the empty tree
        self.lock = self._lock
        self.unlock = self._unlock

    @contextmanager
    def aside(self, after_current: bool = False) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        if after_current:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def _handed_over(self, values: torch.Tensor) -> torch.Tensor:
        """For use on the current stream; those on the CPU were waited for."""
        if self._stream is not None and values.is_cuda:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            values.record_stream(current)
        return values

    def _lock(self, places: Any) -> None:
        with self.aside():
            self.tree.lock(places)

    def _unlock(self, places: Any) -> None:
        with self.aside():
            self.tree.unlock(places)

    def match(self, tokens: Any, limit: int | None, namespace: str | bytes | None) -> MatchResult:
        with self.aside():
            place = self.tree.match(before_foreign(up_to(tokens, limit)), namespace, lock=True)
            self.tree.unlock(place)
            return place

    def insert(self, tokens: Any, slots: torch.Tensor, **options: Any) -> InsertResult:
        known = before_foreign(tokens)  # now: the device would tell of the others too late
        with self.aside(after_current=True):
            result = super().insert(known, slots[: len(known)], **options)
            _ = result.length  # done: the row that the slots were read from may change
            return result

    def slots(self, place: Places) -> torch.Tensor:
        with self.aside():
            values = self.tree.slots(place).values
        return self._handed_over(values)

    def evict(self, num_tokens: int) -> EvictResult:
        with self.aside():
            result = super().evict(num_tokens)
        self._handed_over(result.slots)
        return result

    def above(self, place: Places, length: int) -> Places:
        with self.aside():
            return MatchResult(torch.tensor([length], dtype=torch.int32, device=place.handles.device), place.handles)


def up_to(tokens: Any, limit: int | None) -> Any:
    """The first `limit` tokens, not copied, but for those of a list."""
    if isinstance(tokens, list | tuple):
        return array("q", tokens[:limit])
    if limit is None or limit >= len(tokens):
        return tokens
    return memoryview(tokens)[:limit] if isinstance(tokens, array) else tokens[:limit]


def before_foreign(tokens: Any) -> Any:
    """The tokens before the first that is outside [0, 2**31 - 1], not copied.

    SGLang puts numbers of 62 bits in the place of images, and takes whatever ids a client sends. None of them is cached
    here, nor what comes behind it.
    """
    values = np.asarray(tokens)
    foreign = np.flatnonzero((values < 0) | (values > meta.MAX_TOKEN))
    return up_to(tokens, int(foreign[0])) if len(foreign) else tokens


def make_index(params: Any, device: str | None = None) -> HostIndex:
    """The index for SGLang's CacheInitParams, empty.

    device: where it lives, "cpu" or "cuda"; None asks the variable FLATRADIX_DEVICE, and takes "cpu" where that says
    nothing. The slots lie on the allocator's device either way. Raises ValueError, DeviceUnavailableError.
    """
    allocator = params.token_to_kv_pool_allocator
    pool = torch.device(allocator.device)
    wanted = _index_device(device)
    on_gpu = wanted.type == "cuda"
    if on_gpu and pool.type == "cuda":
        wanted = pool  # one scheduler has one GPU
    beside = "cpu" if backend.interpreted() else wanted.type
    tree = RadixTree(
        -(-allocator.size // params.page_size) * params.page_size,
        params.page_size,
        device=wanted,
        policy=params.eviction_policy.lower(),
        slot_device=None if pool.type == beside else pool,
        bigram=params.is_eagle,
    )
    tree.check_slots = False  # they come from SGLang's own table, and looking at them would wait for the GPU
    threshold = (params.eviction_policy_config or {}).get("protected_threshold")
    if threshold is not None:
        tree._state.meta[meta.THRESHOLD] = int(threshold)
    return DeviceIndex(tree) if on_gpu else HostIndex(tree)


def _index_device(device: str | None) -> torch.device:
    if device is not None:
        return backend.resolve(device)
    return torch.device("cpu") if backend.is_free_to_choose() else backend.resolve("auto")
