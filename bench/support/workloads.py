"""Keys and trees for the benchmarks."""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path

import numpy as np
import torch

from bench.support import sglang_trees
from bench.support.harness import Setup, slot_range
from flatradix import RadixTree
from flatradix.replay import traces
from flatradix.replay.traces import VOCABULARY


def random_key(tokens: int, seed: int = 1) -> array[int]:
    """Return int64 token ids, uniform over the vocabulary."""
    return array("q", np.random.default_rng(seed).integers(0, VOCABULARY, tokens).tobytes())


class Both:
    """Our tree and SGLang's default tree, with equal content. theirs: None without SGLang."""

    def __init__(self, setup: Setup, max_tokens: int, page_size: int) -> None:
        self.ours: RadixTree = setup.tree(max_tokens, page_size)
        self.theirs: sglang_trees.RustTree | None = setup.rust(page_size)

    def insert(self, key: array[int], slots: torch.Tensor | None = None) -> None:
        slots = slot_range(len(key)) if slots is None else slots
        self.ours.insert(key, slots)
        if self.theirs is not None:
            self.theirs.insert(key, slots)

    def insert_edges(self, key: array[int], lengths: list[int]) -> None:
        """Cache `key` as a path of edges of these lengths, whose sum is the length of the key."""
        for end in itertools.accumulate(lengths):
            self.insert(key[:end])

    def fill_leaves(self, leaves: int, tokens: int) -> None:
        """Cache `leaves` keys of `tokens` tokens each, all with different first pages."""
        for first in range(0, leaves, 10_000):
            keys = distinct_keys(first, min(10_000, leaves - first), tokens)
            slots = slot_range(keys.size, first * tokens).reshape(keys.shape)
            self.ours.insert(list(keys), list(slots))
            if self.theirs is not None:
                for key, own in zip(keys, slots, strict=True):
                    self.theirs.insert(array("q", key.tobytes()), own)


def distinct_keys(first: int, count: int, tokens: int) -> np.ndarray:
    """Return random keys, int64 [count, tokens]. The first two tokens of each encode its number, from `first` on."""
    keys = np.random.default_rng(first).integers(0, VOCABULARY, (count, tokens))
    numbers = np.arange(first, first + count)
    keys[:, 0] = numbers % VOCABULARY
    keys[:, 1] = numbers // VOCABULARY
    return keys


def read_prompts(trace: Path, count: int) -> list[array[int]]:
    """Return the prompts of the first `count` requests of a trace, int64."""
    return [array("q", prompt.astype(np.int64).tobytes()) for prompt in traces.prompts(traces.read_trace(trace, count))]
