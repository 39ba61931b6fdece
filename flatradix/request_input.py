"""Reading what callers pass to a PrefixCache; all of it is checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flatradix import namespaces as names_of
from flatradix.arguments import per_query
from flatradix.buffers import is_single, read_one
from flatradix.meta import MAX_TOKEN
from flatradix.request import RUNNING, Request

if TYPE_CHECKING:
    from flatradix.prefix_cache import PrefixCache


def _token_ids(sequence: Any, query: int) -> np.ndarray:
    """A copy, int64."""
    values = np.array(read_one(sequence, "tokens", query)[3], np.int64)
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= MAX_TOKEN:
        bad = np.flatnonzero((values < 0) | (values > MAX_TOKEN))
        raise ValueError(f"tokens of query {query}: {values[bad[0]]} at position {bad[0]} is outside [0, 2**31 - 1]")
    return values


def read_prompts(cache: PrefixCache, prompts: Any, namespaces: Any, priority: Any) -> list[Request]:
    """Requests that have not begun yet."""
    if not isinstance(prompts, list | tuple) or is_single(prompts):
        raise ValueError("begin takes a list of prompts; wrap a single one: [prompt]")
    names = names_of.spread(namespaces, len(prompts))
    priorities = per_query(priority, len(prompts), "priority").tolist()
    requests = []
    for query, prompt in enumerate(prompts):
        tokens = _token_ids(prompt, query)
        if len(tokens) == 0:
            raise ValueError(f"tokens of query {query}: the prompt is empty; there must be a token to compute")
        if len(tokens) > cache.max_length:
            raise ValueError(
                f"tokens of query {query}: {len(tokens)} are more than max_length {cache.max_length}; cut the prompt"
            )
        requests.append(Request(cache, tokens, names[query], priorities[query]))
    return requests


def check_running(cache: PrefixCache, operation: str, requests: Sequence[Request]) -> None:
    """Raise ValueError unless all of them are running in this cache, each once."""
    seen: set[int] = set()
    for query, request in enumerate(requests):
        if request._cache is not cache:
            raise ValueError(f"{operation}: request {query} is of another PrefixCache")
        if request.state != RUNNING:
            raise ValueError(f"{operation}: request {query} {request.why_not_running()}")
        if request.row in seen:
            raise ValueError(f"{operation}: request {query} is there twice")
        seen.add(request.row)


def read_counts(requests: Sequence[Request], n: Any, max_length: int) -> list[int]:
    """How many tokens longer each request is to be."""
    more = per_query(n, len(requests), "n").tolist()
    for query, (request, count) in enumerate(zip(requests, more, strict=True)):
        if count < 0 or request.length + count > max_length:
            raise ValueError(
                f"extend: request {query} has {request.length} tokens, and {count} more are asked for; "
                f"give 0 or more, up to max_length {max_length}"
            )
    return more


def read_tokens(operation: str, requests: Sequence[Request], tokens: Any) -> list[np.ndarray]:
    """What each request is told to know more, int64 [K] each."""
    if tokens is None:
        return [np.empty(0, np.int64)] * len(requests)
    if len(tokens) != len(requests):
        raise ValueError(f"{operation}: {len(requests)} requests, but tokens for {len(tokens)}")
    return [_token_ids(sequence, query) for query, sequence in enumerate(tokens)]


def computed_ends(operation: str, requests: Sequence[Request], added: list[np.ndarray], up_to: Any) -> list[int]:
    """How many tokens of each request are computed: by default all that are known and have slots."""
    most = [min(request.num_tokens + len(new), request.length) for request, new in zip(requests, added, strict=True)]
    if up_to is None:
        return most
    ends = per_query(up_to, len(requests), "up_to").tolist()
    for query, (request, end, limit) in enumerate(zip(requests, ends, most, strict=True)):
        if not 0 <= end <= limit:
            known = request.num_tokens + len(added[query])
            raise ValueError(
                f"{operation}: request {query} cannot have {end} tokens computed: it has {request.length} slots, "
                f"and {known} tokens are known"
            )
    return ends
