"""A scheduler loop around SGLang's own classes, for one cache. Requests run from arrival to end; no model runs.

Requests, batches, policies, the prefill adder, pools and allocators are SGLang's. This module adds the order in which
SGLang's scheduler calls them (without overlap), and output tokens that are a function of request and position.
"""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from bench.support import sglang_modules
from bench.support.sglang_trees import PeerMissing

VOCABULARY = 50_000
CONTEXT = 600
_MODEL = SimpleNamespace(
    is_encoder_decoder=False, vocab_size=VOCABULARY, is_multimodal=False, context_len=CONTEXT, hf_config=None,
    is_generation=True, sliding_window_size=None,
)  # fmt: skip


class Work(NamedTuple):
    """One request: the step of its arrival, its input, and the step at which its client gives up (None: never)."""

    rid: str
    arrives: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    priority: int | None
    extra_key: str | None
    cache_salt: str | None
    gives_up: int | None


class Plan(NamedTuple):
    """The settings of an engine."""

    page_size: int = 1
    slots: int = 480
    schedule: str = "lpm"
    eviction: str = "lru"
    is_eagle: bool = False
    chunk: int = 64
    events: bool = False
    dynamo: bool = False
    seed: int = 0
    need_sort: bool = True


def draw_work(plan: Plan, count: int = 50) -> list[Work]:
    """Draw requests that share prompts, continue earlier ones, arrive in bursts, and exceed the pool."""
    rng = random.Random(plan.seed)
    systems = [tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(5, 70))) for _ in range(4)]
    known: list[tuple[int, ...]] = []
    work = []
    step = 0
    for number in range(count):
        step += rng.choice([0, 0, 0, 1, 4])
        stem = rng.choice(known) if known and rng.random() < 0.4 else rng.choice(systems)
        prompt = stem[: rng.randint(1, len(stem))] if rng.random() < 0.3 else stem
        prompt += tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(1, rng.choice([10, 150]))))
        prompt = prompt[:240]
        known.append(prompt)
        work.append(
            Work(
                rid=f"r{number}",
                arrives=step,
                prompt=prompt,
                max_new_tokens=rng.choice([1, 5, 40, 90]),
                priority=rng.choice([None, 0, 1, 5]),
                extra_key=rng.choice([*[None] * 8, "adapter", ""]),
                cache_salt=rng.choice([*[None] * 8, "salt", "salty"]),
                gives_up=step + rng.randint(0, 20) if rng.random() < 0.12 else None,
            )
        )
    return work


def token_of(rid: str, position: int) -> int:
    return (int(rid[1:]) * 7919 + position * 104729) % VOCABULARY


