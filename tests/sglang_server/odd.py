"""What clients should not send, and may: odd ids, keys, priorities, lengths and options."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx

from tests.sglang_server.scenarios import Row, client_of, reply_rows
from tests.sglang_server.server import Server
from tests.sglang_server.talks import Load, draw_tokens, greedy
from tests.sglang_server.tiny_model import VOCABULARY

# Ids that flatradix does not cache (docs/sglang.md); those between here and the vocabulary are cached as any other.
_BEYOND = (-1, 2**31, 2**62)
_LONG = 9_000
_HEADERS = {"Content-Type": "application/json"}


def odd_requests(server: Server, load: Load) -> list[Row]:
    """Ask one by one. `beyond`: the prompt holds ids that flatradix does not cache, so it may find less."""
    rng = random.Random(load.seed)
    rows: list[Row] = []
    with client_of(server) as client:
        for number, case in enumerate(_cases(rng, negative=server.listener is None)):
            beyond = any(at in _BEYOND for at in case.get("input_ids", []) if isinstance(at, int))
            try:
                # Not json=...: strings that are no text must be sent too, as escapes.
                body = json.dumps({"sampling_params": greedy(6), **case})
                found = reply_rows(client.post("/generate", content=body, headers=_HEADERS))
            except httpx.HTTPError as error:
                found = [{"error": repr(error)[:200]}]
            rows += [{"asked": f"odd {number}", "beyond": beyond, **row} for row in found]
            if any("error" in row for row in found) and not server.is_healthy:
                return [*rows, {"asked": f"odd {number}", "error": "the server has ended"}]
    return rows


def _cases(rng: random.Random, negative: bool) -> Iterator[dict[str, Any]]:
    """negative: with ids below 0. Where KV events are published, they end SGLang's default cache."""
    base = draw_tokens(rng, 100)
    for ids in (base, base, base[:1], [5], [], base + [0] * 3):
        yield {"input_ids": ids}
    for odd in (VOCABULARY + 5, 2**31 - 1, *_BEYOND):
        for more in (20, 25) if odd >= 0 or negative else ():
            yield {"input_ids": [*base[:50], odd, *base[:more]]}
    yield from _namespaces(base)
    for priority in (-5, 2**40, 2**63 - 1):
        yield {"input_ids": base, "priority": priority}
    yield {"input_ids": base + base, "priority": 2**63}
    yield {"input_ids": base + base[:40], "priority": 2**70}
    yield {"input_ids": base, "sampling_params": {"max_new_tokens": 0}}
    yield {"input_ids": base + base, "sampling_params": greedy(1)}
    for start in (0, 99, -1, 50):
        yield {"input_ids": base, "return_logprob": True, "logprob_start_len": start}
    yield {"input_ids": [base, base[:60], base + base], "sampling_params": [greedy(3)] * 3}
    yield {"input_ids": base * 3, "sampling_params": greedy(5, n=6)}
    yield {"input_ids": draw_tokens(rng, _LONG)}
    yield {"text": "w5 w6 w7 " * 40}
    yield {"text": "w5 w6 w7 " * 40 + "w9"}
    for option in ({"lora_path": "none"}, {"routing_key": "k"}, {"bootstrap_room": 3}, {"return_hidden_states": True}):
        yield {"input_ids": base, **option}


def _namespaces(base: list[int]) -> Iterator[dict[str, Any]]:
    """Pairs of extra key and salt that must not be taken for one another, and strings that are no text."""
    strange = "\u00e9\u4e2d\U0001f600"
    for key, salt in (
        (strange, None), (strange, None), ("\0", "x" * 5000), ("\0", "x" * 5000), ("a", "b"), ("ab", None),
        (None, "ab"), ("a", "b"), ("\ud800", None), (None, "\ud800"),
    ):  # fmt: skip
        case: dict[str, Any] = {"input_ids": base}
        if key is not None:
            case["extra_key"] = key
        if salt is not None:
            case["cache_salt"] = salt
        yield case
