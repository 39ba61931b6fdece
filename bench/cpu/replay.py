"""Rows: the replay of a trace, and the time that each tree takes for it.

For each request:

1. unlock the path of the request that came HOLD + 1 requests before;
2. match the prompt, lock the match, and read its slots;
3. if the rest of the prompt does not fit, evict the number of tokens that are missing;
4. if the rest fits, insert it where the match ends, and lock the inserted path;
5. unlock the match.

SGLang's insert gets the whole key and the length of the match (`prev_prefix_len`), as from SGLang's scheduler.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.support import sglang_trees
from bench.support.harness import Measured, Row, Setup, slot_range
from bench.support.workloads import read_prompts
from flatradix import RadixTree

REQUESTS, QUICK_REQUESTS = 3000, 500
PAGE = 64
HOLD = 32
# The first call of a kernel reads its machine code from disk. The warm-up keeps these calls out of the time.
WARM_UP, WARM_UP_CAPACITY = 100, 200_000


def _shortage(cached: int, capacity: int, prompt: int, matched: int) -> int:
    """Return how many tokens to evict before the prompt's whole pages fit; 0 or less if they fit."""
    return cached + prompt // PAGE * PAGE - matched - capacity


class Ours:
    def __init__(self, tree: RadixTree, capacity: int) -> None:
        self.tree = tree
        self.capacity = capacity
        self.held: deque[Any] = deque()
        self.seconds = 0.0
        self.hits = 0

    def serve(self, prompt: array[int], slots: torch.Tensor) -> None:
        tree = self.tree
        start = time.perf_counter()
        if len(self.held) > HOLD:
            released = self.held.popleft()
            if released is not None:
                tree.unlock(released)
        match = tree.match(prompt, lock=True)
        length = match.length
        tree.slots(match)
        if (short := _shortage(tree.total_tokens, self.capacity, len(prompt), length)) > 0:
            tree.evict(short)
        if _shortage(tree.total_tokens, self.capacity, len(prompt), length) > 0:
            tree.unlock(match)
            self.held.append(None)
        else:
            inserted = tree.insert(memoryview(prompt)[length:], slots[length:], start=match)
            tree.lock(inserted)
            tree.unlock(match)
            self.held.append(inserted)
        self.seconds += time.perf_counter() - start
        self.hits += length


class Theirs:
    def __init__(self, tree: sglang_trees.RustTree, capacity: int) -> None:
        self.tree = tree
        self.capacity = capacity
        self.held: deque[Any] = deque()
        self.seconds = 0.0
        self.hits = 0

    def serve(self, prompt: array[int], slots: torch.Tensor) -> None:
        cache, classes = self.tree.cache, self.tree.classes
        start = time.perf_counter()
        if len(self.held) > HOLD:
            released = self.held.popleft()
            if released is not None:
                cache.unlock(released)
        key = classes.RadixKey(prompt)
        match = cache.match_prefix(classes.MatchPrefixParams(key=key))
        length = match.device_prefix_len
        lock = cache.lock(match.last_device_node)
        cache.path_device_indices(match.last_device_node)
        cached = cache.evictable_size() + cache.protected_size()
        if (short := _shortage(cached, self.capacity, len(prompt), length)) > 0:
            cache.evict(classes.EvictParams(num_tokens=short))
            cached = cache.evictable_size() + cache.protected_size()
        if _shortage(cached, self.capacity, len(prompt), length) > 0:
            cache.unlock(lock)
            self.held.append(None)
        else:
            params = classes.InsertParams(key=key, value=slots, prev_prefix_len=length)
            inserted = cache.insert(params)
            self.held.append(cache.lock(inserted.last_device_node))
            cache.unlock(lock)
        self.seconds += time.perf_counter() - start
        self.hits += length


def _replay(capacity: int, setup: Setup) -> Measured:
    """Replay the trace on both trees; which tree serves a request first alternates.

    The tokens are read before each timed call: a scheduler has just received them, so they are in the CPU's cache.
    """
    assert setup.trace is not None
    prompts = read_prompts(setup.trace, QUICK_REQUESTS if setup.quick else REQUESTS)
    _serve(prompts[:WARM_UP], WARM_UP_CAPACITY, setup)
    ours, theirs = _serve(prompts, capacity, setup)
    note = f"{len(prompts)} requests, {ours.hits / sum(map(len, prompts)):.1%} of the prompt tokens found"
    if theirs is None:
        return Measured(ours.seconds, None, note)
    assert ours.hits == theirs.hits
    return Measured(ours.seconds, theirs.seconds, note)


def _serve(prompts: list[array[int]], capacity: int, setup: Setup) -> tuple[Ours, Theirs | None]:
    ours = Ours(setup.tree(capacity, PAGE), capacity)
    rust = setup.rust(PAGE)
    theirs = None if rust is None else Theirs(rust, capacity)
    pool = slot_range(max(map(len, prompts)))
    sides = [side for side in (ours, theirs) if side is not None]
    for prompt in prompts:
        for side in sides:
            np.frombuffer(prompt, dtype=np.int64).max()
            side.serve(prompt, pool[: len(prompt)])
        sides.reverse()
    return ours, theirs


def _row(millions: int) -> Row:
    work = f"replay of trace requests, capacity {millions}M tokens"
    return Row(f"replay-{millions}m", work, "ms", 0.4, partial(_replay, millions * 1_000_000), needs_trace=True)


ROWS = [_row(1), _row(8)]
