"""The rival: a simulated server with SGLang's own scheduler and cache. Imported only when it is asked for.

Requests, slot table, allocator, cache, `SchedulePolicy` and `PrefillAdder` are SGLang's; see `peer`. This module calls
them in the order in which SGLang's scheduler does, without overlap: the policy and the adder once a step, then the
allocation, a checkpoint after the step, and a release at the end.

Instead of one decode step a token, a request takes the slots of its whole output when it begins to decode. The adder
counts the outputs of all running requests as used, then, and reserves the whole output of a request that it adds.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from flatradix.replay.traces import VOCABULARY
from flatradix.simulate import peer
from flatradix.simulate.load import Job
from flatradix.simulate.serve import NEVER
from flatradix.simulate.settings import Policy, Settings

_MAX_PREFILL_TOKENS = 16384  # SGLang's default; it bounds a step together with the chunk
_NEW_TOKEN_RATIO = 1.0  # what is left of a running request's output; nothing is left, as its slots are taken


def cache_name() -> str:
    """Return the name of the cache that the servers will have. Raises PeerMissingError."""
    modules = peer.load()
    cache, core = _make_cache(modules, Settings(rate=1.0), None, None)
    return f"SGLang {peer.VERSION}, {type(cache).__name__}" + (f" with its {core}" if core else "")


def _make_cache(modules: Any, settings: Settings, pool: Any, allocator: Any) -> tuple[Any, str]:
    """Return SGLang's default cache with its Rust core, or its Python cache where the core does not load."""
    params = modules.params.CacheInitParams(
        disable=False, req_to_token_pool=pool, token_to_kv_pool_allocator=allocator, page_size=settings.page_size,
        tree_components=(modules.component_type.ComponentType.FULL,), tree_core_backend="rust",
    )  # fmt: skip
    try:
        cache = modules.unified.UnifiedRadixCache(params)
        core = type(cache.tree_core).__name__
    except (ImportError, OSError, RuntimeError):
        core = ""
    if core == "RustUnifiedTreeCore":
        return cache, core
    return modules.radix.RadixCache(params), ""


def _make_allocator(modules: Any, settings: Settings) -> Any:
    options = {"dtype": torch.float16, "device": "cpu", "kvcache": None, "need_sort": True}
    if settings.page_size == 1:
        return modules.token.TokenToKVPoolAllocator(settings.capacity, **options)
    capacity = settings.capacity // settings.page_size * settings.page_size
    return modules.paged.PagedTokenToKVPoolAllocator(capacity, settings.page_size, **options)


