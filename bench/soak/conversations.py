"""Conversations of many turns behind a few system prompts: what the engines of a soak serve. Memory of a fixed size."""

from __future__ import annotations

import numpy as np

VOCABULARY = 100_000
SYSTEMS, TENANTS = 8, 4


class Conversations:
    """`count` conversations of at most `longest` tokens. One that is full begins anew behind its system prompt.

    tokens: int32 [count + 1, longest]; the last row belongs to nobody. lengths: int64 [count + 1].
    """

    def __init__(self, random: np.random.Generator, count: int, longest: int) -> None:
        self.random = random
        self.count, self.longest = count, longest
        self.message, self.answer, self.system = longest // 20, longest // 40, longest // 8
        self.tokens = random.integers(0, VOCABULARY, (count + 1, longest), dtype=np.int32)
        systems = random.integers(0, VOCABULARY, (SYSTEMS, self.system), dtype=np.int32)
        self.tokens[:, : self.system] = systems[np.arange(count + 1) % SYSTEMS]
        self.lengths = np.full(count + 1, self.system)
        self.busy = np.zeros(count + 1, bool)
        popular = 1 / (np.arange(count) + 10)
        self._shares = random.permutation(popular / popular.sum())

    def pick(self, count: int) -> np.ndarray:
        """Choose conversations that have no request, some much more often than others. They are busy from now on."""
        chosen = self.random.choice(self.count, count, replace=False, p=self._shares)
        chosen = chosen[~self.busy[chosen]]
        self.busy[chosen] = True
        return chosen

    def turn(self, one: int) -> np.ndarray:
        """Return the prompt of a conversation's next turn."""
        more = int(self.random.integers(1, self.message))
        if self.lengths[one] + more + self.answer >= self.longest:
            self.lengths[one] = self.system
            rest = self.tokens[one, self.system :]
            rest[:] = self.random.integers(0, VOCABULARY, len(rest))
        self.lengths[one] += more
        return self.tokens[one, : self.lengths[one]].copy()

    def append(self, ones: np.ndarray, tokens: np.ndarray) -> None:
        """Append a token of its answer to each conversation."""
        self.tokens[ones, self.lengths[ones]] = tokens
        self.lengths[ones] += 1
        self.lengths[self.count] = 0

    @staticmethod
    def tenant(one: int) -> str:
        return f"tenant {one % TENANTS}"
