"""The oracle of a waiting queue: what every method means, in plain Python. Each call looks everything up afresh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from flatradix.errors import QueryError
from tests.support.oracle import LARGEST, Namespace, Node, Oracle, Place, check_range


@dataclass(frozen=True)
class Prompt:
    id: int
    tokens: tuple[int, ...]
    namespace: Namespace
    priority: int
    arrival: float


class Plan(NamedTuple):
    ids: list[int]
    cached_lengths: list[int]
    new_tokens: int


def waited(prompt: Prompt, now: float) -> float:
    return max(0.0, now - prompt.arrival)


class WaitingOracle:
    """A waiting queue over an oracle tree, as slow Python.

    keep: whether evictions keep what the prompts match. compute_last: whether matches leave out the last token.
    """

    def __init__(self, tree: Oracle, keep: bool = False, compute_last: bool = False) -> None:
        if keep and tree.keeper is not None:
            raise ValueError("the tree has a queue that keeps")
        self.tree = tree
        self.compute_last = compute_last
        self.prompts: list[Prompt] = []  # the oldest first
        self.next_id = 0
        self.last_order: list[int] = []
        if keep:
            tree.keeper = self

    # Content

    def add(
        self,
        queries: Sequence[Sequence[int]],
        namespaces: Sequence[Namespace],
        priorities: Sequence[int],
        arrivals: Sequence[float],
    ) -> list[int]:
        for query, tokens in enumerate(queries):
            check_range(tokens, LARGEST, query)
        ids = list(range(self.next_id, self.next_id + len(queries)))
        self.next_id += len(queries)
        keys = [tuple(tokens) for tokens in queries]
        self.prompts += map(Prompt, ids, keys, namespaces, priorities, arrivals)
        return ids

    def remove(self, ids: Sequence[int]) -> None:
        waiting = self.ids()
        for query, id in enumerate(ids):
            if id not in waiting or id in ids[:query]:
                raise QueryError(f"prompt {id} does not wait", query)
        self.prompts = [prompt for prompt in self.prompts if prompt.id not in ids]

    def prompt_of(self, id: int) -> Prompt:
        (found,) = [prompt for prompt in self.prompts if prompt.id == id]
        return found

    def ids(self) -> list[int]:
        return [prompt.id for prompt in self.prompts]

    def lengths(self) -> list[int]:
        return [len(prompt.tokens) for prompt in self.prompts]

    # Look-ups

    def key_of(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the tokens that count in matches."""
        return prompt.tokens[:-1] if self.compute_last else prompt.tokens

    def place_of(self, prompt: Prompt) -> Place:
        (place,) = self.tree.match([self.key_of(prompt)], [prompt.namespace], touch=False)
        return place

    def cached(self, prompt: Prompt) -> int:
        return self.place_of(prompt).length

    def shared(self, prompt: Prompt) -> int:
        longest = max([self.common(prompt, one) for one in self.prompts if one.id < prompt.id], default=0)
        return max(0, longest - self.cached(prompt))

    def common(self, prompt: Prompt, other: Prompt) -> int:
        """Return how much two prompts share, in whole pages."""
        if prompt.namespace != other.namespace:
            return 0
        units, others = (self.tree.units_of(self.key_of(one)) for one in (prompt, other))
        return self.tree.common(units, others)

    def cached_lengths(self) -> list[int]:
        return [self.cached(prompt) for prompt in self.prompts]

    def shared_lengths(self) -> list[int]:
        return [self.shared(prompt) for prompt in self.prompts]

    def uncached(self, prompt: Prompt) -> int:
        return len(prompt.tokens) - self.cached(prompt)

    # Orders

    def order(
        self,
        policy: Any = "fcfs",
        now: float = 0.0,
        patience: float = 300.0,
        every: int = 4,
        defer_shared: bool = False,
    ) -> list[int]:
        self.last_order = self.order_of(policy, now, patience, every, defer_shared)
        return self.last_order

    def order_of(
        self,
        policy: Any,
        now: float = 0.0,
        patience: float = 300.0,
        every: int = 4,
        defer_shared: bool = False,
    ) -> list[int]:
        """Return the order, but do not remember it for evictions."""
        if policy == "k-lpm":
            found = self.take_turns(every)
        else:
            scores = self.scores(policy, now, patience)
            found = sorted(self.prompts, key=lambda one: (-one.priority, scores[one], one.id))
        if defer_shared:
            found = sorted(found, key=lambda one: (-one.priority, self.shared(one) > 0))  # a stable sort
        return [prompt.id for prompt in found]

    def scores(self, policy: Any, now: float, patience: float) -> dict[Prompt, Any]:
        """Return a score for each prompt. The lowest goes first."""
        if callable(policy):
            return dict(zip(self.prompts, policy(self.columns(now)).tolist(), strict=True))
        if policy == "dfs-weight":
            by_depth = self.depth_first()
            return {prompt: by_depth.index(prompt) for prompt in self.prompts}
        score: Callable[[Prompt], Any] = {
            "fcfs": lambda one: 0,
            "lpm": lambda one: -self.cached(one),
            "hrrn": lambda one: self.response_ratio(one, now),
            "shortest-prefill": lambda one: max(1, self.uncached(one)),
            "aged": lambda one: -(self.cached(one) / max(1, len(one.tokens)) + waited(one, now) / patience),
        }[policy]
        return {prompt: score(prompt) for prompt in self.prompts}

    def response_ratio(self, prompt: Prompt, now: float) -> float:
        uncached = self.uncached(prompt)
        return -waited(prompt, now) / uncached if uncached else -float("inf")

    def columns(self, now: float) -> Any:
        """Return what a policy function gets."""
        return SimpleNamespace(
            cached=torch.tensor(self.cached_lengths()),
            length=torch.tensor(self.lengths()),
            shared=torch.tensor(self.shared_lengths()),
            waited=torch.tensor([waited(one, now) for one in self.prompts], dtype=torch.float64),
            priority=torch.tensor([one.priority for one in self.prompts]),
            arrival=torch.tensor([one.arrival for one in self.prompts], dtype=torch.float64),
        )

    def take_turns(self, every: int) -> list[Prompt]:
        """Return the order k-lpm: among equal priorities, every `every`-th turn goes to the oldest that is left."""
        found: list[Prompt] = []
        for priority in sorted({one.priority for one in self.prompts}, reverse=True):
            left = [one for one in self.prompts if one.priority == priority]
            for turn in range(1, len(left) + 1):
                of_oldest = turn % every == 0
                found.append(min(left, key=lambda one: (0 if of_oldest else -self.cached(one), one.id)))
                left.remove(found[-1])
        return found

    def depth_first(self) -> list[Prompt]:
        """Return the prompts in the order dfs-weight, without regard to priorities."""
        ends: dict[Node | None, list[Prompt]] = {}
        for prompt in self.prompts:
            ends.setdefault(self.place_of(prompt).node, []).append(prompt)
        tops = [node for top in self.tree.tops.values() for node in top.values()]
        return self.below(tops, ends) + ends.get(None, [])

    def below(self, nodes: Sequence[Node], ends: dict[Node | None, list[Prompt]]) -> list[Prompt]:
        """Return the prompts that end at the nodes or below them: first those of the node with the most prompts."""
        found = [self.below(list(node.branches.values()), ends) + ends.get(node, []) for node in nodes]
        groups = sorted(filter(None, found), key=lambda group: (-len(group), min(one.id for one in group)))
        return [prompt for group in groups for prompt in group]

    # Plans

    def plan(
        self,
        order: Any = "fcfs",
        token_budget: int | None = None,
        max_requests: int | None = None,
        free_tokens: int | None = None,
        skip: bool = False,
        reserve: int = 0,
        share: bool = False,
    ) -> Plan:
        """Admit the prompts one after the other on a copy of the tree, and count."""
        tree = deepcopy(self.tree)
        free = tree.max_tokens - tree.total_tokens if free_tokens is None else free_tokens
        admitted: list[int] = []
        cached: list[int] = []
        total = 0
        for id in self.order_of(order) if isinstance(order, str) else order:
            prompt = self.prompt_of(id)
            (place,) = tree.match([self.key_of(prompt)], [prompt.namespace], lock=True)
            known = max([place.length, *(self.common(prompt, self.prompt_of(one)) for one in admitted if share)])
            needed = len(prompt.tokens) - known + reserve
            over = token_budget is not None and total + needed > token_budget
            many = max_requests is not None and len(admitted) >= max_requests
            if over or many or free + tree.evictable_tokens < total + needed:
                tree.unlock([place])
                if not skip:
                    break
                continue
            admitted.append(id)
            cached.append(place.length)
            total += needed
        return Plan(admitted, cached, total)

    # Evictions

    def nodes_to_give_up(self) -> list[Node]:
        """Return the nodes on which matches end, those of the last prompt in the queue's order first."""
        known = [id for id in self.last_order if id in self.ids()]
        order = known + [id for id in self.ids() if id not in known]
        places = [self.place_of(self.prompt_of(id)) for id in reversed(order)]
        return [place.node for place in places if place.node is not None]

    def close(self) -> None:
        """Let evictions keep nothing from now on."""
        if self.tree.keeper is self:
            self.tree.keeper = None
