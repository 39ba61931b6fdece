"""Reading the arguments of a PrefixCache. All of them are checked before anything changes."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.cache.columns import Columns
from flatradix.cache.requests import Owner, Request, Requests
from flatradix.errors import QueryError
from flatradix.inputs import namespaces as names_of
from flatradix.inputs.arguments import per_query
from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.ragged import Ragged, read_batch
from flatradix.inputs.sequences import Batch, is_batch
from flatradix.kernels import cpu
from flatradix.layout.numbers import MAX_TOKEN

NO_LIMIT = 1 << 62


class Prompts(NamedTuple):
    """The prompts of a `begin`: their tokens, a namespace for all or a list with one each, int64 [B] priorities.

    on_device: the tokens as a Ragged on the index's device, if the caller passed one: then `tokens` has only counts.
    """

    tokens: Batch
    names: Namespace | list[Namespace]
    priorities: np.ndarray
    on_device: Ragged | None

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
        # `_replace` would count prompts where it means to count fields.
        return Prompts(read_batch(self.on_device.to("cpu"), "tokens"), self.names, self.priorities, None)

    def some(self, queries: np.ndarray) -> Prompts:
        """Return the prompts of some queries. They must be in host memory."""
        addresses, counts, wide, owner = self.tokens
        names = [self.names[query] for query in queries] if isinstance(self.names, list) else self.names
        return Prompts(Batch(addresses[queries], counts[queries], wide, owner), names, self.priorities[queries], None)

    def array(self, query: int) -> np.ndarray:
        """Return the tokens of a query, int32 or int64: a view."""
        kind = ctypes.c_int64 if self.tokens.wide else ctypes.c_int32
        return np.ctypeslib.as_array((kind * int(self.counts[query])).from_address(int(self.tokens.addresses[query])))

    def keys(self) -> Batch:
        """Return the prompts without their last tokens, which are always computed."""
        addresses, counts, wide, owner = self.tokens
        return Batch(addresses, counts - 1, wide, owner)


def read_prompts(prompts: Any, namespaces: Any, priority: Any, device: torch.device) -> Prompts:
    """Read the prompts of a `begin`. Raises QueryError for an empty prompt."""
    if not is_batch(prompts) and not (isinstance(prompts, list | tuple) and len(prompts) == 0):
        raise ValueError("begin takes a list of prompts, or a Ragged; wrap a single one: [prompt]")
    ragged = prompts if isinstance(prompts, Ragged) and prompts.device == device and device.type != "cpu" else None
    tokens = _read_tokens(prompts, ragged)
    empty = np.flatnonzero(tokens.counts == 0)
    if len(empty):
        query = int(empty[0])
        raise QueryError(f"tokens of query {query}: the prompt is empty; there must be a token to compute", query)
    names = names_of.spread(namespaces, len(tokens))
    found = list(names) if isinstance(namespaces, list | tuple) else namespaces
    return Prompts(tokens, found, per_query(priority, len(tokens), "priority"), ragged)


def _read_tokens(prompts: Any, on_device: Ragged | None) -> Batch:
    """Return the tokens in host memory, or if they stay on a device, their counts alone."""
    nothing = np.zeros(0, np.int64)
    if len(prompts) == 0:
        return Batch(nothing, nothing, False, None)
    if on_device is None:
        return read_batch(prompts, "tokens")
    on_device.validate()
    counts = np.diff(on_device.offsets.cpu().numpy())
    return Batch(np.zeros_like(counts), counts, on_device.values.dtype == torch.int64, on_device)


def check_tokens(prompts: Prompts) -> None:
    """Raise QueryError for a token out of range. O(tokens). Waits if the prompts are on a device."""
    if prompts.on_device is not None:
        values = prompts.on_device.values
        if not bool(((values < 0) | (values > MAX_TOKEN)).any()):
            return
    batch = prompts.on_host().tokens
    query, position = cpu.first_bad_of(batch.addresses, batch.wide, batch.counts)
    if query >= 0:
        refuse_token(batch, int(query), int(position))


def read_chunk(chunk: Any, share: bool) -> int | None:
    """Return how many tokens get slots at first, checked."""
    if chunk is None:
        return None
    if share:
        raise ValueError("begin: prompts that share slots are computed as a whole: give `share` or `chunk`, not both")
    count = operator.index(chunk)
    if count < 1:
        raise ValueError(f"chunk must be at least 1, not {count}")
    return count


def rows_of(owner: Owner, operation: str, requests: Sequence[Request]) -> np.ndarray:
    """Return the rows of running requests, int64 [B]. Raises QueryError unless each runs here and is given once."""
    requests = as_batch(requests)
    rows, serials = numbers_of(owner, operation, requests)
    nothing = np.zeros(len(rows), np.int64)
    reason, _ = cpu.check_requests(owner.columns.data, rows, serials, nothing, NO_LIMIT, nothing, NO_LIMIT)
    if reason:
        _refuse_requests(owner, operation, requests)
    return rows


def as_batch(requests: Any) -> Sequence[Request]:
    """Return requests as a sequence that can be read more than once."""
    return requests if isinstance(requests, Requests | list | tuple) else list(requests)


def numbers_of(owner: Owner, operation: str, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and serials of requests, int64 [B], not checked. Raises QueryError for those of another cache."""
    if isinstance(requests, Requests):
        if requests.owner is not owner and len(requests):
            _refuse_requests(owner, operation, requests)
        return np.ascontiguousarray(requests.rows), np.ascontiguousarray(requests.serials)
    for query, request in enumerate(requests):
        if request.owner is not owner:
            raise QueryError(f"{operation}: request {query} is of another PrefixCache", query)
    rows = np.array([request.row for request in requests], np.int64)
    return rows, np.array([request.serial for request in requests], np.int64)


