"""An engine on a RadixTree with slots of its own, as SGLang's: it matches, locks, evicts, inserts, and reads slots."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch

import flatradix
from bench.soak.cache_engine import Sizes
from bench.soak.conversations import Conversations
from bench.soak.times import Times

NAMES = (
    "tree.match", "tree.evict", "tree.insert", "tree.lock", "tree.unlock", "tree.slots", "tree.split", "tree.rematch",
)  # fmt: skip
BATCH, HELD = 4, 6


class Held(NamedTuple):
    """A batch whose requests run. places: where their locks end."""

    places: Any
    talks: np.ndarray


class TreeEngine:
    """free: the slots that nobody has, a stack of `count` values."""

    def __init__(self, random: np.random.Generator, device: str, sizes: Sizes, times: Times) -> None:
        self.random, self.page, self.timed = random, sizes.page, times.timed
        self.talks = Conversations(random, sizes.conversations, sizes.longest)
        self.tree = flatradix.RadixTree(sizes.slots, sizes.page, device)
        self.free = np.arange(sizes.slots, dtype=np.int32)
        self.count = sizes.slots
        self.held: deque[Held] = deque()
        self.evicted = 0

    def step(self) -> None:
        if len(self.held) == HELD:
            self.release()
        chosen = self.talks.pick(BATCH)
        keys = [self.talks.turn(one) for one in chosen]
        if not keys:
            return
        names = [self.talks.tenant(int(one)) for one in chosen]
        found = self.timed("tree.match", self.tree.match, keys, names, lock=True)
        cached = found.host_lengths.tolist()
        ends = [len(key) // self.page * self.page for key in keys]
        self.make_room(sum(ends) - sum(cached))
        slots = [self.take(end - length) for end, length in zip(ends, cached, strict=True)]
        rest = [key[length:end] for key, length, end in zip(keys, cached, ends, strict=True)]
        new = self.timed("tree.insert", self.tree.insert, rest, slots, names, start=found)
        for own, length, before in zip(slots, cached, new.prefix_lengths.tolist(), strict=True):
            self.give(own[: before - length])  # another key of the batch has brought these tokens
        self.timed("tree.lock", self.tree.lock, new)
        self.timed("tree.unlock", self.tree.unlock, found)
        self.timed("tree.slots", self.tree.slots, new)
        if self.random.random() < 0.1:
            self.look_again(keys, names, new)
        self.held.append(Held(new, chosen))

    def look_again(self, keys: list[np.ndarray], names: list[str], places: Any) -> None:
        """Match keys from where they ended, and split the edges of shorter ones."""
        again = self.timed("tree.rematch", self.tree.rematch, keys, places, names)
        assert again.lengths.tolist() == places.lengths.tolist(), "a key that was inserted and locked is not found"
        parts = self.tree.match([key[: len(key) // 2] for key in keys], names)
        self.timed("tree.split", self.tree.split, parts)

    def release(self) -> None:
        old = self.held.popleft()
        self.timed("tree.unlock", self.tree.unlock, old.places)
        self.talks.busy[old.talks] = False

    def make_room(self, needed: int) -> None:
        while self.count < needed:
            freed = self.timed("tree.evict", self.tree.evict, needed - self.count)
            self.evicted += freed.num_tokens
            self.give(freed.slots.cpu().numpy())
            if self.count < needed:
                self.release()

    def take(self, count: int) -> np.ndarray:
        self.count -= count
        return self.free[self.count : self.count + count].copy()

    def give(self, slots: np.ndarray) -> None:
        self.free[self.count : self.count + len(slots)] = slots
        self.count += len(slots)

    @property
    def occupancy(self) -> float:
        return self.tree.total_tokens / self.tree.max_tokens  # type: ignore[operator]

    def check(self) -> None:
        """Check the tree, and that each slot is either free or cached, once. Raises AssertionError."""
        self.tree.check()
        content = self.tree.content()
        live = content.live()
        ranges = zip(content.column("start")[live].tolist(), content.column("length")[live].tolist(), strict=True)
        cached = [content.slots[begin : begin + length] for begin, length in ranges]
        every = np.sort(np.concatenate([self.free[: self.count], *cached]))
        assert np.array_equal(every, np.arange(len(self.free))), "a slot is lost, or in two places"
        torch.testing.assert_close(self.tree.total_tokens, len(self.free) - self.count)
