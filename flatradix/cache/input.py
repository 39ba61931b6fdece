"""Reading the arguments of a PrefixCache. All of them are checked before anything changes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.cache.columns import Columns
from flatradix.cache.requests import Owner, Request, Requests
from flatradix.errors import QueryError
from flatradix.inputs import namespaces as names_of
from flatradix.inputs.arguments import per_query, positive
from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.ragged import Ragged, read_batch
from flatradix.inputs.sequences import Batch, is_batch, read_one
from flatradix.kernels import cpu
from flatradix.layout import running
from flatradix.layout.numbers import MAX_TOKEN, MAX_UNITS

_NOTHING = np.empty(0, np.int64)
_NO_TOKENS = Batch(_NOTHING, _NOTHING, False, None)


class Prompts(NamedTuple):
    """The prompts of a `begin`: their tokens, a namespace for all or a list with one each, int64 [B] priorities.

    on_device: the tokens as a Ragged on the index's device, if the caller passed one: then `tokens` has only counts.
    longest: tokens of the longest prompt.
    """

    tokens: Batch
    names: Namespace | list[Namespace]
    priorities: np.ndarray
    on_device: Ragged | None
    longest: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def counts(self) -> np.ndarray:
        return self.tokens.counts

    def name(self, query: int) -> Namespace:
        return self.names[query] if isinstance(self.names, list) else self.names

    def on_host(self) -> Prompts:
        """Return the prompts in host memory. Waits if they are on a device."""
        if self.on_device is None:
            return self
        tokens = read_batch(self.on_device.to("cpu"), "tokens")
        return Prompts(tokens, self.names, self.priorities, None, self.longest)

    def some(self, queries: np.ndarray) -> Prompts:
        """Return the prompts of some queries. They must be in host memory."""
        addresses, counts, wide, owner = self.tokens
        names = [self.names[query] for query in queries] if isinstance(self.names, list) else self.names
        tokens = Batch(addresses[queries], counts[queries], wide, owner)
        return Prompts(tokens, names, self.priorities[queries], None, int(counts[queries].max()))

    def array(self, query: int) -> np.ndarray:
        """Return the tokens of a query, int32 or int64: a view. They must be in host memory."""
        assert self.on_device is None
        kind = ctypes.c_int64 if self.tokens.wide else ctypes.c_int32
        return np.ctypeslib.as_array((kind * int(self.counts[query])).from_address(int(self.tokens.addresses[query])))


def read_prompts(prompts: Any, namespaces: Any, priority: Any, device: torch.device | None) -> Prompts:
    """Read the prompts of a `begin`. Raises QueryError for an empty prompt.

    device: where a Ragged stays as it is; None if there is no such device.
    """
    if not is_batch(prompts) and not (isinstance(prompts, list | tuple) and len(prompts) == 0):
        raise ValueError("begin takes a list of prompts, or a Ragged; wrap a single one: [prompt]")
    ragged = prompts if isinstance(prompts, Ragged) and prompts.device == device else None
    tokens = _read_tokens(prompts, ragged)
    shortest, longest = cpu.extent.call(tokens.counts)
    if shortest == 0:
        query = int(tokens.counts.argmin())
        raise QueryError(f"tokens of query {query}: the prompt is empty; there must be a token to compute", query)
    names = names_of.spread(namespaces, len(tokens))
    found = list(names) if isinstance(namespaces, list | tuple) else namespaces
    return Prompts(tokens, found, per_query(priority, len(tokens), "priority"), ragged, longest)


def _read_tokens(prompts: Any, on_device: Ragged | None) -> Batch:
    """Return the tokens in host memory, or if they stay on a device, their counts alone."""
    nothing = np.zeros(0, np.int64)
    if len(prompts) == 0:
        return Batch(nothing, nothing, False, None)
    if on_device is None:
        return read_batch(prompts, "tokens")
    counts = np.diff(on_device.validate())
    return Batch(np.zeros_like(counts), counts, on_device.values.dtype == torch.int64, on_device)


def check_tokens(prompts: Prompts, skips: np.ndarray | None = None) -> None:
    """Raise QueryError for a token out of range. O(tokens). Waits if the prompts are on a device.

    skips: int64 [B], tokens of each prompt that are known to be good.
    """
    if prompts.on_device is not None:
        least, greatest = torch.stack(torch.aminmax(prompts.on_device.values)).tolist()
        if least >= 0 and greatest <= MAX_TOKEN:
            return
    batch = prompts.on_host().tokens
    skips = np.zeros_like(batch.counts) if skips is None else skips
    query, position = cpu.first_bad_of(batch.addresses, batch.wide, batch.counts, skips)
    if query >= 0:
        refuse_token(batch, int(query), int(position))


def read_chunk(chunk: Any, share: bool) -> int | None:
    """Return how many tokens get slots at first, checked."""
    if chunk is None:
        return None
    if share:
        raise ValueError("begin: prompts that share slots are computed as a whole: give `share` or `chunk`, not both")
    return min(positive("chunk", chunk), MAX_UNITS)


class Call(NamedTuple):
    """A call on running requests, checked. All are int64 [B], but `added`.

    added: the new tokens of each request. more: more slots. known, ends: its known and its computed tokens after the
    call. length, num_tokens, committed: those before the call.
    """

    rows: np.ndarray
    added: Batch
    more: np.ndarray
    known: np.ndarray
    ends: np.ndarray
    length: np.ndarray
    num_tokens: np.ndarray
    committed: np.ndarray


def read_call(
    owner: Owner,
    operation: str,
    requests: Any,
    tokens: Any = None,
    n: Any = _NOTHING,
    up_to: Any = None,
    behind: int = 0,
) -> Call:
    """Check a call on running requests. Raises QueryError for the first request that is refused, with the reason.

    tokens, n, up_to: as for `PrefixCache.commit` and `extend`. behind: without `up_to`, how many of the last known
    tokens are not computed yet.
    """
    requests = requests if isinstance(requests, Requests | list | tuple) else list(requests)
    rows, serials = _numbers_of(owner, operation, requests)
    count, columns = len(rows), owner.columns
    added = _NO_TOKENS if tokens is None else read_tokens(operation, count, tokens)
    more = _NOTHING if n is _NOTHING else per_query(n, count, "n")
    ends = _NOTHING if up_to is None else per_query(up_to, count, "up_to")
    found = np.empty((5, count), np.int64)
    reason, query = cpu.read_requests.call(columns.address, rows, serials, added.counts, more, ends, behind, found)
    if reason:
        row = int(rows[query])
        asked = [int(values[query]) if len(values) else 0 for values in (added.counts, more, ends)]
        raise QueryError(f"{operation}: request {query} {_why(columns, requests[query], row, reason, *asked)}", query)
    return Call(rows, added, more, *found)


def _why(columns: Columns, request: Request, row: int, reason: int, added: int, more: int, end: int) -> str:
    """Return why a call on a request is refused, for the reason of `layout.running`."""
    if reason == running.NOT_RUNNING:
        return request.why_not_running()
    if reason == running.TWICE:
        return "is there twice"
    known, length, most = int(columns.num_tokens[row]) + added, int(columns.length[row]), columns.counts
    if reason == running.TOO_MANY_TOKENS:
        return f"would have {known} tokens; {most[running.MOST_KNOWN]} can be known"
    if reason == running.TOO_LONG:
        text = f"has {length} tokens, and {more} more are asked for; give 0 or more, up to max_length"
        return f"{text} {most[running.MOST_SLOTS]}"
    slots = min(-(-length // most[running.PAGE]) * most[running.PAGE], most[running.MOST_SLOTS])
    return f"cannot have {end} tokens computed: it has {slots} slots, and {known} tokens are known"


def _numbers_of(owner: Owner, operation: str, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and serials of requests, int64 [B], not checked. Raises QueryError for those of another cache."""
    if isinstance(requests, Requests) and (requests.owner is owner or len(requests) == 0):
        return np.ascontiguousarray(requests.rows, np.int64), np.ascontiguousarray(requests.serials, np.int64)
    for query, request in enumerate(requests):
        if request.owner is not owner:
            raise QueryError(f"{operation}: request {query} is of another PrefixCache", query)
    rows = np.array([request.row for request in requests], np.int64)
    return rows, np.array([request.serial for request in requests], np.int64)


