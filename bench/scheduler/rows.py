"""Rows: the time that each call of a scheduler takes in the SGLang backend and in SGLang's default cache.

The calls are those of the scheduler: `match_prefix` with a capped key, `lock`, `checkpoint`, `unlock`, `evict`.
Requests, keys and the slot table are SGLang's. Both caches free slots into an allocator that does nothing.
"""

from __future__ import annotations

import statistics
import time
from array import array
from functools import partial
from typing import Any

import torch

from bench.support import sglang_modules
from bench.support.harness import Measured, Row, Setup, Side, compare
from bench.support.sglang_trees import Recorder
from bench.support.workloads import distinct_keys, random_key

CHUNK = 4096
CONTEXTS = (1024, 8192, 32768, 131072)
PAGE = 64
ROW = 1


class Allocator(Recorder):
    def __init__(self, size: int) -> None:
        super().__init__(keep=False)
        self.size = size


class Desk:
    """A cache, and the row of one request in SGLang's slot table."""

    def __init__(self, make_cache: Any, tokens: int, page_size: int = PAGE) -> None:
        self.sglang = sglang_modules.load()
        width = min(tokens, CONTEXTS[-1] + CHUNK)
        self.pool = self.sglang.pools.ReqToTokenPool(
            size=1, max_context_len=width, device="cpu", enable_memory_saver=False
        )
        self.pool.req_to_token[ROW] = torch.arange(PAGE, PAGE + width, dtype=torch.int32)
        params = self.sglang.params.CacheInitParams(
            disable=False,
            req_to_token_pool=self.pool,
            token_to_kv_pool_allocator=Allocator(tokens),
            page_size=page_size,
        )
        self.cache = make_cache(params)

    def request(self, key: array[int]) -> Any:
        req = self.sglang.requests.Req("r", "", key, self.sglang.sampling.SamplingParams(max_new_tokens=1))
        req.full_untruncated_fill_ids = key
        req.kv.req_pool_idx = ROW
        return req

    def key(self, key: array[int], limit: int | None = None) -> Any:
        """Return match parameters as the scheduler makes them: all tokens, and a limit of how many count."""
        params = self.sglang.base.MatchPrefixParams(key=self.sglang.radix.RadixKey(key, limit=limit))
        return params

    def admit(self, req: Any) -> None:
        found = self.cache.match_prefix(self.key(req.full_untruncated_fill_ids, len(req.origin_input_ids) - 1))
        req.last_node, req.prefix_len = found.last_device_node, found.device_prefix_len
        req.kv.cache_protected_len = req.prefix_len
        req.lock = self.cache.lock(req.last_node)

    def chunks(self, req: Any, first: int, last: int) -> None:
        for end in [*range(first + CHUNK, last, CHUNK), last]:
            self.cache.checkpoint(req, up_to=end)

    def leave(self, req: Any) -> None:
        self.cache.unlock(req.lock)
        req.lock = None

    def forget(self, req: Any, tokens: int) -> None:
        self.cache.evict(self.sglang.base.EvictParams(num_tokens=tokens))
        req.kv.cache_protected_len = req.kv.cache_inserted_len = 0


def flat(params: Any) -> Any:
    from flatradix.integrations.sglang.cache import FlatRadixCache  # imports SGLang

    return FlatRadixCache(params, device="cpu")


def default(params: Any) -> Any:
    sglang = sglang_modules.load()
    params.tree_components = (sglang.component_type.ComponentType.FULL,)
    params.tree_core_backend = "rust"
    cache = sglang.unified.UnifiedRadixCache(params)
    core = type(cache.tree_core).__name__
    if core != "RustUnifiedTreeCore":
        raise SystemExit(f"SGLang's Rust core does not run here, but {core}: there is nothing to compare with")
    return cache


def _life(desk: Desk, tokens: int) -> Side:
    """Return a whole request that finds nothing cached: match, lock, one checkpoint for each chunk, unlock."""
    req = desk.request(random_key(tokens))

    def call() -> None:
        desk.admit(req)
        desk.chunks(req, 0, tokens)
        desk.leave(req)

    return Side(call, partial(desk.forget, req, tokens))


