"""A workload for when there is no trace: deterministic, made up, in the three shapes in which prefixes come back.

chat: conversations; each turn sends all that came before it. Few system prompts, shared by all.
agents: tasks; a long prefix of instructions and tools shared by all tasks of one agent, then a growing log of steps.
documents: long documents, a few of them much asked for, with short questions behind each.
mix: a third of each.

Sessions of all kinds run side by side and their requests are interleaved, so that what a session left in the cache
ages before it comes back. The same arguments give the same tokens everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from flatradix.replay.traces import VOCABULARY

KINDS = ("mix", "chat", "agents", "documents")
SESSIONS = 24  # running at the same time, of each kind
SYSTEM_PROMPTS = 3
AGENTS = 12
DOCUMENTS = 120

Session = Iterator[np.ndarray]
# The first number of a seed sequence, so that no two streams of random numbers are the same.
_CHOICES, _CHAT, _AGENTS, _DOCUMENTS, _SHARED = range(5)


def prompts(kind: str = "mix", requests: int = 3000, seed: int = 0) -> Iterator[np.ndarray]:
    """`requests` prompts, int32 [length] each, of a few dozen to some 30,000 tokens.

    Raises ValueError for an unknown kind or a negative number.
    """
    if kind not in KINDS:
        raise ValueError(f"workload {kind!r} is unknown: one of {', '.join(KINDS)}")
    if requests < 0 or seed < 0:
        raise ValueError(f"requests ({requests}) and seed ({seed}) must be 0 or more")
    return _interleave(kind, requests, seed)


def _interleave(kind: str, requests: int, seed: int) -> Iterator[np.ndarray]:
    choices = np.random.default_rng([_CHOICES, seed])
    streams = [_Stream(name, seed) for name in ("chat", "agents", "documents") if kind in ("mix", name)]
    for _ in range(requests):
        stream = streams[choices.integers(len(streams))]
        yield stream.next_prompt(int(choices.integers(SESSIONS)))


class _Stream:
    """The running sessions of one kind; one that ends is followed by a new one."""

    def __init__(self, name: str, seed: int) -> None:
        self._begin = _BEGINNINGS[name]
        self._seed = seed
        self._begun = 0
        self._running = [self._next_session() for _ in range(SESSIONS)]

    def _next_session(self) -> Session:
        self._begun += 1
        return self._begin(self._seed, self._begun)

    def next_prompt(self, place: int) -> np.ndarray:
        prompt = next(self._running[place], None)
        while prompt is None:
            self._running[place] = self._next_session()
            prompt = next(self._running[place], None)
        return prompt


def _text(rng: np.random.Generator, shortest: int, longest: int) -> np.ndarray:
    """Random tokens of a length between the two."""
    return rng.integers(0, VOCABULARY, rng.integers(shortest, longest + 1)).astype(np.int32)


def _shared(seed: int, kind: int, index: int, shortest: int, longest: int) -> np.ndarray:
    """The text number `index` that sessions of one kind have in common."""
    return _text(np.random.default_rng([_SHARED, seed, kind, index]), shortest, longest)


def _chat(seed: int, number: int) -> Session:
    rng = np.random.default_rng([_CHAT, seed, number])
    conversation = _shared(seed, _CHAT, int(rng.integers(SYSTEM_PROMPTS)), 300, 1200)
    for _ in range(rng.integers(2, 13)):
        conversation = np.concatenate([conversation, _text(rng, 20, 300)])
        yield conversation
        conversation = np.concatenate([conversation, _text(rng, 50, 600)])


def _agent(seed: int, number: int) -> Session:
    rng = np.random.default_rng([_AGENTS, seed, number])
    log = np.concatenate([_shared(seed, _AGENTS, int(rng.integers(AGENTS)), 1500, 6000), _text(rng, 100, 800)])
    for _ in range(rng.integers(4, 21)):
        yield log
        log = np.concatenate([log, _text(rng, 30, 200), _text(rng, 50, 1500)])


def _document(seed: int, number: int) -> Session:
    rng = np.random.default_rng([_DOCUMENTS, seed, number])
    favoured = int(rng.integers(0, DOCUMENTS, 3).min())  # the first tenth takes a quarter of the sessions
    document = _shared(seed, _DOCUMENTS, favoured, 2000, 24000)
    for _ in range(rng.integers(1, 7)):
        yield np.concatenate([document, _text(rng, 15, 80)])


_BEGINNINGS: dict[str, Callable[[int, int], Session]] = {
    "chat": _chat,
    "agents": _agent,
    "documents": _document,
}