class Engine:
    """One cache and its scheduler. admitted: (request id, tokens found), in order. finished: request ids, in order."""

    def __init__(self, sglang: Any, plan: Plan, make_cache: Any) -> None:
        self.sglang, self.plan = sglang, plan
        self.pool = sglang.pools.ReqToTokenPool(
            size=12, max_context_len=CONTEXT, device="cpu", enable_memory_saver=False
        )
        self.allocator = make_allocator(sglang, plan)
        self.cache = make_cache(make_params(sglang, plan, self.pool, self.allocator))
        self.policy = sglang.policy.SchedulePolicy(plan.schedule, self.cache, False, False, False)
        self.waiting: list[Any] = []
        self.running = sglang.requests.ScheduleBatch(reqs=[], batch_is_full=False)
        self.last: Any = None
        self.chunked: Any = None
        self.admitted: list[tuple[str, int]] = []
        self.finished: list[str] = []
        self.retracted = 0
        self.chunks = 0
        self._limits: dict[str, int | None] = {}

    # Clients

    def add(self, work: Work) -> None:
        parameters = self.sglang.sampling.SamplingParams(max_new_tokens=work.max_new_tokens)
        parameters.normalize(None)
        req = self.sglang.requests.Req(
            work.rid, "", array("q", work.prompt), parameters, extra_key=work.extra_key, cache_salt=work.cache_salt,
            priority=work.priority,
        )  # fmt: skip
        self._limits[work.rid] = work.gives_up
        self.waiting.append(req)

    def give_up(self, now: int) -> None:
        """Abort the requests whose clients have given up, whether they wait or run."""
        gone = {rid for rid, step in self._limits.items() if step is not None and step <= now}
        self.waiting = [req for req in self.waiting if req.rid not in gone or self._drop(req)]
        for req in [*self.running.reqs, *([self.chunked] if self.chunked else [])]:
            if req.rid in gone and not req.finished():
                req.to_finish = self.sglang.requests.FINISH_ABORT("gone")

    def _drop(self, req: Any) -> bool:
        self.finished.append(req.rid)
        return False

    # One round of the scheduler

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.running.reqs or self.chunked or (self.last and self.last.reqs))

    def step(self) -> None:
        self._stash_chunk()
        self._merge_last()
        batch = self._prefill()
        if batch is None and not self.running.is_empty():
            batch = self._decode()
        self.last = batch
        if batch is not None:
            self._results(batch)

    def _stash_chunk(self) -> None:
        req = self.chunked
        if req is None:
            return
        if req.to_finish is not None:  # aborted between two chunks
            req.update_finish_state()
            self.sglang.common.release_kv_cache(req, self.cache, checkpoint=False)
            self.finished.append(req.rid)
            self.chunked = None
        elif req.extend_end > req.prefix_len:
            self.sglang.common.checkpoint_kv_cache(req, self.cache)
            self.chunks += 1

    def _merge_last(self) -> None:
        if self.last is not None and self.last.forward_mode.is_extend():
            leaving = [req for req in self.last.reqs if req is self.last.chunked_req or req is self.chunked]
            self.last.filter_batch(reqs_to_exclude=leaving)
            if not self.last.is_empty():
                if self.running.is_empty():
                    self.running = self.last
                else:
                    self.running.merge_batch(self.last)
        self.running.filter_batch()
        self.last = None

    def _prefill(self) -> Any:
        requests = self.sglang.requests
        if not self.waiting and self.chunked is None:
            return None
        self.policy.calc_priority(self.waiting, self.running)
        adder = self.sglang.policy.PrefillAdder(
            self.plan.page_size, self.cache, self.allocator, self.running, 0.05, 4096, self.plan.chunk
        )
        if self.chunked is not None:
            self.chunked.init_next_round_input()
            self.chunked = adder.add_chunked_req(self.chunked)
        for req in self.waiting:
            if len(adder.can_run_list) + len(self.running.reqs) >= self.pool.size:
                break
            req.init_next_round_input(self.cache)
            found = req.prefix_len
            result = adder.add_one_req(req, has_chunked_req=self.chunked is not None, truncation_align_size=None)
            if adder.can_run_list and adder.can_run_list[-1] is req:
                self.admitted.append((req.rid, found))
            if result != self.sglang.policy.AddReqResult.CONTINUE:
                break
        run = adder.can_run_list
        if not run:
            return None
        self.waiting = [req for req in self.waiting if req not in run]
        if adder.new_chunked_req is not None:
            self.chunked = adder.new_chunked_req
        if self.chunked is not None:
            self.chunked.inflight_middle_chunks += 1
        batch = requests.ScheduleBatch.init_new(
            run, self.pool, self.allocator, self.cache, _MODEL, False,
            self.sglang.speculative.SpeculativeAlgorithm.NONE, chunked_req=self.chunked,
        )  # fmt: skip
        batch.prepare_for_extend()
        batch.decoding_reqs = None
        return batch

    def _decode(self) -> Any:
        batch = self.running
        if not batch.check_decode_mem():
            retracted, _, aborted = batch.retract_decode()
            self.retracted += len(retracted)
            self.waiting.extend(retracted)
            self.finished.extend(req.rid for req in aborted)
        if batch.is_empty():
            return None
        batch.prepare_for_decode()
        return batch

    def _results(self, batch: Any) -> None:
        self.allocator.free_group_begin()
        for req in batch.reqs:
            if req.inflight_middle_chunks > 0:
                req.inflight_middle_chunks -= 1
                continue
            req.output_ids.append(token_of(req.rid, len(req.output_ids)))
            req.update_finish_state()
            if req.finished():
                self.sglang.common.release_kv_cache(req, self.cache, checkpoint=True)
                self.finished.append(req.rid)
            elif batch.forward_mode.is_extend():
                self.sglang.common.checkpoint_kv_cache(req, self.cache)
        self.allocator.free_group_end()

    # Invariants

    def held(self) -> int:
        """Return the number of slots that requests own and the tree does not."""
        page, requests = self.plan.page_size, {req.rid: req for req in self._living()}
        return sum(
            -(-req.kv.kv_allocated_len // page) * page - req.kv.cache_protected_len
            for req in requests.values()
            if req.kv.holds_kv
        )

    def _living(self) -> list[Any]:
        last = self.last.reqs if self.last is not None else []
        return [*self.running.reqs, *last, *([self.chunked] if self.chunked else [])]

    def check(self) -> None:
        sizes = (self.allocator.available_size(), self.cache.evictable_size(), self.cache.protected_size())
        assert sum(sizes) + self.held() == self.plan.slots, (sizes, self.held())

    def rows(self) -> dict[str, list[int]]:
        """Return the slots of each request that has any."""
        return {
            req.rid: self.pool.req_to_token[req.kv.req_pool_idx, : req.kv.kv_allocated_len].tolist()
            for req in self._living()
            if req.kv.holds_kv
        }


def make_params(sglang: Any, plan: Plan, pool: Any, allocator: Any, **others: Any) -> Any:
    return sglang.params.CacheInitParams(
        disable=False, req_to_token_pool=pool, token_to_kv_pool_allocator=allocator, page_size=plan.page_size,
        is_eagle=plan.is_eagle, eviction_policy=plan.eviction, enable_kv_cache_events=plan.events,
        dynamo_kv_event_format=plan.dynamo, **others,
    )  # fmt: skip


def make_allocator(sglang: Any, plan: Plan) -> Any:
    options = {"dtype": torch.float16, "device": "cpu", "kvcache": None, "need_sort": plan.need_sort}
    if plan.page_size == 1:
        return sglang.token.TokenToKVPoolAllocator(plan.slots, **options)
    return sglang.paged.PagedTokenToKVPoolAllocator(plan.slots, plan.page_size, **options)


def load_or_skip() -> Any:
    """Return SGLang's modules (bench/support/sglang_modules.py), or skip the test module with the reason."""
    try:
        return sglang_modules.load()
    except PeerMissing as reason:
        pytest.skip(str(reason), allow_module_level=True)
