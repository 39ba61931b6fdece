"""vLLM's own scheduler with a worker that computes no KV: it writes what the KV of a token depends on, and checks it.

The KV of a token is a function of the token, all tokens before, the LoRA adapter and the cache salt. So the worker
writes a hash of these into the token's place in its block. When a request has computed some tokens, every place of its
block table must hold the hash for this request: then every block that was shared, kept or given again was right.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from bench.support import vllm_manager
from bench.support.sglang_trees import PeerMissing

PAGE = 4
MAX_LENGTH = 256


class Work(NamedTuple):
    """One request: the step of its arrival, its prompt, how many tokens it generates, and what it shares KV with."""

    arrives: int
    prompt: list[int]
    outputs: int
    salt: str | None = None
    lora: str | None = None
    gives_up: int | None = None  # the step


class _Options(SimpleNamespace):
    """A configuration in which all that is not set is off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def load_or_skip(name: str) -> Any:
    """Return a module of vLLM (bench/support/vllm_manager.py), or skip the test module with the reason."""
    try:
        return vllm_manager.load(name)
    except PeerMissing as reason:
        pytest.skip(str(reason), allow_module_level=True)


def hash_of(value: Any) -> bytes:
    return pickle.dumps(hash(value))


def kv_config(blocks: int) -> Any:
    specs = vllm_manager.load("v1.kv_cache_interface")
    spec = specs.FullAttentionSpec(block_size=PAGE, num_kv_heads=1, head_size=1, dtype=torch.float16)
    return specs.KVCacheConfig(blocks, [], [specs.KVCacheGroupSpec(["layer"], spec)])


def make_scheduler(kind: Any, blocks: int, **changes: Any) -> Any:
    """Return a scheduler of a class. changes: options of vLLM's SchedulerConfig."""
    options = {
        "max_num_seqs": 6, "max_num_batched_tokens": 24, "long_prefill_token_threshold": 0, "watermark": 0.0,
        "policy": "fcfs", "enable_chunked_prefill": True, "prefill_schedule_interval": 1,
        "scheduler_reserve_full_isl": True,
    }  # fmt: skip
    parallel = _Options(
        decode_context_parallel_size=1, prefill_context_parallel_size=1, pipeline_parallel_size=1,
        data_parallel_size=1, data_parallel_index=0,
    )  # fmt: skip
    config = _Options(
        scheduler_config=_Options(**{**options, **changes}),
        cache_config=_Options(num_gpu_blocks=blocks, block_size=PAGE, enable_prefix_caching=True),
        model_config=_Options(max_model_len=MAX_LENGTH), parallel_config=parallel, max_in_flight_tokens=MAX_LENGTH,
        observability_config=_Options(per_request_spec_decode_metrics="none"), aux_output_config=_Options(),
        num_lookahead_tokens=0, num_speculative_tokens=0, num_prefill_lookahead_tokens=0, num_hash_lookahead_tokens=0,
        max_concurrent_batches=1, use_v2_model_runner=False,
        ec_manager_config=SimpleNamespace(get_encoder_cache_manager_obj=lambda: _Options(create_manager=no_encoder)),
    )  # fmt: skip
    grammars = SimpleNamespace(accept_tokens=lambda *_: True)
    return kind(config, kv_config(blocks), grammars, PAGE, log_stats=True)


def no_encoder(**_: Any) -> Any:
    return SimpleNamespace(
        free=lambda _: None, get_freed_mm_hashes=list, get_manager_metadata=lambda: None, reset=lambda: None
    )


def make_request(name: str, work: Work) -> Any:
    utils = vllm_manager.load("v1.core.kv_cache_utils")
    utils.init_none_hash(hash_of)
    sampling = _Options(max_tokens=work.outputs, min_tokens=0)
    return vllm_manager.load("v1.request").Request(
        name, list(work.prompt), sampling, None, cache_salt=work.salt,
        lora_request=SimpleNamespace(lora_name="adapter", lora_path=work.lora) if work.lora else None,
        block_hasher=utils.get_request_block_hasher(PAGE, hash_of),
    )  # fmt: skip