def read_tokens(operation: str, requests: int, tokens: Any) -> Batch:
    """Return the new tokens of each of so many requests. A flat sequence has one token for each request."""
    if requests == 0 and len(tokens) == 0:
        return _NO_TOKENS
    if isinstance(tokens, torch.Tensor | np.ndarray) and tokens.ndim == 2:
        tokens = list(tokens)
    found = read_batch(tokens, "tokens") if is_batch(tokens) else _one_for_each(tokens)
    if len(found) != requests:
        raise ValueError(f"{operation}: {requests} requests, but tokens for {len(found)}")
    return found


def _one_for_each(tokens: Any) -> Batch:
    """Return a flat sequence as a batch of sequences of one token."""
    address, count, wide, owner = read_one(tokens, "tokens")
    ones, places = _first_numbers(count)
    return Batch(address + (8 if wide else 4) * places, ones, wide, owner)


@functools.lru_cache(16)
def _first_numbers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `count` ones, and the numbers from 0 on, int64. Not to be changed."""
    return np.ones(count, np.int64), np.arange(count)


def refuse_token(tokens: Batch, query: int, position: int) -> None:
    """Raise QueryError for a token out of range."""
    kind = ctypes.c_int64 if tokens.wide else ctypes.c_int32
    value = kind.from_address(int(tokens.addresses[query]) + ctypes.sizeof(kind) * position).value
    raise QueryError(f"tokens of query {query}: {value} at position {position} is outside [0, {MAX_TOKEN}]", query)
