"""A small engine: a transformers model, paged KV memory, and a PrefixCache that assigns the slots."""

from __future__ import annotations

import inspect
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from examples.paged_kv import PagedForward, PagedKV
from flatradix.cache.prefix_cache import PrefixCache
from flatradix.cache.requests import Request, Requests


@dataclass
class Job:
    """A prompt to continue, and its result."""

    prompt: list[int]
    new_tokens: int
    namespace: str | None
    output: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)  # float32 [vocabulary] for each token of the output
    cached: int = 0  # tokens of the prompt that needed no prefill
    first_token: float = 0.0  # seconds from the begin of its request
    request: Request | None = None

    @property
    def done(self) -> bool:
        return len(self.output) == self.new_tokens


class CallTimes:
    """Host seconds that calls of the cache took. calls: of each call, by name. steps: in all calls of a decode step.

    With a KV cache on a GPU, a call enqueues copies, and their time on the GPU is not counted.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.calls: dict[str, list[float]] = {"begin": [], "commit": [], "step": [], "extend": [], "finish": []}
        self.steps: list[float] = []
        self._step = 0.0

    def of(self, name: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call and return what the call returns."""
        if name == "step":
            self._step = 0.0
        started = time.perf_counter()
        found = call(*arguments, **keywords)
        taken = time.perf_counter() - started
        self.calls[name].append(taken)
        self._step += taken
        return found

    def end_step(self) -> None:
        """End a decode step, which has begun with a call named "step"."""
        self.steps.append(self._step)


