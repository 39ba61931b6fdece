"""Reading the arguments of a PrefixCache. All of them are checked before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flatradix.cache.request import RUNNING, Owner, Request
from flatradix.errors import QueryError
from flatradix.inputs import namespaces as names_of
from flatradix.inputs.arguments import per_query
from flatradix.inputs.sequences import is_batch, read_one
from flatradix.layout.numbers import MAX_TOKEN


def _token_ids(sequence: Any, query: int) -> np.ndarray:
    """Return a copy of a sequence as int64. Raises QueryError for a token out of range."""
    values = np.array(read_one(sequence, "tokens", query)[3], np.int64)
    if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= MAX_TOKEN:
        bad = np.flatnonzero((values < 0) | (values > MAX_TOKEN))
        raise QueryError(
            f"tokens of query {query}: {values[bad[0]]} at position {bad[0]} is outside [0, 2**31 - 1]", query
        )
    return values


def read_prompts(
    owner: Owner, table: torch.Tensor, max_length: int, prompts: Any, namespaces: Any, priority: Any
) -> list[Request]:
    """Return a new request for each prompt. The requests have not begun yet."""
    if not isinstance(prompts, list | tuple) or (len(prompts) and not is_batch(prompts)):
        raise ValueError("begin takes a list of prompts; wrap a single one: [prompt]")
    names = names_of.spread(namespaces, len(prompts))
    priorities = per_query(priority, len(prompts), "priority").tolist()
    requests = []
    for query, prompt in enumerate(prompts):
        tokens = _token_ids(prompt, query)
        if len(tokens) == 0:
            raise QueryError(f"tokens of query {query}: the prompt is empty; there must be a token to compute", query)
        if len(tokens) > max_length:
            raise QueryError(
                f"tokens of query {query}: {len(tokens)} are more than max_length {max_length}; cut the prompt", query
            )
        requests.append(Request(owner, table, tokens, names[query], priorities[query]))
    return requests


def check_running(owner: object, operation: str, requests: Sequence[Request]) -> None:
    """Raise QueryError unless every request is running in this cache and is given once."""
    seen: set[int] = set()
    for query, request in enumerate(requests):
        if request.owner is not owner:
            raise QueryError(f"{operation}: request {query} is of another PrefixCache", query)
        if request.state != RUNNING:
            raise QueryError(f"{operation}: request {query} {request.why_not_running()}", query)
        if request.row in seen:
            raise QueryError(f"{operation}: request {query} is there twice", query)
        seen.add(request.row)


def read_growth(requests: Sequence[Request], n: Any, max_length: int) -> list[int]:
    """Return how many more tokens each request is to have. Raises QueryError for a bad number."""
    more = per_query(n, len(requests), "n").tolist()
    for query, (request, count) in enumerate(zip(requests, more, strict=True)):
        if count < 0 or request.length + count > max_length:
            raise QueryError(
                f"extend: request {query} has {request.length} tokens, and {count} more are asked for; "
                f"give 0 or more, up to max_length {max_length}",
                query,
            )
    return more


def read_tokens(operation: str, requests: Sequence[Request], tokens: Any) -> list[np.ndarray]:
    """Return the new tokens of each request, int64 [K] each."""
    if tokens is None:
        return [np.empty(0, np.int64)] * len(requests)
    if len(tokens) != len(requests):
        raise ValueError(f"{operation}: {len(requests)} requests, but tokens for {len(tokens)}")
    return [_token_ids(sequence, query) for query, sequence in enumerate(tokens)]


def computed_ends(operation: str, requests: Sequence[Request], added: list[np.ndarray], up_to: Any) -> list[int]:
    """Return how many tokens of each request are computed: by default all tokens that are known and have slots."""
    most = [min(request.num_tokens + len(new), request.length) for request, new in zip(requests, added, strict=True)]
    if up_to is None:
        return most
    ends = per_query(up_to, len(requests), "up_to").tolist()
    for query, (request, end, limit) in enumerate(zip(requests, ends, most, strict=True)):
        if not 0 <= end <= limit:
            known = request.num_tokens + len(added[query])
            raise QueryError(
                f"{operation}: request {query} cannot have {end} tokens computed: it has {request.length} slots, "
                f"and {known} tokens are known",
                query,
            )
    return ends
