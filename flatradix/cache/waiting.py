"""RequestQueue: the prompts that wait for a PrefixCache. It begins those that fit together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from flatradix.cache.requests import Request, Requests
from flatradix.queue.orders import OrderFunction
from flatradix.queue.waiting_queue import WaitingQueue, read_limit
from flatradix.tree import RadixTree


class Cache(Protocol):
    """What a queue needs of its PrefixCache."""

    tree: RadixTree

    def begin(self, prompts: Any, namespaces: Any = None, priority: Any = 0, share: bool = False) -> Requests: ...

    def free_space(self) -> tuple[int, int]: ...

    def abort(self, requests: Sequence[Request]) -> None: ...

    @property
    def running(self) -> Requests: ...


class RequestQueue(WaitingQueue):
    """A WaitingQueue beside the tree of a PrefixCache. `PrefixCache.queue` makes it.

    Lengths are those of prompts without their last token, which a request always computes.
    """

    def __init__(self, cache: Cache, keep: bool) -> None:
        super().__init__(cache.tree, keep, compute_last=True)
        self._cache = cache

    def begin(
        self,
        order: str | OrderFunction | torch.Tensor | Sequence[int] = "fcfs",
        *,
        token_budget: int | None = None,
        max_requests: int | None = None,
        skip: bool = False,
        share: bool = False,
    ) -> tuple[Requests, torch.Tensor]:
        """Begin the prompts that a plan admits: they leave the queue. Returns their requests and their ids, int64 [K].

        order, token_budget, max_requests, skip: as for `plan`. Free slots, rows and whole pages are those of the cache.
        share: as for `PrefixCache.begin`: what these prompts share and is not cached has the slots of the first of
            them, and the plan counts it once. Without `share`, each of them computes its own; in an engine that cannot
            share within a forward pass, `order(..., defer_shared=True)` avoids that.

        Raises as `plan` and as `PrefixCache.begin`. Then every prompt still waits. If a signal cuts the call short, the
        prompts of the plan either wait, or run: `cache.running` has their requests.
        """
        cache = self._cache
        free_slots, free_rows = cache.free_space()
        most = min(read_limit(max_requests, "max_requests"), free_rows)
        plan = self.plan(
            order, token_budget=token_budget, max_requests=most, free_tokens=free_slots, skip=skip, whole_pages=True,
            share=share,
        )  # fmt: skip
        before = max(cache.running.serials.tolist(), default=0)
        try:
            requests = cache.begin(*self._prompts_of(plan.ids), share)
            begun = requests.running
            ids = plan.ids[torch.from_numpy(begun)]
            self.remove(ids)
        except BaseException:
            self._take_back(plan.ids, before)
            raise
        return requests[begun], ids

    def _take_back(self, ids: torch.Tensor, before: int) -> None:
        """End the requests that began after the one numbered `before`, if their prompts have not left the queue."""
        running = self._cache.running
        began = running[running.serials > before]
        if len(began) and all(int(id) in self for id in ids):  # prompts leave together, or none does
            self._cache.abort(began)

    def _prompts_of(self, ids: torch.Tensor) -> tuple[list[Any], list[Any], list[int]]:
        """Return the tokens, namespaces and priorities of waiting prompts."""
        entries = self._find(ids.numpy(), "begin")
        spaces, priorities = self._prompts.columns(entries, "space", "priority")
        names = self._prompts.names()
        tokens = [self._prompts.tokens(int(entry)) for entry in entries]
        return tokens, [names[space] for space in spaces.tolist()], priorities.tolist()
