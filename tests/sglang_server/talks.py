"""What clients ask for: talks of several turns that share system prompts, drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.sglang_server.tiny_model import VOCABULARY


class Load(NamedTuple):
    """How much is asked for.

    longer: answers so many times longer, and more talks. aborts: the share of requests that clients give up.
    """

    turns: int = 90
    at_once: int = 32
    seed: int = 0
    longer: int = 1
    aborts: float = 0.1
    priorities: bool = False
    session_ids: bool = False


@dataclass
class Talk:
    """One conversation. history: the token ids of all turns so far."""

    number: int
    history: list[int]
    extra_key: str | None = None
    cache_salt: str | None = None
    turns: list[Turn] = field(default_factory=list)


class Turn(NamedTuple):
    """One request of a talk. repeats: the first two thirds of its prompt are asked for once more."""

    number: int
    talk: Talk
    added: list[int]
    new_tokens: int
    logprob_start: int | None
    answers: int
    repeats: bool
    streams: bool
    aborts_after: int | None
    priority: int

    @property
    def prompt(self) -> list[int]:
        return self.talk.history + self.added


def draw_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, VOCABULARY) for _ in range(count)]


def draw_turns(load: Load, longest: int = 700) -> list[Turn]:
    """Draw turns in the order of their requests. A talk ends once its history is longer than `longest`."""
    rng = random.Random(load.seed)
    systems = [draw_tokens(rng, rng.choice([17, 64, 130, 257])) for _ in range(4)]
    live: list[Talk] = []
    turns: list[Turn] = []
    planned: dict[int, int] = {}
    while len(turns) < load.turns:
        if live and rng.random() < (0.55 if load.longer == 1 else 0.25):
            talk = rng.choice(live)
        else:
            talk = Talk(
                number=len(turns),
                history=list(rng.choice(systems)),
                extra_key=rng.choice([*[None] * 5, "adapter", ""]),
                cache_salt=rng.choice([*[None] * 5, "salt", "pepper"]),
            )
            planned[talk.number] = len(talk.history)
            live.append(talk)
        turn = _draw_turn(rng, load, len(turns), talk)
        talk.turns.append(turn)
        turns.append(turn)
        planned[talk.number] += len(turn.added) + turn.new_tokens
        if planned[talk.number] > longest:
            live.remove(talk)
    return turns


def _draw_turn(rng: random.Random, load: Load, number: int, talk: Talk) -> Turn:
    return Turn(
        number=number,
        talk=talk,
        added=draw_tokens(rng, rng.choice([1, 5, 16, 40, 150])),
        new_tokens=rng.choice([1, 4, 16, 33]) * load.longer,
        logprob_start=rng.choice([0, 5, 15]) if rng.random() < 0.15 else None,
        answers=2 if rng.random() < 0.08 else 1,
        repeats=rng.random() < 0.08,
        streams=rng.random() < 0.3,
        aborts_after=rng.randint(0, 6) if rng.random() < load.aborts else None,
        priority=rng.choice([0, 1, 5]),
    )


def request(turn: Turn, load: Load) -> dict[str, Any]:
    """Return the body of a /generate request for a turn."""
    body: dict[str, Any] = {"input_ids": turn.prompt, "sampling_params": greedy(turn.new_tokens, n=turn.answers)}
    if turn.talk.extra_key is not None:
        body["extra_key"] = turn.talk.extra_key
    if turn.talk.cache_salt is not None:
        body["cache_salt"] = turn.talk.cache_salt
    if turn.logprob_start is not None:
        body |= {"return_logprob": True, "logprob_start_len": turn.logprob_start}
    if load.session_ids:
        body["session_id"] = f"session-{turn.talk.number}"
    if load.priorities:
        body["priority"] = turn.priority
    return body


def greedy(new_tokens: int, **more: Any) -> dict[str, Any]:
    """Return sampling parameters for exactly `new_tokens` tokens, the likeliest ones."""
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, **more}
