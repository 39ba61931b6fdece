"""Built-in workloads for use without a trace: synthetic and deterministic, with three patterns of prefix reuse.

chat: conversations. Each turn sends everything before it. All conversations share a few system prompts.
agents: tasks. All tasks of an agent share a long prefix of instructions and tools; a growing log of steps follows.
documents: long documents, a few of them in high demand, each followed by short questions.
mix: a third of each.

Sessions of all kinds run side by side, and their requests are interleaved. So the cached tokens of a session age before
the session's next request. The same arguments give the same tokens everywhere.
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
# The first number of each seed sequence, so that no two streams of random numbers are equal.
_CHOICES, _CHAT, _AGENTS, _DOCUMENTS, _SHARED = range(5)


def prompts(kind: str = "mix", requests: int = 3000, seed: int = 0) -> Iterator[np.ndarray]:
    """Return an iterator over `requests` prompts, int32 [length] each, of a few dozen to about 30,000 tokens.

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
    """The running sessions of one kind. A new session replaces a session that ends."""

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
    """Return random tokens, from `shortest` to `longest` of them."""
    return rng.integers(0, VOCABULARY, rng.integers(shortest, longest + 1)).astype(np.int32)


def _shared(seed: int, kind: int, index: int, shortest: int, longest: int) -> np.ndarray:
    """Return text `index` of the texts that sessions of one kind share."""
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
    favoured = int(rng.integers(0, DOCUMENTS, 3).min())  # the first tenth of the documents gets a quarter of sessions
    document = _shared(seed, _DOCUMENTS, favoured, 2000, 24000)
    for _ in range(rng.integers(1, 7)):
        yield np.concatenate([document, _text(rng, 15, 80)])


_BEGINNINGS: dict[str, Callable[[int, int], Session]] = {
    "chat": _chat,
    "agents": _agent,
    "documents": _document,
}
