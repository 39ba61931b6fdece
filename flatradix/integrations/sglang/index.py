"""The tree as SGLang's cache uses it: one key at a time, with splits where SGLang's trees split.

With the index on the CPU, nothing here waits for a GPU. With the index on a GPU, its kernels run on their own stream:
on SGLang's current stream, a look-up might wait for a whole forward pass.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from flatradix.errors import QueryError
from flatradix.inputs import devices
from flatradix.inputs.options import EVICT_BY
from flatradix.inputs.policy import Policy, slru
from flatradix.layout.numbers import MAX_TOKEN
from flatradix.results import EvictResult, InsertResult, MatchResult, Places, one_match
from flatradix.tree import RadixTree

_FOREIGN = "match: query 0: the token at position"  # how the error for a foreign token begins
EVICT_BY_VARIABLE = "FLATRADIX_EVICT_BY"


class SchedulerTree:
    """A tree with its index on the CPU. Places are results of the tree. A lock or a split keeps them valid."""

    def __init__(self, tree: RadixTree) -> None:
        self.tree = tree
        self.lock = tree.lock
        self.unlock = tree.unlock
        self.slots = tree.path_slots
        self.evict: Callable[[int], EvictResult] = tree.evict
        self._match_array = tree.match_array

    def match(self, tokens: Any, limit: int | None, namespace: str | bytes | None) -> MatchResult:
        """Call `RadixTree.match` on the first `limit` tokens, and split the edge if the match ends inside it.

        A later eviction then frees the tokens that SGLang's trees would free.
        """
        if type(tokens) is array and tokens.typecode == "q":
            try:
                return self._match_array(tokens, limit, namespace, True)
            except QueryError:
                pass  # a foreign token
        return self.tree.match(before_foreign(up_to(tokens, limit)), namespace, split=True)

    def insert(self, tokens: Any, slots: torch.Tensor, **options: Any) -> InsertResult:
        """Call `RadixTree.insert` on the tokens before the first foreign token."""
        try:
            return self.tree.insert(tokens, slots, **options)
        except QueryError:
            known = before_foreign(tokens)
            if len(known) == len(tokens):
                raise
            return self.tree.insert(known, slots[: len(known)], **options)

    def last_eviction(self) -> EvictResult:
        """Return what the last eviction returned, for a caller that was interrupted before it had the result."""
        result = self.tree.last_result
        assert isinstance(result, EvictResult)
        return result

    def above(self, place: Places, length: int) -> Places:
        """Return the place on the same path, `length` units from the root."""
        return one_match(length, place.handle)

    def on_own_stream(self, after_current: bool = False) -> AbstractContextManager[None]:
        """Enter the tree's own stream, if there is one, for any other code that reads or changes the tree.

        after_current: let this stream wait for the current stream first.
        """
        return nullcontext()


_C: Any = torch._C


class OwnStream:
    """A CUDA stream. `with` makes it torch's current stream, without the objects that torch.cuda.stream makes.

    Where the tree's device is not torch's current one, torch.cuda.stream does it.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._device = int(self.stream.device.index)
        stream = self.stream
        self._ids = {"stream_id": stream.stream_id, "device_index": self._device, "device_type": stream.device_type}
        self._before: list[Any] = []  # how to go back, for each `with` under way

    def __enter__(self) -> None:
        if _C._cuda_getDevice() == self._device:
            self._before.append(_C._cuda_getCurrentStream(self._device))
            _C._cuda_setStream(**self._ids)
        else:
            self._before.append(torch.cuda.stream(self.stream))
            self._before[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        before = self._before.pop()
        if isinstance(before, tuple):
            _C._cuda_setStream(stream_id=before[0], device_index=before[1], device_type=before[2])
        else:
            before.__exit__(*error)


class StreamedTree(SchedulerTree):
    """A tree with its index on a GPU, on its own stream."""

    def __init__(self, tree: RadixTree) -> None:
        super().__init__(tree)
        self._stream = OwnStream(tree.device) if tree.device.type == "cuda" else None  # None if kernels are interpreted
        self._with_stream: Any = nullcontext() if self._stream is None else self._stream
        if self._stream is not None:
            self._stream.stream.wait_stream(torch.cuda.current_stream(tree.device))  # it makes the empty tree
        self.lock = self._lock
        self.unlock = self._unlock
        self.slots = self._slots
        self.evict = self._evict

    def on_own_stream(self, after_current: bool = False) -> AbstractContextManager[None]:
        if after_current and self._stream is not None:
            stream = self._stream.stream
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        return self._with_stream

    def _handed_over(self, values: torch.Tensor) -> torch.Tensor:
        """Make values safe to use on the current stream. Values on the CPU are complete already."""
        if self._stream is not None and values.is_cuda:
            current = torch.cuda.current_stream(values.device)
            current.wait_stream(self._stream.stream)
            values.record_stream(current)
        return values

    def _lock(self, places: Any) -> None:
        with self._with_stream:
            self.tree.lock(places)

    def _unlock(self, places: Any) -> None:
        with self._with_stream:
            self.tree.unlock(places)

    def match(self, tokens: Any, limit: int | None, namespace: str | bytes | None) -> MatchResult:
        with self._with_stream:
            if type(tokens) is array and tokens.typecode == "q":
                result = self._match_array(tokens, limit, namespace, True)
                try:
                    _ = result.length  # waits: the scheduler needs the length next
                    return result
                except QueryError as error:
                    known = up_to(tokens, limit)
                    foreign = len(before_foreign(known)) < len(known)
                    if not foreign or not str(error).startswith(_FOREIGN):
                        raise  # an earlier call was refused, and its error was not raised yet
            return self.tree.match(before_foreign(up_to(tokens, limit)), namespace, split=True)

    def insert(self, tokens: Any, slots: torch.Tensor, **options: Any) -> InsertResult:
        known = before_foreign(tokens)  # on the host: the device would report foreign tokens too late
        with self.on_own_stream(after_current=True):
            result = self.tree.insert(known, slots[: len(known)], **options)
            _ = result.length  # waits for the insert: the row from which the slots are read may change afterwards
            return result

    def _slots(self, place: Any) -> torch.Tensor:
        with self.on_own_stream():
            values = self.tree.path_slots(place)
        return self._handed_over(values)

    def _evict(self, num_tokens: int) -> EvictResult:
        with self.on_own_stream():
            result = self.tree.evict(num_tokens)
        self._handed_over(result.slots)
        return result

    def last_eviction(self) -> EvictResult:
        result = super().last_eviction()
        self._handed_over(result.slots)
        return result

    def above(self, place: Places, length: int) -> Places:
        with self.on_own_stream():
            return MatchResult(torch.tensor([length], dtype=torch.int32, device=place.handles.device), place.handles)


def up_to(tokens: Any, limit: int | None) -> Any:
    """Return the first `limit` tokens. Only a list or tuple is copied."""
    if isinstance(tokens, list | tuple):
        return array("q", tokens[:limit])
    if limit is None or limit >= len(tokens):
        return tokens
    return memoryview(tokens)[:limit] if isinstance(tokens, array) else tokens[:limit]


def before_foreign(tokens: Any) -> Any:
    """Return the tokens before the first foreign token, one outside [0, 2**31 - 1]. Only a list or tuple is copied.

    SGLang replaces images by numbers of 62 bits, and accepts any ids that a client sends. Foreign tokens and all tokens
    after them are not cached here.
    """
    values = np.asarray(tokens)
    foreign = np.flatnonzero((values < 0) | (values > MAX_TOKEN))
    return up_to(tokens, int(foreign[0])) if len(foreign) else tokens


def make_tree(params: Any, device: str | None = None) -> SchedulerTree:
    """Return an empty tree for SGLang's CacheInitParams.

    device: where the index lives, "cpu" or "cuda". None takes the variable FLATRADIX_DEVICE, or "cpu" if it is not set.
    The slots lie on the allocator's device in both cases. The variable FLATRADIX_EVICT_BY says whether evictions free
    whole nodes or pages. Raises ValueError, DeviceUnavailableError.
    """
    allocator = params.token_to_kv_pool_allocator
    pool = torch.device(allocator.device)
    wanted = _index_device(device)
    on_gpu = wanted.type == "cuda"
    if on_gpu and pool.type == "cuda":
        wanted = pool  # one scheduler has one GPU
    beside = "cpu" if devices.interpreted() else wanted.type
    tree = RadixTree(
        -(-allocator.size // params.page_size) * params.page_size,
        params.page_size,
        wanted,
        _policy(params),
        None if pool.type == beside else pool,
        bigram=params.is_eagle,
        slot_dtype=torch.int64,  # as SGLang's allocator takes them
        check_slots=False,  # they come from SGLang's own table, and a check would wait for the GPU
        evict_by=_evict_by(),
    )
    return StreamedTree(tree) if on_gpu else SchedulerTree(tree)


def _policy(params: Any) -> Policy:
    name: str = params.eviction_policy.lower()
    threshold = (params.eviction_policy_config or {}).get("protected_threshold")
    return name if threshold is None or name != "slru" else slru(int(threshold))


def _evict_by() -> str:
    """Return FLATRADIX_EVICT_BY: by default "node", as SGLang evicts. Raises ValueError."""
    asked = os.environ.get(EVICT_BY_VARIABLE, "").strip() or "node"
    if asked not in EVICT_BY:
        raise ValueError(f"{EVICT_BY_VARIABLE}={asked}: set it to one of {', '.join(EVICT_BY)}, or leave it out")
    return asked


def _index_device(device: str | None) -> torch.device:
    if device is not None:
        return devices.preferred(device)
    return torch.device("cpu") if devices.asked_for() == "auto" else devices.preferred("auto")
