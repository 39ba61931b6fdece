"""Compare the SGLang backend's index on the CPU with its index on the GPU, when the KV slots are on the GPU.

Measures single calls of a scheduler by the wall clock, from Python. A call ends when its answer is in Python, or when
the kernels that deliver its slots are enqueued. Needs no SGLang. Prints a Markdown table.

  python3 -m bench.index                        half a minute
"""

from __future__ import annotations

import argparse
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

import torch

from bench.support.gpu_harness import Setup, number, start_afresh, wall_seconds
from bench.support.workloads import random_key
from flatradix.integrations.sglang.index import SchedulerTree, make_tree

PAGE = 64
CHUNK = 4096
CONTEXTS = (1024, 8192, 32768, 131072)
CHECKPOINTS = 64


class Desk:
    """An index that caches the context of one request in chunks, and the row of slots for the inserts."""

    def __init__(self, where: str, context: int, gpu: torch.device) -> None:
        tokens = context + 2 * CHECKPOINTS * CHUNK
        params = SimpleNamespace(
            token_to_kv_pool_allocator=SimpleNamespace(size=tokens, device=gpu),
            page_size=PAGE,
            eviction_policy="lru",
            eviction_policy_config=None,
            is_eagle=False,
        )
        self.index: SchedulerTree = make_tree(params, where)
        self.key = random_key(context)
        self.row = torch.arange(tokens, dtype=torch.int32, device=gpu)
        self.end = None
        for at in range(0, context, CHUNK):
            part = self.key[at : at + CHUNK]
            self.end = self.index.insert(part, self.row[at : at + len(part)], start=self.end)
        assert self.index.match(self.key, None, None).length == context

    def look_up(self) -> int:
        return self.index.match(self.key, None, None).length

    def lock_and_unlock(self) -> None:
        self.index.lock(self.end)
        self.index.unlock(self.end)

    def slots(self) -> torch.Tensor:
        return self.index.slots(self.end)

    def checkpoints(self) -> list[Callable[[], int]]:
        """Lock the context; return calls that each insert a different chunk after it."""
        self.index.lock(self.end)
        tails = [random_key(CHUNK, seed=2 + number) for number in range(CHECKPOINTS)]
        first = len(self.key)
        slots = [self.row[first + n * CHUNK : first + (n + 1) * CHUNK] for n in range(CHECKPOINTS)]
        return [partial(self._store, *pair) for pair in zip(tails, slots, strict=True)]

    def _store(self, tail: array[int], slots: torch.Tensor) -> int:
        return self.index.insert(tail, slots, start=self.end).length

    def evict(self) -> int:
        freed = self.index.evict(1)
        assert freed.num_tokens == CHUNK
        return freed.num_tokens


def measure(setup: Setup, where: str, context: int) -> Iterator[tuple[str, float]]:
    """Yield (work, seconds) in the order of the table."""
    desk = Desk(where, context, setup.device)
    settled = torch.cuda.synchronize
    yield "look-up", wall_seconds(setup, [desk.look_up], settled)
    yield "lock and unlock", wall_seconds(setup, [desk.lock_and_unlock], settled)
    yield "slots", wall_seconds(setup, [desk.slots], settled)
    first, *others = desk.checkpoints()
    first()  # compiles the kernels
    yield f"checkpoint of {CHUNK}", wall_seconds(setup, others, settled, once=True)
    yield f"evict {CHUNK}", wall_seconds(setup, [desk.evict] * (CHECKPOINTS // 8), settled, once=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here: there are no two places to compare")
    gpu = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(gpu)}, torch {torch.__version__}, pages of {PAGE}\n")
    print("| context | work | index on the CPU, us | on the GPU, us | faster |\n|---|---|---|---|---|")
    setup = Setup(quick=False, tiny=False, page=PAGE, device=gpu, speed=1.0)
    for context in CONTEXTS:
        start_afresh(setup)
        for (work, host), (_, device) in zip(
            *(measure(setup, where, context) for where in ("cpu", "cuda")), strict=True
        ):
            ratio = device / host
            faster = f"CPU, {ratio:.1f} x" if ratio > 1 else f"GPU, {1 / ratio:.1f} x"
            print(f"| {context} | {work} | {number(host * 1e6)} | {number(device * 1e6)} | {faster} |", flush=True)


if __name__ == "__main__":
    main()
