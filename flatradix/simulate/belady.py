"""Belady's hits: what an eviction finds that knows the future. The yardstick of the other policies.

The definition: requests run in the order of their arrival, one after another, on a cache of (capacity // 512) blocks.
A prompt consists of its whole blocks of 512 tokens; a block is known by all tokens up to its end. A request hits its
longest cached prefix and then caches all of its blocks. Where there is no room, the block goes whose next use is
furthest away, never one of the request itself; of equal ones, the block that lies deeper. A block is used whenever a
block below it is used, so that the cached blocks always form a tree.

Requests hold nothing while they are decoded, and outputs are not cached. An order other than fcfs, and pages smaller
than a block, can find more.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from flatradix.replay.blocks import BLOCK_TOKENS


def hit_tokens(prompts: Iterable[np.ndarray], capacity: int) -> int:
    """Return the tokens that prompts (int32 [length] each) find in a cache of `capacity` tokens."""
    return BLOCK_TOKENS * _hit_blocks(_paths(prompts), capacity // BLOCK_TOKENS)


def _paths(prompts: Iterable[np.ndarray]) -> list[list[int]]:
    """Return the numbers of each prompt's whole blocks, from the root. Equal numbers: equal tokens up to its end."""
    known: dict[tuple[int, bytes], int] = {}
    paths = []
    for prompt in prompts:
        parent, path = -1, []
        for begin in range(0, len(prompt) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            block = prompt[begin : begin + BLOCK_TOKENS].tobytes()
            parent = known.setdefault((parent, hashlib.blake2b(block, digest_size=16).digest()), len(known))
            path.append(parent)
        paths.append(path)
    return paths


def _hit_blocks(paths: Sequence[Sequence[int]], room: int) -> int:
    never = len(paths)
    following = _next_uses(paths, never)
    cached: dict[int, int] = {}  # block: its next use
    heap: list[tuple[int, int, int]] = []  # (-next use, -depth, block); stale where the next use is another
    hits = 0
    for now, path in enumerate(paths):
        found = 0
        while found < len(path) and path[found] in cached:
            found += 1
        hits += found
        cached.update(zip(path, following[now], strict=True))
        _shrink(cached, heap, room, set(path))
        for depth, block in enumerate(path):
            if block in cached:
                heapq.heappush(heap, (-cached[block], -depth, block))
    return hits


def _next_uses(paths: Sequence[Sequence[int]], never: int) -> list[list[int]]:
    """Return, for each block of each request, the number of the next request that uses it; `never` if none does."""
    last: dict[int, int] = {}
    following: list[list[int]] = []
    for now in range(len(paths) - 1, -1, -1):
        following.append([last.get(block, never) for block in paths[now]])
        last.update(dict.fromkeys(paths[now], now))
    return following[::-1]


def _shrink(cached: dict[int, int], heap: list[tuple[int, int, int]], room: int, own: set[int]) -> None:
    """Evict blocks until `room` blocks are left. A request that is larger than the room loses its own last blocks."""
    while len(cached) > room and heap:
        use, _, block = heapq.heappop(heap)
        if block not in own and cached.get(block) == -use:
            del cached[block]
    for block in sorted(own, reverse=True)[: max(0, len(cached) - room)]:
        cached.pop(block, None)
