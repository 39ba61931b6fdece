"""Interrupted calls of a PrefixCache: each slot has one owner, no request reads wrong KV, a call is done or is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from flatradix import PrefixCache, Request
from flatradix.cache import home
from flatradix.inspect.nodes import nodes_of
from tests.fuzz.cuts import Cutter, run_programs
from tests.support.prefix_engine import Engine, fingerprints

NAMES = (None, None, "a", b"b")
LONGEST = 40
PROGRAMS, STEPS, STEPS_A_CHECK = 3, 60, 3


class Program:
    """An engine that is interrupted within the calls of its cache, and goes on."""

    def __init__(self, random: Random, counts: Counter[str]) -> None:
        self.random = random
        self.page = random.choice((1, 4))
        options: dict[str, Any] = {
            "policy": random.choice(("lru", "lfu", "priority", "slru")),
            "evict_by": random.choice(("page", "node")),
        }
        slots = self.page * random.randint(14, 60)
        apart = random.random() < 0.3
        with patch.object(home, "apart", lambda kv: apart):
            cache = PrefixCache(slots, self.page, 7, LONGEST, **options)
        self.engine = Engine(cache)
        self.cache = cache
        self.queue = cache.queue(keep=random.random() < 0.5)
        self.waiting: dict[int, Any] = {}
        self.cutter = Cutter(random, counts)
        self.known: list[list[int]] = [[]]
        self.sound: set[Request] = set()  # requests that the engine knows

    def prompt(self) -> list[int]:
        random, stem = self.random, self.random.choice(self.known)
        prompt = stem[: random.randint(0, len(stem))] + [random.randint(0, 2) for _ in range(random.randint(1, 9))]
        self.known = [*self.known[-10:], prompt[:30]]
        return prompt[:30]

    def some(self) -> list[Request]:
        running = list(self.cache.running)
        return self.random.sample(running, self.random.randint(min(1, len(running)), min(3, len(running))))

    def state(self) -> Any:
        """Return what calls on requests change. Serials tell which requests run, and their numbers what they have."""
        running = self.cache.running
        columns = (running.serials, running.num_tokens, running.lengths, running.committed)
        return [column.tolist() for column in columns]

    def cut(self, name: str, call: Callable[[], Any]) -> bool:
        """Make a call that may be interrupted; return whether the requests have changed."""
        before = self.state()
        self.cutter.cut(name, call, lambda: self.state() != before)
        return self.state() != before

    # Calls

    def begin(self) -> None:
        random = self.random
        count, share = random.choice((1, 1, 2, 3)), random.random() < 0.4
        prompts = [self.prompt() for _ in range(count)]
        names = [random.choice(NAMES) for _ in prompts]
        chunk = random.randint(1, 12) if not share and random.random() < 0.3 else None
        self.cut("begin", lambda: self.cache.begin(prompts, names, random.choice((0, 1)), share, chunk))
        self.adopt(share)

    def begin_queued(self) -> None:
        prompts, name = [self.prompt() for _ in range(self.random.randint(1, 3))], self.random.choice(NAMES)
        before = set(self.queue.ids().tolist())
        self.cutter.cut("add", lambda: self.queue.add(prompts, name), lambda: len(self.queue) > len(before))
        share = self.random.random() < 0.4
        waiting = len(self.queue)
        self.cut("queue.begin", lambda: self.queue.begin("lpm", token_budget=40, share=share))
        began = [request for request in self.cache.running if request not in self.sound]
        assert len(began) == waiting - len(self.queue), "prompts neither wait nor run, or both"
        self.adopt(share)
        if len(self.queue) > 8:
            self.cutter.cut("remove", lambda: self.queue.remove(self.queue.ids()), lambda: len(self.queue) == 0)

    def adopt(self, share: bool) -> None:
        """Take what runs since a `begin` into the engine: an interrupted one has begun nothing, or all."""
        engine = self.engine
        began = [request for request in self.cache.running if request not in self.sound]
        for request in began:
            self.sound.add(request)
            engine.kv[request.slots.numpy()[request.committed :]] = 0
            engine.computed[request] = request.committed
            if share:
                engine.together[request] = began
        for request in began:
            engine.compare(request)
        if share:
            engine.forward(began)

    def ready(self) -> list[Request]:
        """Choose requests, and compute what is known of them and has slots."""
        chosen = self.some()
        for request in chosen:
            self.engine.compute(request, min(request.num_tokens, request.length))
        return chosen

    def commit(self) -> None:
        chosen = self.ready()
        ends = [self.random.randint(0, self.engine.computed[request]) for request in chosen]
        added = None
        if self.random.random() < 0.4:
            added = [self.tokens(request) for request in chosen]
        self.all_or_none(chosen, "commit", lambda: self.cache.commit(chosen, ends, added), added)

    def tokens(self, request: Request) -> list[int]:
        room = LONGEST + 1 - request.num_tokens
        return [self.random.randint(0, 2) for _ in range(min(room, self.random.randint(0, 3)))]

    def step(self) -> None:
        chosen = [one for one in self.ready() if one.length >= one.num_tokens and one.num_tokens < LONGEST]
        chosen = [one for one in chosen if one.length < LONGEST]
        tokens = [self.random.randint(0, 2) for _ in chosen]
        self.all_or_none(chosen, "step", lambda: self.cache.step(chosen, tokens), [[token] for token in tokens])

    def all_or_none(
        self, chosen: Sequence[Request], name: str, call: Callable[[], Any], added: list[list[int]] | None
    ) -> None:
        before = [request.num_tokens for request in chosen]
        self.cut(name, call)
        if added is not None:
            grown = [request.num_tokens - count for request, count in zip(chosen, before, strict=True)]
            wanted = [len(tokens) for tokens in added]
            assert grown in (wanted, [0] * len(chosen)), f"{name}: {grown} new tokens, not {wanted} and not none"

    def extend(self) -> None:
        chosen = [request for request in self.some() if request.length < LONGEST]
        more = [self.random.randint(0, LONGEST - request.length) % 6 for request in chosen]
        self.cut("extend", lambda: self.cache.extend(chosen, more))

    def fork(self) -> None:
        for request in self.ready()[:1]:
            if request.length < request.num_tokens:
                continue
            self.cut("fork", lambda: self.cache.fork(request, 2))  # noqa: B023
            for fork in self.cache.running:
                if fork not in self.sound:
                    self.sound.add(fork)
                    self.engine.computed[fork] = fork.committed
                    self.engine.compute(fork, min(fork.num_tokens, fork.length))

    def finish(self) -> None:
        chosen = self.ready()
        ends = [self.random.randint(0, self.engine.computed[request]) for request in chosen]
        touch = self.random.random() < 0.3
        self.cut("finish", lambda: self.cache.finish(chosen, ends, touch=touch))
        self.forget(chosen)

    def abort(self) -> None:
        chosen = self.some()
        self.cut("abort", lambda: self.cache.abort(chosen))
        self.forget(chosen)

    def forget(self, chosen: Sequence[Request]) -> None:
        ended = {request.state == "ended" for request in chosen}
        assert len(ended) < 2, "a part of the requests has ended"
        if ended == {True}:
            self.sound -= set(chosen)

    def look(self) -> None:
        prompts = [self.prompt() for _ in range(2)]
        calls: dict[str, Callable[[], Any]] = {
            "probe": lambda: self.cache.probe(prompts),
            "counts": self.cache.counts,
            "free_space": self.cache.free_space,
            "cached_lengths": self.queue.cached_lengths,
            "order": lambda: self.queue.order("dfs-weight"),
            "check": self.cache.check,
        }
        name = self.random.choice(list(calls))
        before = self.state()
        self.cutter.cut(name, calls[name])
        assert self.state() == before, f"{name} has changed requests"

    def run_one(self) -> None:
        rules = (
            [self.begin] * 4 + [self.begin_queued] * 2 + [self.commit] * 4 + [self.step] * 4 + [self.extend] * 2
            + [self.fork] + [self.finish] * 3 + [self.abort] + [self.look] * 2
        )  # fmt: skip
        self.random.choice(rules)()

    def check(self) -> None:
        cache, engine = self.cache, self.engine
        cache.check()
        assert set(cache.running) == self.sound, "requests that run"
        for request in cache.running:
            engine.compare(request)
            assert request.committed <= engine.computed[request], "committed before it was computed"
        for node in nodes_of(cache.tree.content()):
            kv = fingerprints(node.path, node.namespace)[node.start :]
            assert engine.kv[list(node.slots)].tolist() == kv, "wrong KV is cached"

    def close(self) -> None:
        self.cache.abort(self.cache.running)
        counts = self.cache.counts()
        assert (counts.running, counts.protected, counts.held) == (0, 0, 0), "slots that nobody holds"
        assert counts.free + counts.evictable == counts.slots


def run(seed: int, number: int, _folder: Path) -> Counter[str]:
    return run_programs(Program, f"{seed}/{number}", PROGRAMS, STEPS, STEPS_A_CHECK)
