"""Questions on long documents: how many tokens a prefix cache leaves to compute where the pool is tight.

400 questions of 64 tokens on ten documents of 16,000 tokens, each on a random one of the ten, one request at a time.
All documents need 160,000 slots. PrefixCache runs with evictions by node and by page, and vLLM's own manager beside it
where its wheel is unpacked (bench/support/vllm_manager.py).

  python3 -m bench.documents            about half a minute
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from bench.support.sglang_trees import PeerMissing
from bench.support.vllm_manager import Manager
from flatradix import PrefixCache

DOCUMENTS, LENGTH, QUESTIONS, QUESTION, PAGE = 10, 16_000, 400, 64, 16
POOLS = (155_000, 130_000, 80_000)
NAMES = ("PrefixCache by node", "PrefixCache by page", "vLLM's manager")


def prompts(seed: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(seed)
    documents = random.integers(0, 100_000, (DOCUMENTS, LENGTH))
    for _ in range(QUESTIONS):
        yield np.concatenate([documents[random.integers(DOCUMENTS)], random.integers(0, 100_000, QUESTION)])


def by(unit: str, slots: int, seed: int) -> int:
    """Return the tokens that PrefixCache leaves to compute."""
    cache = PrefixCache(slots, PAGE, 1, LENGTH + QUESTION, evict_by=unit)
    for prompt in prompts(seed):
        cache.finish(cache.begin([prompt]))
    counts = cache.counts()
    return counts.prompt_tokens - counts.cached_tokens


def by_vllm(slots: int, seed: int) -> int:
    manager = Manager(slots, PAGE, LENGTH + QUESTION)
    return sum(len(prompt) - manager.serve(prompt) for prompt in prompts(seed))


def row(name: str, found: Sequence[str]) -> str:
    return f"{name:22}" + "".join(f"{text:>15}" for text in found)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.documents", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the documents and questions (default: %(default)s)")
    seed = parser.parse_args().seed
    print(row("tokens to compute", [f"{slots:,} slots" for slots in POOLS]))
    counts = partial(by, "node"), partial(by, "page"), by_vllm
    for name, count in zip(NAMES, counts, strict=True):
        try:
            print(row(name, [f"{count(slots, seed):,}" for slots in POOLS]), flush=True)
        except PeerMissing as reason:
            print(f"{name}: {reason}")


if __name__ == "__main__":
    main()
