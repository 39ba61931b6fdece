"""An engine for the tests of PrefixCache. Its KV shows whether a slot holds the right content.

The KV of a token is a fingerprint of its namespace and all tokens up to it, on which real KV depends too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flatradix import PrefixCache, Request, Requests


def fingerprints(tokens: Sequence[int], namespace: Any) -> list[int]:
    """Return the KV of each token."""
    found, state = [], hash(("kv", namespace))
    for token in tokens:
        state = hash((state, int(token)))
        found.append(state)
    return found


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences have in common at the start."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Engine:
    """An engine's KV memory, and how many tokens of each request have their KV there.

    Requests that began together with `share` are computed in one forward pass, before anything else of them is.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self.kv = np.zeros(cache.counts().slots, dtype=np.int64)
        self.computed: dict[Request, int] = {}
        self.together: dict[Request, list[Request]] = {}  # those that wait for their forward pass

    def begin(
        self, prompts: list[list[int]], namespaces: Any = None, priority: Any = 0, share: bool = False
    ) -> list[Request]:
        requests = list(self.cache.begin(prompts, namespaces, priority, share=share))
        running = [request for request in requests if request.state == "running"]
        for request in running:
            self.kv[request.slots.cpu().numpy()[request.committed :]] = 0  # whatever KV was there, it is of no use
            self.computed[request] = request.committed
            self.compare(request)
            if share:
                self.together[request] = running
        return requests

    def forward(self, requests: list[Request]) -> None:
        """Compute in one pass what `cached_length` leaves to compute: all KV is written before any is read."""
        running = [request for request in requests if request.state == "running"]
        for request in running:
            self.together.pop(request, None)
            self.write(request, request.cached_length, request.length)
            self.computed[request] = min(request.num_tokens, request.length)
        for request in running:
            self.compare(request)

    def write(self, request: Request, begin: int, end: int) -> None:
        kv = fingerprints(request.tokens, request.namespace)[begin:end]
        self.kv[request.slots.cpu().numpy()[begin : begin + len(kv)]] = kv

    def compute(self, request: Request, up_to: int) -> None:
        """Compute the KV of a request's tokens before `up_to`, which must be known and have slots."""
        if request in self.together:
            self.forward(self.together[request])
        begin = self.computed[request]
        if up_to > begin:
            self.write(request, begin, up_to)
            self.computed[request] = up_to

    def compare(self, request: Request) -> None:
        """Assert that the slots of a request hold the KV of its own tokens."""
        end = self.computed[request]
        expected = fingerprints(request.tokens[:end], request.namespace)
        assert self.kv[request.slots.cpu().numpy()[:end]].tolist() == expected

    def run(self, prompt: list[int], namespace: Any = None) -> Request:
        """Begin, compute and finish a request."""
        (request,) = self.begin([prompt], namespace)
        self.compute(request, request.length)
        self.cache.finish([request])
        return request


def engine(where: dict[str, str], slots: int = 64, **options: Any) -> Engine:
    return Engine(PrefixCache(slots, **{"page_size": 4, "max_requests": 4, "max_length": 64} | options, **where))


class RememberingCache(PrefixCache):
    """A cache that keeps the prompt of each request: the tokens of a request that has ended are not kept."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prompts: dict[Request, list[int]] = {}

    def begin(self, prompts: Any, *arguments: Any, **options: Any) -> Requests:
        found = super().begin(prompts, *arguments, **options)
        self.prompts |= {request: list(prompt) for request, prompt in zip(found, prompts, strict=True)}
        return found