class Engine:
    """Runs requests from arrival to end.

    alike: whether requests that share a prompt often go on alike. Otherwise their outputs differ.
    """

    def __init__(self, kind: Any, blocks: int, alike: bool = True, **changes: Any) -> None:
        self.scheduler = make_scheduler(kind, blocks, **changes)
        self.kv: dict[tuple[int, int], int] = {}  # by block and place in it
        self.tables: dict[str, list[int]] = {}
        self.requests: dict[str, Any] = {}
        self.cached: dict[str, int] = {}  # tokens of each request that were cached when it first started
        self.blocks = blocks
        self.alike = alike

    def run(self, works: Sequence[Work]) -> Iterator[tuple[int, list[tuple[str, int]]]]:
        """Run requests; yield after each step how many blocks are left, and where each running request is."""
        step = 0
        while step <= max((work.arrives for work in works), default=0) or self.scheduler.has_unfinished_requests():
            assert step < 5000, "the scheduler does not come to an end"
            for at, work in enumerate(works):
                if work.arrives == step:
                    self.requests[str(at)] = make_request(str(at), work)
                    self.scheduler.add_request(self.requests[str(at)])
                if work.gives_up == step and str(at) in self.scheduler.requests:
                    status = vllm_manager.load("v1.request").RequestStatus.FINISHED_ABORTED
                    self.scheduler.finish_requests(str(at), status)
            self._step()
            running = [(request.request_id, request.num_computed_tokens) for request in self.scheduler.running]
            yield round((1 - self.scheduler.kv_cache_manager.usage) * (self.blocks - 1)), running
            step += 1

    def _step(self) -> None:
        output = self.scheduler.schedule()
        self._update_tables(output)
        ends = self._compute(output)
        names = list(output.num_scheduled_tokens)
        sampled = [[self._next(name)] if ends[name] == self.requests[name].num_tokens else [] for name in names]
        outputs = vllm_manager.load("v1.outputs").ModelRunnerOutput(
            names, {name: at for at, name in enumerate(names)}, sampled
        )
        self.scheduler.update_from_output(output, outputs)

    def _update_tables(self, output: Any) -> None:
        """Do with the block tables what a worker does."""
        for new in output.scheduled_new_reqs:
            (self.tables[new.req_id],) = (list(group) for group in new.block_ids)
            self.cached[new.req_id] = new.num_computed_tokens
        old = output.scheduled_cached_reqs
        for name, blocks in zip(old.req_ids, old.new_block_ids, strict=True):
            if name in old.resumed_req_ids:
                self.tables[name] = list(blocks[0])
            elif blocks is not None:
                self.tables[name] += blocks[0]

    def _compute(self, output: Any) -> dict[str, int]:
        """Write the KV of all scheduled tokens, then read all that is computed. Returns where each request ends."""
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        old = output.scheduled_cached_reqs
        computed.update(zip(old.req_ids, old.num_computed_tokens, strict=True))
        ends = {name: computed[name] + count for name, count in output.num_scheduled_tokens.items()}
        for name, end in ends.items():
            for at, value in enumerate(self._values(name)[:end]):
                if at >= computed[name]:
                    self.kv[self._place(name, at)] = value
        for name, end in ends.items():
            found = [self.kv.get(self._place(name, at)) for at in range(end)]
            assert found == self._values(name)[:end], f"request {name} reads KV of other tokens"
        return ends

    def _place(self, name: str, at: int) -> tuple[int, int]:
        block = self.tables[name][at // PAGE]
        assert 0 < block < self.blocks
        return block, at % PAGE

    def _values(self, name: str) -> list[int]:
        request = self.requests[name]
        value = hash((request.cache_salt, request.lora_request and request.lora_request.lora_path))
        values = []
        for token in request.all_token_ids:
            value = hash((value, token))
            values.append(value)
        return values

    def _next(self, name: str) -> int:
        """The model."""
        return self._values(name)[-1] % 7 % 2 if self.alike else 10_000 + int(name)
