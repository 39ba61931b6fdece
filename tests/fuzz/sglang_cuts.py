"""Interrupted calls of the SGLang backend: each slot is cached, free or a request's own, and each lock has a holder.

Calls are cut within flatradix only: SGLang's own code is not written for interruptions, so no timer rings here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from flatradix.inspect.nodes import nodes_of
from tests.fuzz.cuts import Cutter, run_programs
from tests.support.sglang_engine import Plan
from tests.support.sglang_home import SGLANG, Home

PROGRAMS, STEPS, STEPS_A_CHECK = 3, 60, 4
MOST = 6


@cache
def events_work() -> bool:
    """Return whether SGLang can hash for KV events here: it compiles code for that, and caches it on disk."""
    try:
        Home(Plan(page_size=4, slots=40, events=True)).store(range(12))
    except RuntimeError:
        return False
    return True


class Program:
    """A scheduler that is interrupted within the calls of its cache, and goes on."""

    def __init__(self, random: Random, counts: Counter[str]) -> None:
        self.random = random
        policy = random.choice(("lru", "lfu", "slru", "priority"))
        page = random.choice((1, 4))
        events = random.random() < 0.5 and events_work()
        self.home = Home(Plan(page_size=page, slots=60 * page, eviction=policy, events=events))
        self.cache, self.page = self.home.cache, page
        self.cutter = Cutter(random, counts, (95, 0, 5))
        self.requests: list[Any] = []
        self.extra: list[Any] = []  # places with a lock that no request has
        self.rows = list(range(1, 1 + MOST))
        self.known: list[list[int]] = [[]]

    def locks(self) -> int:
        content = self.cache.tree.content()
        return int(content.column("own_locks")[content.live()].sum())

    def cut(self, name: str, call: Callable[[], Any]) -> None:
        """Make a call that has no effect if it is cut short; one that is cut as it returns may have one: see `lock`."""
        self.cutter.cut(name, call)

    def key(self) -> list[int]:
        random, stem = self.random, self.random.choice(self.known)
        key = stem[: random.randint(0, len(stem))] + [random.randint(0, 2) for _ in range(random.randint(1, 12))]
        self.known = [*self.known[-8:], key[:36]]
        return key[:36]

    def match(self, key: list[int]) -> Any:
        self.cutter.cut("match", lambda: self.home.match(key))
        return self.home.match(key).last_device_node

    def lock(self, place: Any) -> Any:
        """Lock a place, however often that is cut short. A lock that was cut as it returned is there."""
        before = self.locks()
        self.cutter.cut("lock", lambda: self.cache.lock(place), lambda: self.locks() > before)
        if self.locks() == before:
            return self.cache.lock(place)
        assert self.locks() == before + 1
        return SimpleNamespace(node=place)

    def unlock(self, lock: Any) -> None:
        before = self.locks()
        self.cutter.cut("unlock", lambda: self.cache.unlock(lock), lambda: self.locks() < before)
        if self.locks() == before:
            self.cache.unlock(lock)

    # Calls

    def admit(self) -> None:
        home = self.home
        if not self.rows:
            return
        prompt, output = self.key(), [self.random.randint(0, 2) for _ in range(self.random.randint(0, 9))]
        self.match(prompt)
        needed = -(-(len(prompt) + len(output)) // self.page) * self.page
        self.make_room(needed)
        if home.allocator.available_size() < needed:
            return
        home._rows = self.rows.pop() - 1
        req = home.request(prompt, output, rid=f"r{home._rows + 1}")
        self.requests.append(req)
        req.done = req.prefix_len

    def make_room(self, needed: int) -> None:
        short = needed - self.home.allocator.available_size()
        if short <= 0:
            return
        free = self.home.allocator.available_size()
        params = SGLANG.base.EvictParams(num_tokens=short)
        grown = lambda: self.home.allocator.available_size() > free  # noqa: E731
        self.cutter.cut("evict", lambda: self.cache.evict(params), grown)
        if not grown():
            self.cache.evict(params)

    def checkpoint(self) -> None:
        if not self.requests:
            return
        req = self.random.choice(self.requests)
        end = self.random.randint(req.done, len(req.full_untruncated_fill_ids))
        if end == 0:
            return
        self.cutter.cut("checkpoint", lambda: self.cache.checkpoint(req, up_to=end), lambda: self.moved(req, end))
        self.cache.checkpoint(req, up_to=end)
        req.done = end

    def moved(self, req: Any, end: int) -> bool:
        return bool(req.kv.cache_protected_len >= end // self.page * self.page)

    def end(self) -> None:
        """End a request: it frees what is its own, and its lock."""
        if not self.requests:
            return
        req = self.requests.pop(self.random.randrange(len(self.requests)))
        row = self.home.pool.req_to_token[req.kv.req_pool_idx]
        self.home.allocator.free(row[req.kv.cache_protected_len : req.kv.kv_allocated_len].clone())
        self.unlock(req.lock)
        self.rows.append(req.kv.req_pool_idx)

    def hold(self) -> None:
        """Lock and unlock places, as for a request that waits."""
        if self.extra and self.random.random() < 0.5:
            self.unlock(self.extra.pop(0))
        else:
            self.extra.append(self.lock(self.match(self.key())))
            if self.extra[-1].node.length == 0:
                self.extra.pop()

    def look(self) -> None:
        place = self.home.match(self.key()).last_device_node
        calls: dict[str, Callable[[], Any]] = {
            "indices": lambda: self.cache.path_device_indices(place),
            "touch": lambda: self.cache.touch_prefix(self.home.key(self.known[-1])),
            "order": lambda: self.cache.dfs_weight_order([place]),
            "sizes": self.home.sizes,
        }
        name = self.random.choice(list(calls))
        self.cut(name, calls[name])

    def run_one(self) -> None:
        rules = [self.admit] * 4 + [self.checkpoint] * 6 + [self.end] * 3 + [self.hold] * 2 + [self.look] * 2
        self.random.choice(rules)()

    # Checks

    def check(self) -> None:
        home, tree = self.home, self.cache.tree
        tree.check()
        home.allocator.free(tree.evict(0).slots)  # as the next eviction does
        nodes = nodes_of(tree.content())
        free = [
            first * self.page + at for first in home.allocator.get_all_free_pages().tolist() for at in range(self.page)
        ]
        own = [
            slot
            for req in self.requests
            for slot in self.row(req)[req.kv.cache_protected_len : req.kv.kv_allocated_len].tolist()
        ]
        counts = Counter([*free, *own, *(slot for node in nodes for slot in node.slots)])
        assert max(counts.values()) == 1, "a slot has two owners"
        assert len(counts) == home.allocator.size, "a slot is lost"
        held = sum(req.lock.node.length > 0 for req in self.requests) + len(self.extra)
        assert sum(node.own_locks for node in nodes) == held, "locks"
        for req in self.requests:
            cached = self.cache.path_device_indices(req.lock.node).tolist()
            assert self.row(req)[: len(cached)].tolist() == cached, "a row has other slots than the tree"
            assert len(cached) == req.kv.cache_protected_len

    def row(self, req: Any) -> Any:
        return self.home.pool.req_to_token[req.kv.req_pool_idx]

    def close(self) -> None:
        while self.requests:
            self.end()
        while self.extra:
            self.unlock(self.extra.pop())
        self.check()
        assert self.cache.protected_size() == 0
        self.cache.evict(SGLANG.base.EvictParams(num_tokens=10**6))
        assert self.home.allocator.available_size() == self.home.allocator.size, "slots that nobody frees"


def run(seed: int, number: int, _folder: Path) -> Counter[str]:
    return run_programs(Program, f"{seed}/{number}", PROGRAMS, STEPS, STEPS_A_CHECK)