def _cached(desk: Desk, tokens: int) -> Any:
    """Cache a prompt in chunks; return its request."""
    req = desk.request(random_key(tokens + PAGE))
    desk.admit(req)
    desk.chunks(req, 0, tokens)
    desk.leave(req)
    return req


def _match(desk: Desk, tokens: int) -> Side:
    """Return the match of a waiting request, a full hit."""
    req = _cached(desk, tokens)
    params = desk.key(req.full_untruncated_fill_ids, tokens)
    assert desk.cache.match_prefix(params).device_prefix_len == tokens
    return Side(partial(desk.cache.match_prefix, params))


def _lock(desk: Desk, tokens: int) -> Side:
    cache = desk.cache
    node = cache.match_prefix(desk.key(_cached(desk, tokens).full_untruncated_fill_ids, tokens)).last_device_node
    return Side(lambda: cache.unlock(cache.lock(node)))


def _admission(desk: Desk, tokens: int) -> Side:
    """Return the prefill adder's calls for a hit (match, lock, size, lock, unlock), and an unlock that undoes them."""
    req = _cached(desk, tokens)
    params = desk.key(req.full_untruncated_fill_ids, tokens)
    cache = desk.cache

    def call() -> None:
        node = cache.match_prefix(params).last_device_node
        moment = cache.lock(node)
        cache.evictable_size()
        held = cache.lock(node)
        cache.unlock(moment)
        cache.unlock(held)

    return Side(call)


def _checkpoint(desk: Desk, tokens: int) -> Side:
    """Return the checkpoint of one chunk after `tokens` tokens that the request has locked."""
    req = desk.request(random_key(tokens + CHUNK))
    desk.admit(req)
    desk.chunks(req, 0, tokens)
    held = req.last_node

    def restore() -> None:
        desk.cache.unlock(req.lock)
        req.last_node, req.lock = held, desk.cache.lock(held)
        desk.forget(req, CHUNK)
        req.kv.cache_protected_len = req.kv.cache_inserted_len = tokens

    return Side(partial(desk.cache.checkpoint, req, up_to=tokens + CHUNK), restore)


def _both(side: Any, tokens: int, setup: Setup) -> Measured:
    capacity = 2 * (tokens + CHUNK)
    theirs = side(Desk(default, capacity), tokens) if setup.peer else None
    return compare(setup, side(Desk(flat, capacity), tokens), theirs)


def _full(make_cache: Any, nodes: int) -> Desk:
    desk = Desk(make_cache, nodes * PAGE)
    for first in range(0, nodes, 10_000):
        for number, key in enumerate(distinct_keys(first, min(10_000, nodes - first), PAGE)):
            begin = (first + number + 1) * PAGE
            slots = torch.arange(begin, begin + PAGE)
            tokens = desk.sglang.radix.RadixKey(array("q", key.tobytes()))
            desk.cache.insert(desk.sglang.base.InsertParams(key=tokens, value=slots))
    return desk


def _evict(tokens: int, calls: int, setup: Setup) -> Measured:
    """Measure the mean of consecutive evictions; runs of the two caches alternate. The trees start with 100k nodes."""
    makers = [flat, *([default] if setup.peer else [])]
    desks = [_full(maker, 100_000) for maker in makers]
    samples: list[list[float]] = [[] for _ in desks]
    for _ in range(5):
        for desk, found in zip(desks, samples, strict=True):
            params = desk.sglang.base.EvictParams(num_tokens=tokens)
            start = time.perf_counter()
            for _ in range(calls):
                desk.cache.evict(params)
            found.append((time.perf_counter() - start) / calls)
    sizes = {desk.cache.evictable_size() for desk in desks}
    assert len(sizes) == 1
    medians = [statistics.median(found) for found in samples]
    return Measured(medians[0], medians[1] if setup.peer else None, f"mean of {calls} in a row")