class SGLangServer:
    """A server of the simulation; see `serve.Server`."""

    def __init__(self, jobs: Sequence[Job], settings: Settings, policy: Policy) -> None:
        self._modules = peer.load()
        self._jobs, self._settings = jobs, settings
        longest = max((len(job.prompt) + job.output for job in jobs), default=1)
        self._pool = self._modules.pools.ReqToTokenPool(
            size=settings.max_running + 1,
            max_context_len=longest + settings.page_size,
            device="cpu",
            enable_memory_saver=False,
        )
        self._allocator = _make_allocator(self._modules, settings)
        self.cache, _ = _make_cache(self._modules, settings, self._pool, self._allocator)
        self.policy = self._modules.policy.SchedulePolicy(policy.order, self.cache, False, False, False)
        self._waiting: list[Any] = []
        self._chunked: Any = None
        self._batch: list[Any] = []
        self._hits: dict[int, int] = {}
        self._decoding: list[tuple[float, int, Any]] = []
        self._full = False  # the adder found no slots; SGLang asks it again when a request has ended
        # What the adder and the policy read of the running requests: none has tokens left to reserve.
        self._idle = SimpleNamespace(reqs=[], batch_size=lambda: 0)

    def waiting(self) -> int:
        return len(self._waiting)

    def running(self) -> int:
        cut = self._chunked is not None and self._chunked not in self._batch
        return len(self._decoding) + len(self._batch) + cut

    def add(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            job = self._jobs[number]
            parameters = self._modules.sampling.SamplingParams(max_new_tokens=job.output)
            tokens = array("q", job.prompt.astype(np.int64).tobytes())
            self._waiting.append(self._modules.requests.Req(str(number), "", tokens, parameters))

    def next_end(self) -> float:
        return self._decoding[0][0] if self._decoding else NEVER

    def release(self, now: float) -> None:
        while self.next_end() <= now:
            _, _, req = heapq.heappop(self._decoding)
            self._full = False
            req.finished_reason = self._modules.requests.FINISH_LENGTH(length=len(req.output_ids))
            req.finished_len = len(req.output_ids)
            self._modules.common.release_kv_cache(req, self.cache, checkpoint=True)

    def begin(self, now: float) -> int | None:
        room = self._settings.max_running - self.running()
        if self._chunked is None and (self._full or not self._waiting or room <= 0):
            return None
        self.policy.calc_priority(self._waiting, self._idle)
        adder = self._make_adder()
        if self._chunked is not None:
            self._chunked.init_next_round_input()
            self._chunked = adder.add_chunked_req(self._chunked)
            room += 1
        self._add_waiting(adder, room)
        self._batch = adder.can_run_list
        if not self._batch:
            return None
        if adder.new_chunked_req is not None:
            self._chunked = adder.new_chunked_req
        for req in self._batch:
            self._allocate(req, req.prefix_len, req.extend_end)
        return sum(req.extend_end - req.prefix_len for req in self._batch)

    def _make_adder(self) -> Any:
        s = self._settings
        return self._modules.policy.PrefillAdder(
            s.page_size, self.cache, self._allocator, self._idle, _NEW_TOKEN_RATIO, max(_MAX_PREFILL_TOKENS, s.chunk),
            s.chunk, waiting_queue_len=len(self._waiting),
        )  # fmt: skip

    def _add_waiting(self, adder: Any, room: int) -> None:
        """Offer the waiting requests to the adder, as SGLang's scheduler does, until it refuses one."""
        results = self._modules.policy.AddReqResult
        old = len(adder.can_run_list)
        for req in self._waiting:
            if len(adder.can_run_list) >= room or adder.budget_state() == results.OTHER:
                break
            req.init_next_round_input(self.cache)
            hit = req.prefix_len
            result = adder.add_one_req(req, has_chunked_req=self._chunked is not None, truncation_align_size=None)
            if adder.can_run_list and adder.can_run_list[-1] is req:
                self._hits[int(req.rid)] = hit
            if result != results.CONTINUE:
                self._full = result == results.NO_TOKEN and self.running() + len(adder.can_run_list) > 0
                break
        gone = set(map(id, adder.can_run_list[old:]))
        if gone:
            self._waiting = [req for req in self._waiting if id(req) not in gone]

    def _allocate(self, req: Any, begin: int, end: int) -> None:
        """Take whole pages for the tokens from `begin` to `end` of a request; SGLang evicts where it must."""
        if not req.kv.holds_kv:
            prefix = self.cache.prefix_device_indices(req) if begin else None
            self._modules.allocation.alloc_req_slots(self._pool, [req], self.cache)
            if prefix is not None:
                self._pool.write((req.kv.req_pool_idx, slice(0, begin)), prefix)
        page = self._settings.page_size
        begin, reach = -(-begin // page) * page, -(-end // page) * page
        if reach > begin:
            slots = self._modules.allocation.alloc_token_slots(self.cache, reach - begin)
            self._pool.write((req.kv.req_pool_idx, slice(begin, reach)), slots)
        req.kv.kv_allocated_len = req.kv.kv_committed_len = end

    def end(self, now: float) -> list[tuple[int, int]]:
        ended = []
        for req in self._batch:
            self._modules.common.checkpoint_kv_cache(req, self.cache)
            if req is not self._chunked:
                number = int(req.rid)
                ended.append((number, self._hits.pop(number)))
                self._decode(req, number, now)
        self._batch = []
        return ended

    def _decode(self, req: Any, number: int, now: float) -> None:
        output = self._jobs[number].output
        if output:
            length = len(req.origin_input_ids)
            req.output_ids.extend(array("q", [VOCABULARY + number]) * output)
            self._allocate(req, length, length + output)
        heapq.heappush(self._decoding, (now + output * self._settings.tpot, number, req))

    def reject(self) -> int:
        return int(self._waiting.pop(0).rid)

    def drain(self) -> None:
        free = self._allocator.available_size() + self.cache.evictable_size()
        if self.cache.protected_size() or free != self._allocator.size:
            raise RuntimeError(f"slots were lost or doubled: {free} of {self._allocator.size} are free or can be")