def _refuse_requests(owner: Owner, operation: str, requests: Sequence[Request]) -> None:
    seen: set[int] = set()
    for query, request in enumerate(requests):
        if request.owner is not owner:
            raise QueryError(f"{operation}: request {query} is of another PrefixCache", query)
        if request.row < 0:
            raise QueryError(f"{operation}: request {query} {request.why_not_running()}", query)
        if request.row in seen:
            raise QueryError(f"{operation}: request {query} is there twice", query)
        seen.add(request.row)


def read_growth(operation: str, columns: Columns, rows: np.ndarray, n: Any, max_length: int) -> np.ndarray:
    """Return how many more tokens each request is to have, int64 [B]. Raises QueryError for a bad number."""
    more = per_query(n, len(rows), "n")
    lengths = columns.length[rows]
    bad = np.flatnonzero((more < 0) | (lengths + more > max_length))
    if len(bad):
        query = int(bad[0])
        raise QueryError(
            f"{operation}: request {query} has {lengths[query]} tokens, and {more[query]} more are asked for; "
            f"give 0 or more, up to max_length {max_length}",
            query,
        )
    return more


def read_tokens(operation: str, rows: np.ndarray, tokens: Any) -> Batch:
    """Return the new tokens of each request. A flat sequence has one token for each request."""
    if tokens is None or (len(rows) == 0 and len(tokens) == 0):
        nothing = np.zeros(len(rows), np.int64)
        return Batch(nothing, nothing, False, None)
    flat = not is_batch(tokens) and (not isinstance(tokens, torch.Tensor | np.ndarray) or tokens.ndim == 1)
    if isinstance(tokens, torch.Tensor | np.ndarray) and tokens.ndim == 2:
        tokens = list(tokens)
    found = read_batch(tokens, "tokens")
    if flat:
        step = 8 if found.wide else 4
        count = int(found.counts[0])
        places = found.addresses[0] + step * np.arange(count)
        found = Batch(places, np.ones(count, np.int64), found.wide, found.owner)
    if len(found) != len(rows):
        raise ValueError(f"{operation}: {len(rows)} requests, but tokens for {len(found)}")
    return found


def refuse_long(operation: str, known: np.ndarray, most: int) -> None:
    """Raise QueryError for a request that would know more tokens than a row holds."""
    long = np.flatnonzero(known > most)
    if len(long):
        query = int(long[0])
        raise QueryError(f"{operation}: request {query} would have {known[query]} tokens; {most} can be known", query)


def refuse_token(tokens: Batch, query: int, position: int) -> None:
    """Raise QueryError for a token out of range."""
    kind = ctypes.c_int64 if tokens.wide else ctypes.c_int32
    value = kind.from_address(int(tokens.addresses[query]) + ctypes.sizeof(kind) * position).value
    raise QueryError(f"tokens of query {query}: {value} at position {position} is outside [0, {MAX_TOKEN}]", query)


def read_up_to(operation: str, up_to: Any, known: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return how many tokens of each request are computed, int64 [B], checked.

    known, slots: int64 [B], tokens of each that will be known, and slots that it has, with those of its last page.
    """
    ends = per_query(up_to, len(known), "up_to")
    most = np.minimum(known, slots)
    bad = np.flatnonzero((ends < 0) | (ends > most))
    if len(bad):
        query = int(bad[0])
        raise QueryError(
            f"{operation}: request {query} cannot have {ends[query]} tokens computed: it has {slots[query]} slots, "
            f"and {known[query]} tokens are known",
            query,
        )
    return ends