class Engine:
    """Greedy generation for many prompts at once. Prefill goes first, one prompt at a time; decoding is batched.

    num_slots: KV slots, in pages of `page_size`. chunk: the most tokens that one forward pass of a prefill takes.
    index: the device of the PrefixCache's index. reuse: False computes every prompt in full, for comparison.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        num_slots: int,
        page_size: int = 16,
        max_requests: int = 8,
        max_length: int = 4096,
        chunk: int = 512,
        index: str = "cpu",
        reuse: bool = True,
    ) -> None:
        self.model = model
        self.chunk = chunk
        self.reuse = reuse
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.cache = PrefixCache(num_slots, page_size, max_requests, max_length, kv_device=self.device, device=index)
        self.kv = PagedKV(model.config, num_slots, self.dtype, self.device)
        # The name of the argument depends on the version of transformers.
        known = inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"
        self._waiting: deque[Job] = deque()
        self._may_fit = True  # whether the first waiting job may fit; False from its refusal until another job ends
        self._running: list[Job] = []
        self._unshared = count()
        self.preempted = 0
        self.times = CallTimes()

    def generate(
        self,
        prompts: Sequence[list[int]],
        new_tokens: int,
        namespaces: Sequence[str | None] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Job]:
        """Continue each prompt by `new_tokens` tokens; after each step, `progress` gets the number of prompts done.

        Raises RuntimeError if a prompt and its output do not fit in the pool even alone, and ValueError if they are
        longer than max_length. After either error nothing is running.
        """
        if new_tokens < 1:
            raise ValueError(f"new_tokens must be at least 1, not {new_tokens}")
        for prompt in prompts:
            if len(prompt) + new_tokens > self.cache.max_length:
                raise ValueError(f"{len(prompt)} and {new_tokens} tokens exceed max_length {self.cache.max_length}")
        names = namespaces or [None] * len(prompts)
        jobs = [Job(prompt, new_tokens, name) for prompt, name in zip(prompts, names, strict=True)]
        self._waiting.extend(jobs)
        try:
            while self._waiting or self._running:
                # A job begins only when the job before it has committed: the two may share a prefix.
                if not (self._waiting and self._may_fit and self._begin()):
                    self._decode()
                progress(sum(job.done for job in jobs))
        except BaseException:
            self.cache.abort(self.cache.running)
            self._running.clear()
            self._waiting.clear()
            self._may_fit = True
            raise
        return jobs

    def _begin(self) -> bool:
        """Start the first waiting job if it fits; return whether it started."""
        job = self._waiting[0]
        started = time.perf_counter()
        namespace = job.namespace if self.reuse else f"unshared {next(self._unshared)}"
        requests = self.times.of("begin", self.cache.begin, [job.prompt + job.output], namespace)
        (job.request,) = requests
        if job.request.state == "refused":
            if not self._running:  # no running job will free slots
                raise RuntimeError(f"a prompt of {job.request.num_tokens} tokens does not fit: {job.request.refusal}")
            self._may_fit = False
            return False
        self._waiting.popleft()
        self._running.append(job)
        self._take([job], self._prefill(requests))
        if len(job.output) == 1:
            job.cached = job.request.cached_length
            job.first_token = time.perf_counter() - started
        self._finish_done()
        return True

    def _prefill(self, requests: Requests) -> torch.Tensor:
        """Compute the tokens of one request that are not cached, in chunks. Return the logits of the last token."""
        (request,) = requests
        for begin in range(request.cached_length, request.num_tokens, self.chunk):
            end = min(begin + self.chunk, request.num_tokens)
            logits = self._forward(requests, [request.tokens[begin:end].tolist()], [begin])
            self.times.of("commit", self.cache.commit, requests, up_to=end)
        return logits

    def _decode(self) -> None:
        """Generate one more token for each running job."""
        self._make_room()
        requests = self.cache.running  # the oldest first, as in self._running
        # This forward pass computes the KV of the newest token.
        begins = (requests.lengths - 1).tolist()
        self._take(self._running, self._forward(requests, [job.output[-1:] for job in self._running], begins))
        self._finish_done()
        self.times.end_step()

    def _make_room(self) -> None:
        """Tell the newest tokens, and get a slot for each. While some get none, preempt the youngest of these."""
        newest = [job.output[-1] for job in self._running]
        short = self.times.of("step", self.cache.step, self.cache.running, newest).short
        while short:
            if len(self._running) == 1:
                raise RuntimeError(f"{short[0].length + 1} tokens of a prompt and its output do not fit in the KV pool")
            self._preempt(short.pop())
            short = self.times.of("extend", self.cache.extend, short)

    def _preempt(self, request: Request) -> None:
        """End a request and put its job back to the front of the queue.

        The request got no slot for its newest token, so the KV of all its slots is computed. That KV stays cached until
        it is evicted, so that a new begin is cheap.
        """
        (job,) = [job for job in self._running if job.request is request]
        self._running.remove(job)
        self.times.of("finish", self.cache.finish, [request])
        self._waiting.appendleft(job)
        self._may_fit = False
        self.preempted += 1

    def _finish_done(self) -> None:
        """End the requests of jobs that are done. The cache does not know their last tokens, which have no KV."""
        done = [job for job in self._running if job.done]
        if done:
            self.times.of("finish", self.cache.finish, [job.request for job in done])
            self._running = [job for job in self._running if not job.done]
            self._may_fit = True

    @staticmethod
    def _take(jobs: list[Job], logits: torch.Tensor) -> None:
        """Append the likeliest token to the output of each job. With a model on a GPU, the engine waits for it here."""
        for job, row, token in zip(jobs, logits, logits.argmax(-1).tolist(), strict=True):
            job.logits.append(row)
            job.output.append(token)

    @torch.inference_mode()
    def _forward(self, requests: Requests, tokens: list[list[int]], begins: list[int]) -> torch.Tensor:
        """Run the model on equally many new tokens of each request. Return the last logits of each, float32 [B, V]."""
        rows = torch.as_tensor(requests.rows, device=self.device)
        new = len(tokens[0])
        view = PagedForward(
            self.kv,
            (self.cache.page_table[rows], self.cache.page_size),
            torch.tensor(begins, device=self.device),
            new,
            max(begins) + new,
        )
        answer = self.model(
            input_ids=torch.tensor(tokens, device=self.device),
            position_ids=view.positions,
            attention_mask=view.mask(self.dtype),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: view},
        )
        return answer.logits[:, -1].float()