class Queue:
    """Waiting requests beside a cache, under the policy `lpm`. A part of each is cached, shared by twenty requests."""

    def __init__(self, make_cache: Any, count: int, tokens: int) -> None:
        stems = [random_key(PAGE * (8 + number), number) for number in range(count // 20)]
        self.desk = Desk(make_cache, sum(len(stem) + PAGE for stem in stems) + tokens)
        for stem in stems:
            self._store(stem)
        self.policy = self.desk.sglang.policy.SchedulePolicy("lpm", self.desk.cache, False, False, False)
        self.waiting = []
        for number in range(count + 1):
            stem = stems[number % len(stems)]
            self.waiting.append(self.desk.request(stem + random_key(tokens - len(stem), count + number)))
            self.waiting[-1].rid = str(number)
        self._spare = self.waiting.pop()
        self._passes = 0

    def _store(self, key: array[int]) -> None:
        params = self.desk.sglang.base.InsertParams(
            key=self.desk.sglang.radix.RadixKey(key), value=torch.arange(PAGE, PAGE + len(key))
        )
        self.desk.cache.insert(params)

    def change(self) -> None:
        """Cache a page, and evict one; then let the first request leave, and one come."""
        self._passes += 1
        self._store(random_key(PAGE, -self._passes % 2**32))
        self.desk.cache.evict(self.desk.sglang.base.EvictParams(num_tokens=PAGE))
        self.waiting.append(self._spare)
        self._spare = self.waiting.pop(0)

    def side(self, calc_priority: Any) -> Side:
        return Side(lambda: calc_priority(self.policy, self.waiting), self.change)


def _schedule(count: int, tokens: int, setup: Setup) -> Measured:
    """Measure passes over a long queue. SGLang's limit of 128 requests, above which it sorts nothing, is raised."""
    from flatradix.integrations.sglang import waiting as hooks

    queue = Queue(flat, count, tokens)
    original = type(queue.policy).calc_priority
    hooks.WaitingRequests(queue.policy, queue.desk.cache, lambda: queue.waiting)
    theirs = None
    if setup.peer:
        queue.desk.sglang.policy.WAITING_QUEUE_PREFIX_MATCH_MAX = count + 1
        theirs = Queue(default, count, tokens).side(original)
    return compare(setup, queue.side(partial(hooks.calc_priority, original)), theirs)


def _name(tokens: int) -> str:
    return f"{tokens // 1024}k"


ROWS = [
    *(
        Row(f"life-{_name(n)}", f"all of a request of {n} tokens, nothing cached", "us", 0.5, partial(_both, _life, n))
        for n in CONTEXTS
    ),
    *(Row(f"match-{_name(n)}", f"match {n} cached tokens", "us", 0.5, partial(_both, _match, n)) for n in CONTEXTS),
    *(
        Row(f"lock-{_name(n)}", f"lock and unlock {n} tokens in chunks", "us", 0.5, partial(_both, _lock, n))
        for n in CONTEXTS
    ),
    *(
        Row(f"admit-{_name(n)}", f"admit a request of {n} cached tokens", "us", 0.5, partial(_both, _admission, n))
        for n in CONTEXTS
    ),
    *(
        Row(
            f"checkpoint-{_name(n)}",
            f"checkpoint of {CHUNK} tokens behind {n}",
            "us",
            0.1 if n == CONTEXTS[-1] else 0.5,
            partial(_both, _checkpoint, n),
        )
        for n in CONTEXTS
    ),
    Row("evict-one", "evict one node of 100k", "us", 0.5, partial(_evict, PAGE, 20)),
    Row("evict-percent", "evict 1 % of 100k nodes in one call", "us", 0.5, partial(_evict, 1000 * PAGE, 1)),
    Row(
        "schedule",
        "a scheduling pass (calc_priority) over 2000 waiting requests of 8192 tokens, lpm",
        "ms",
        1.0,
        partial(_schedule, 2000, 8192),
        absolute=True,
    ),
]
