"""KV events of the cache, with SGLang's hashes. Routers such as Dynamo's and llm-d's follow these events.

An eviction tells which slots it freed, not which tokens. So the hash of each block is kept by the page that holds the
block. If slots are on a GPU, their numbers are copied to the host after the work under way, and nothing waits for the
copy. The events of these slots stay queued until the copy is done, so they may miss one `take` and come with the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, StorageMedium
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey

from flatradix.integrations.sglang.hashes import page_hashes
from flatradix.results import Places

_MOST_ENDS = 1 << 16


class _Block:
    """The attributes of a tree node that SGLang's recorder reads."""

    __slots__ = ("event_hash_value", "hash_value", "key", "parent")

    def __init__(self, key: RadixKey, parent: _Block | None, chain: str | None = None) -> None:
        """chain: the hash of the last page, for a block that serves only as a parent."""
        self.key = key
        self.parent = parent
        # The recorder reads one of the two, with a namespace the second.
        self.hash_value = None if chain is None else [chain]
        self.event_hash_value = None if chain is None else [chain]


class _Step(NamedTuple):
    """A change to report. pages: int64 [K], valid once `is_there` returns True. events: None for removed pages."""

    pages: torch.Tensor | None
    is_there: Callable[[], bool]
    events: list[Any] | None


def _at_once() -> bool:
    return True


class KvEvents(KVCacheEventRecorder):
    """The event recorder of one cache. The cache calls `stored` and `removed` only if the recorder is enabled."""

    def __init__(self, params: Any) -> None:
        """params: SGLang's CacheInitParams."""
        super().__init__(
            enabled=params.enable_kv_cache_events,
            page_size=params.page_size,
            dynamo_format=params.dynamo_kv_event_format,
            lora_names=params.kv_event_lora_names,
        )
        self._is_bigram = params.is_eagle
        self._steps: deque[_Step] = deque()
        self._made: list[Any] | None = None
        self._ends: dict[int, tuple[int, str]] = {}  # handle of a node: (its end, the hash of its last page)
        pages = params.token_to_kv_pool_allocator.size // params.page_size + 2 if self.enabled else 0
        self._hash_of_page = np.zeros(pages, np.int64)

    # Called by the cache

    def stored(self, req: Any, start: Places | None, end: Places, first: int, row: torch.Tensor) -> None:
        """Record that the request's tokens from `first` to the place `end` were cached with the slots in its table row.

        start: the place from which the insert continued. Its hash may be known.
        """
        size, last = self.page_size, end.length
        known, chain = self._known(start)
        if first > known:
            chain = page_hashes(self._tokens(req, known, first), size, chain)[-1]
            if start is not None and start.length == first:
                self._ends[start.handle] = (first, chain)
        if last > first:
            block = self._block(req, first, last, chain)
            chains = page_hashes(block.key, size, chain)
            block.hash_value = block.event_hash_value = chains
            made: list[Any] = []
            self._made = made
            try:
                self.record_store(block, session_id=getattr(req, "session_id", None))
            finally:
                self._made = None
            self._queue_step(row[first:last:size] // size, made)
            chain = chains[-1]
        if len(self._ends) >= _MOST_ENDS:
            self._ends.clear()
        if chain is not None:
            self._ends[end.handle] = (last, chain)

    def removed(self, slots: torch.Tensor) -> None:
        """Record evicted slots: int64 [K], whole pages, in the order of eviction."""
        self._queue_step(slots[:: self.page_size] // self.page_size, None)

    def cleared(self) -> None:
        self._ends.clear()
        if self.enabled:
            self._steps.append(_Step(None, _at_once, [AllBlocksCleared()]))

    # Called by the scheduler

    def take(self) -> list[Any]:
        """Return all events so far, in order, up to the first with slots that the host does not know yet."""
        while self._steps and self._steps[0].is_there():
            self._publish(self._steps.popleft())
        return super().take()

    def enqueue(self, event: Any) -> None:
        if self._made is None:
            super().enqueue(event)
        else:
            self._made.append(event)

    def _queue_step(self, pages: torch.Tensor, events: list[Any] | None) -> None:
        if pages.is_cpu:
            self._steps.append(_Step(pages.to(torch.int64), _at_once, events))
            return
        here = pages.to(torch.int64).to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._steps.append(_Step(here, copied.query, events))

    def _publish(self, step: _Step) -> None:
        if step.pages is None:
            super().enqueue(AllBlocksCleared())
        elif step.events is None:
            pages = step.pages.numpy()
            hashes = self._hash_of_page[pages]
            self._hash_of_page[pages] = 0
            stored = hashes[hashes != 0].tolist()  # tokens that came by FlatRadixCache.insert were never reported
            if stored:
                super().enqueue(BlockRemoved(block_hashes=stored, medium=StorageMedium.GPU))
        else:
            self._hash_of_page[step.pages.numpy()] = [event.block_hashes[0] for event in step.events]
            for event in step.events:
                super().enqueue(event)

    # Hashes

    def _known(self, start: Places | None) -> tuple[int, str | None]:
        """Return up to which length the hash chain of a request is known, and the hash there."""
        if start is None:
            return 0, None
        length, chain = self._ends.get(start.handle, (0, None))
        return (length, chain) if length == start.length else (0, None)

    def _block(self, req: Any, first: int, last: int, chain: str | None) -> _Block:
        """Return the pages of a request's tokens from `first` to `last` (units), after a page with the hash `chain`."""
        key = self._tokens(req, first, last)
        root = _Block(self._key(req, key.token_ids[:0], False), None)
        if chain is None:
            return _Block(key, root)
        return _Block(key, _Block(self._key(req, key.token_ids[:1], False), root, chain))

    def _tokens(self, req: Any, first: int, last: int) -> RadixKey:
        return self._key(req, req.full_untruncated_fill_ids[first : last + self._is_bigram], self._is_bigram)

    def _key(self, req: Any, tokens: Any, is_bigram: bool) -> RadixKey:
        return RadixKey(tokens, req.extra_key, is_bigram=is_bigram, cache_salt=req.cache_salt)
