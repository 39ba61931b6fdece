"""What is asked of one server. Each scenario returns rows: what was asked, and what came back.

A row of an answer has `ids` or `texts`, `cached` and `prompt` (both in tokens). A row of a refusal has `status` and
`said`. A row with `error` means that the server gave no answer, or a wrong one.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx

from tests.sglang_server.server import Server
from tests.sglang_server.talks import Load, Talk, Turn, draw_tokens, draw_turns, greedy, request

Row = dict[str, Any]
TURNS_BETWEEN_FLUSHES = 60


def client_of(server: Server, connections: int = 10) -> httpx.Client:
    return httpx.Client(
        base_url=server.url, timeout=300, limits=httpx.Limits(max_connections=connections), trust_env=False
    )


def answer_row(answer: dict[str, Any]) -> Row:
    meta = answer["meta_info"]
    # A request that was aborted while it waited has no tokens.
    row = {"ids": answer.get("output_ids"), "cached": meta.get("cached_tokens", 0), "prompt": meta.get("prompt_tokens")}
    row["ended"] = (meta["finish_reason"] or {}).get("type")
    row["retractions"] = meta.get("num_retractions", 0)
    if "input_token_logprobs" in meta:
        row["logprobs"] = len(meta["input_token_logprobs"])
        row["last_ids"] = [entry[1] for entry in meta["input_token_logprobs"][-5:]]
    return row


def reply_rows(reply: httpx.Response) -> list[Row]:
    """Return a row for each answer of a reply, or one for its refusal."""
    try:
        answers = reply.json()
    except json.JSONDecodeError:
        return [{"error": f"status {reply.status_code}: {reply.text[:200]}"}]
    answers = answers if isinstance(answers, list) else [answers]
    if reply.status_code != 200 or any("meta_info" not in answer for answer in answers):
        return [{"status": reply.status_code, "said": str(answers)[:200]}]
    return [answer_row(answer) for answer in answers]


def one_by_one(server: Server, load: Load) -> list[Row]:
    """Turns one after another, with a flush now and then: both caches must find the same."""
    rows: list[Row] = []
    with client_of(server) as client:
        for turn in draw_turns(load):
            if turn.number and turn.number % TURNS_BETWEEN_FLUSHES == 0:
                rows.append({"asked": "flush", "status": client.post("/flush_cache").status_code})
            body = request(turn, load)
            found = reply_rows(client.post("/generate", json=body))
            rows += [{"asked": f"turn {turn.number}", **row} for row in found]
            if turn.repeats:
                again = body | {"input_ids": turn.prompt[: max(1, len(turn.prompt) * 2 // 3)]}
                answers = reply_rows(client.post("/generate", json=again))
                rows += [{"asked": f"again {turn.number}", **row} for row in answers]
            turn.talk.history = turn.prompt + (found[0].get("ids") or [])
    return rows


def all_at_once(server: Server, load: Load) -> list[Row]:
    """Many talks at a time; some answers are streamed, and some clients give up. Every request must be answered."""
    talks = list({turn.talk.number: turn.talk for turn in draw_turns(load)}.values())
    with client_of(server, 4 * load.at_once) as client, ThreadPoolExecutor(load.at_once) as pool:
        rows = [row for found in pool.map(lambda talk: _talk(client, talk, load), talks) for row in found]
    return sorted(rows, key=lambda row: row["number"])


def _talk(client: httpx.Client, talk: Talk, load: Load) -> list[Row]:
    rows = []
    for turn in talk.turns:
        try:
            row = _ask(client, turn, load)
        except httpx.HTTPError as error:
            row = {"error": repr(error)[:200]}
        rows.append({"asked": f"turn {turn.number}", "number": turn.number, **row})
        if not turn.streams and row.get("ids"):
            talk.history = turn.prompt + row["ids"]
    return rows


def _ask(client: httpx.Client, turn: Turn, load: Load) -> Row:
    body = request(turn, load)
    if turn.aborts_after is not None:
        return _give_up(client, turn, body)
    if not turn.streams:
        row = reply_rows(client.post("/generate", json=body))[0]
    else:
        body["sampling_params"]["n"] = 1
        *_, last = [{}, *_stream(client, body)]
        row = answer_row(last) if "meta_info" in last else {"error": f"the stream ended with {str(last)[:200]}"}
    if "said" in row:
        return {"error": row["said"]}
    return row


def _stream(client: httpx.Client, body: dict[str, Any]) -> Any:
    with client.stream("POST", "/generate", json=body | {"stream": True}) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def _give_up(client: httpx.Client, turn: Turn, body: dict[str, Any]) -> Row:
    """Close the stream of a long answer after some tokens; after none, abort the request by its id."""
    body |= {"rid": f"gone-{turn.number}", "sampling_params": greedy(60)}
    seen = 0
    for _ in _stream(client, body):
        if turn.aborts_after == 0 and seen == 0:
            client.post("/abort_request", json={"rid": body["rid"]})
        seen += 1
        if seen > turn.aborts_after:
            break
    return {"aborted": True}


def chats(server: Server, load: Load, turns: int = 4) -> list[Row]:
    """Chats over OpenAI's interface, with a common system prompt; the usage tells the cached tokens."""
    rng = random.Random(load.seed)
    rows: list[Row] = []
    system = _words(rng, 80)
    with client_of(server) as client:
        for number in range(min(6, load.turns // turns)):
            more = {3: {"cache_salt": "salt"}, 4: {"extra_key": "adapter"}}.get(number, {})
            messages = [{"role": "system", "content": system}]
            for turn in range(turns):
                messages.append({"role": "user", "content": _words(rng, rng.choice([3, 30, 70]))})
                body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
                body["n"] = 2 if turn == 2 else 1
                reply = client.post("/v1/chat/completions", json=body | more)
                row = {"asked": f"chat {number}, turn {turn}", **_chat_row(reply)}
                rows.append(row)
                messages.append({"role": "assistant", "content": row.get("texts", ["w5"])[0]})
    return rows


def _chat_row(reply: httpx.Response) -> Row:
    if reply.status_code != 200:
        return {"error": f"status {reply.status_code}: {reply.text[:200]}"}
    answer = reply.json()
    usage = answer["usage"]
    return {
        "texts": [choice["message"]["content"] for choice in answer["choices"]],
        "cached": (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        "prompt": usage["prompt_tokens"],
    }


def _words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(10, 20_000)}" for _ in range(count))


def sessions(server: Server, load: Load) -> list[Row]:
    """A session of which SGLang keeps the text, and one of which it would keep KV rows: refused without an option."""
    rng = random.Random(load.seed)
    session = server.post("/open_session", {"capacity_of_str_len": 2000}).json()
    rows: list[Row] = []
    last = None
    for turn in range(4):
        place = {"id": session, "rid": last}
        body = {
            "input_ids": draw_tokens(rng, 30 if turn else 80),
            "session_params": place,
            "sampling_params": greedy(8),
        }
        reply = server.post("/generate", body)
        last = reply.json().get("meta_info", {}).get("id")
        rows += [{"asked": f"session, turn {turn}", **row} for row in reply_rows(reply)]
    rows.append({"asked": "close", "status": server.post("/close_session", {"session_id": session}).status_code})
    reply = server.post("/open_session", {"capacity_of_str_len": 2000, "streaming": True})
    rows.append({"asked": "streaming session", "status": reply.status_code, "opened": reply.status_code == 200})
    return rows


def pauses(server: Server, load: Load) -> list[Row]:
    """Pauses that retract or abort what runs, flushes in a pause and when busy, aborts of all. All must end."""
    turns = draw_turns(load._replace(turns=24))
    rows = []
    with client_of(server, 64) as client, ThreadPoolExecutor(32) as pool:
        for mode, action in (
            ("retract", "/flush_cache"), ("in_place", "/flush_cache"), ("retract", ""), ("abort", ""),
            ("", "/flush_cache"), ("retract", "/abort_request"), ("", "/abort_request"),
        ):  # fmt: skip
            asked = [pool.submit(_long, client, turn, load) for turn in turns]
            time.sleep(0.4)
            rows.append({"asked": f"pause {mode or 'none'}, then {action or 'nothing'}"})
            rows[-1]["did"] = _pause(client, mode, action)
            rows[-1] |= _ended(asked)
    return rows


def _long(client: httpx.Client, turn: Turn, load: Load) -> Row:
    body = request(turn, load) | {"sampling_params": greedy(50)}
    return reply_rows(client.post("/generate", json=body))[0]


def _pause(client: httpx.Client, mode: str, action: str) -> list[int]:
    """Pause, act and go on. Return the status of each, but of a flush: whether that is refused is a matter of time."""
    found = []
    if mode:
        found.append(client.post("/pause_generation", json={"mode": mode}).status_code)
    if action == "/abort_request":
        found.append(client.post(action, json={"abort_all": True}).status_code)
    elif action:
        client.post(action)
    if mode:
        found.append(client.post("/continue_generation", json={}).status_code)
    return found


def _ended(asked: list[Future[Row]]) -> Row:
    """Return how many of the requests have ended, and the first error of one that has not."""
    row: Row = {"answered": 0}
    for future in asked:
        try:
            found = future.result()
        except httpx.HTTPError as error:
            found = {"error": repr(error)[:200]}
        if "error" in found:
            row.setdefault("error", found["error"])
        row["answered"] += "error" not in found
    return row


Scenario = Callable[[Server, Load], list[Row]]
