"""Run transformers' continuous batching twice: with its own prefix cache, and with flatradix in its place.

Users talk in turns, each behind one of some system prompts. The prompt of each turn is the whole conversation so far,
and all prompts of a turn are given to the engine at once. Both caches have the same memory. The report says, for each
turn, how many tokens went through the model (prompts that were not cached, answers, and what was computed again because
a request had lost its memory), how long that took, and how many answers are equal. Prompts are random tokens and the
weights are random: nothing is downloaded. Needs transformers 5.23: pip install -c constraints.txt transformers

With enough memory for all, both compute the same. Look at a pool that is too small: transformers evicts all unused
blocks when fewer than 15 % are free, flatradix as many as are needed, the least recently used first.

  python examples/continuous_batching.py                            a small model on the CPU, less than a minute
  python examples/continuous_batching.py --blocks 2000              enough memory for all conversations
  python examples/continuous_batching.py --device cuda              0.5B parameters on a GPU, long prompts
  python examples/continuous_batching.py --users 32 --systems 8     more conversations, which share less

The adapter itself is examples/transformers_cache.py.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # flatradix need not be installed

from examples.generate import positive  # noqa: E402

# By device: model, tokens of a system prompt and a message, blocks and their size, tokens a forward pass.
DEFAULTS = {
    "cpu": {"size": "tiny", "system": 256, "message": 32, "blocks": 220, "page_size": 16, "batch": 512},
    "cuda": {"size": "0.5b", "system": 4096, "message": 256, "blocks": 1400, "page_size": 32, "batch": 4096},
}
LINE = "{:>4} {:>9} {:>8} {:>13} {:>10} {:>13} {:>10} {:>12}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:N")
    parser.add_argument("--size", choices=["tiny", "small", "0.5b", "1.5b"], help="of the model (tiny; cuda: 0.5b)")
    cache = parser.add_argument_group("cache")
    cache.add_argument("--blocks", type=positive, help="blocks of KV memory (default: 220; cuda: 1400)")
    cache.add_argument("--page-size", type=positive, help="tokens a block, at least 4 (default: 16; cuda: 32)")
    cache.add_argument("--batch", type=positive, help="tokens a forward pass, at most (default: 512; cuda: 4096)")
    work = parser.add_argument_group("workload")
    work.add_argument("--users", type=positive, default=16, help="conversations at once (default: %(default)s)")
    work.add_argument("--turns", type=positive, default=5, help="(default: %(default)s)")
    work.add_argument("--systems", type=positive, default=4, help="different system prompts (default: %(default)s)")
    work.add_argument("--system", type=positive, help="tokens of a system prompt (default: 256; cuda: 4096)")
    work.add_argument("--message", type=positive, help="tokens of a message (default: 32; cuda: 256)")
    work.add_argument("--new", type=positive, default=12, help="tokens of an answer (default: %(default)s)")
    work.add_argument("--seed", type=int, default=0, help="of weights and prompts (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    for name, value in DEFAULTS["cpu" if chosen.device == "cpu" else "cuda"].items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    return chosen


class Run:
    """A manager of transformers that runs, with the cache of the context in which the run is made."""

    def __init__(self, chosen: argparse.Namespace, model: Any) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        generation = GenerationConfig(max_new_tokens=chosen.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        config = ContinuousBatchingConfig(
            num_blocks=chosen.blocks,
            page_size=chosen.page_size,
            max_batch_tokens=chosen.batch,
            max_requests_per_batch=chosen.users,
            auto_switch_to_flash=False,  # flash attention may have to be downloaded
        )
        self.manager = model.init_continuous_batching(generation, config)
        self.manager.warmup()  # makes the cache
        self.computed = 0
        self._count(self.manager.batch_processor.scheduler)
        self.manager.start()

    def _count(self, scheduler: Any) -> None:
        """Count the tokens of all batches. Nothing that transformers counts for its users says this."""
        schedule = scheduler.schedule_batch

        def counted(*budgets: int) -> Any:
            batch = schedule(*budgets)
            self.computed += batch[2]
            return batch

        scheduler.schedule_batch = counted

    def answer(self, prompts: list[list[int]]) -> tuple[list[list[int]], int, float]:
        """Return the answers, how many tokens were computed for them, and the seconds that it took."""
        before, start = self.computed, time.perf_counter()
        names = self.manager.add_requests(prompts)
        results: dict[str, Any] = {}
        while len(results) < len(names):
            result = self.manager.get_result(timeout=1)
            if result is not None:
                results[result.request_id] = result
            elif not self.manager.is_running():
                break
        failed = [result.error for result in results.values() if result.error]
        if failed or len(results) < len(names):
            reason = failed[0] if failed else "the engine has ended"
            raise RuntimeError(f"{reason} (more --blocks may help)")
        answers = [results[name].generated_tokens for name in names]
        return answers, self.computed - before, time.perf_counter() - start


def talk(chosen: argparse.Namespace, runs: list[Run], vocabulary: int) -> bool:
    """Run all turns and print a line for each. Returns whether all answers were equal."""
    numbers = random.Random(chosen.seed)

    def some(count: int) -> list[int]:
        return [numbers.randrange(vocabulary) for _ in range(count)]

    systems = [some(chosen.system) for _ in range(chosen.systems)]
    talks = [list(systems[user % len(systems)]) for user in range(chosen.users)]
    sums, equal = [0, 0, 0.0, 0, 0.0], 0
    for turn in range(1, chosen.turns + 1):
        talks = [history + some(chosen.message) for history in talks]
        (theirs, *own), (ours, *with_flatradix) = (run.answer(talks) for run in runs)
        alike = sum(map(list.__eq__, theirs, ours))
        equal += alike
        figures = [sum(map(len, talks)), *own, *with_flatradix]
        sums = [one + other for one, other in zip(sums, figures, strict=True)]
        show(turn, chosen.users, figures, alike)
        talks = [history + answer for history, answer in zip(talks, theirs, strict=True)]
    show("all", chosen.users * chosen.turns, sums, equal)
    return equal == chosen.users * chosen.turns


def show(turn: Any, requests: int, figures: list[Any], equal: int) -> None:
    tokens, own, own_time, ours, our_time = figures
    times = [f"{seconds:.2f} s" for seconds in (own_time, our_time)]
    print(LINE.format(turn, requests, tokens, own, times[0], ours, times[1], f"{equal} of {requests}"), flush=True)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    runs: list[Run] = []
    try:
        import torch

        import flatradix
        from examples.models import random_model
        from examples.transformers_cache import flatradix_cache

        model = random_model(chosen.size, chosen.seed, torch.float32, torch.device(chosen.device))
        flatradix.warm_up("cpu", chosen.page_size)
        for context in (nullcontext(), flatradix_cache()):
            with context:
                runs.append(Run(chosen, model))
        print(LINE.format("", "", "prompt", "transformers", "", "flatradix", "", "equal"))
        print(LINE.format("turn", "requests", "tokens", "computes", "in", "computes", "in", "answers"))
        equal = talk(chosen, runs, model.config.vocab_size)
    except (ValueError, RuntimeError, MemoryError, ImportError) as error:
        print(f"continuous_batching.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        for run in runs:
            run.manager.stop(hard_stop=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
