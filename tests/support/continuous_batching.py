"""transformers' continuous batching without its thread: one step at a time, and what each step computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

PAGE = 4
OPTIONS = {"page_size": PAGE, "max_batch_tokens": 48, "max_requests_per_batch": 6, "auto_switch_to_flash": False}


@dataclass(frozen=True)
class Work:
    """A request: the step at which it arrives, its prompt, how many tokens it generates, when its client gives up."""

    arrives: int
    prompt: list[int]
    outputs: int
    gives_up: int | None = None


class Engine:
    """A manager with a cache of `blocks` blocks, of the kind that is made where the engine is made.

    cached: by request, the tokens that it found cached, one number for each time it began. computed: all tokens that
    went through the model. steps: forward passes. starved: how often requests had to give their blocks back.
    """

    def __init__(self, model: torch.nn.Module, blocks: int, samples: int = 1, **options: Any) -> None:
        self.model, self.blocks = model, blocks
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=8)
        config = ContinuousBatchingConfig(num_blocks=blocks, **(OPTIONS | options))
        self.manager = model.init_continuous_batching(generation, config)
        self.manager.num_return_sequences = samples  # a GenerationConfig allows no greedy samples
        self.manager.warmup()
        self.processor = self.manager.batch_processor
        self.cache = self.processor.cache
        self.cached: dict[str, list[int]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.computed = self.steps = self.starved = 0
        self._count()

    def _count(self) -> None:
        search = self.cache.search_prefix_match
        offload = self.processor.offloading_manager.offload_requests

        def counted(name: str, prompt: list[int]) -> int:
            length = search(name, prompt)
            if length:
                self.cached.setdefault(name, []).append(length)
            return length

        def counted_offload() -> bool:
            took = offload()
            self.starved += took
            return took

        self.cache.search_prefix_match = counted
        self.processor.offloading_manager.offload_requests = counted_offload

    def run(self, works: list[Work]) -> Any:
        """Run all of `works` to their ends. Yields after each step."""
        waiting = sorted(enumerate(works), key=lambda work: work[1].arrives)
        now = 0
        while waiting or self.processor.has_pending_requests():
            while waiting and waiting[0][1].arrives <= now:
                number, work = waiting.pop(0)
                self.manager.add_request(work.prompt, str(number), work.outputs)
            for number, work in enumerate(works):
                if work.gives_up is not None and now == work.arrives + work.gives_up:
                    self.manager.cancel_request(str(number))
            self.step()
            now += 1
            yield now

    def step(self) -> None:
        if self.processor.prepare_next_batch():
            batch = self.processor.inputs_and_outputs
            self.computed += batch.num_q_tokens
            self.steps += 1
            self.processor._generation_step(self.model)
            self.processor.update_batch()
        while (result := self.manager.get_result()) is not None:
            assert result.error is None
            self.outputs[result.request_id] = result.generated_tokens

    @property
    def hits(self) -> int:
        return sum(map(sum, self.cached.values()))
