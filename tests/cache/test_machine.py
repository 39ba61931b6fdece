"""Random programs for a PrefixCache: every slot holds the KV of its token's prefix, and no slot is lost."""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from flatradix import PrefixCache, Request
from tests.support.prefix_engine import Engine

POLICIES = ("lru", "lfu", "priority", "slru")


class Machine(RuleBasedStateMachine):
    """Requests that share prefixes, in a pool that is too small for them."""

    def __init__(self, where: dict[str, str]) -> None:
        super().__init__()
        self.where = where

    @initialize(
        page=st.sampled_from([1, 4]),
        pages=st.integers(6, 20),
        policy=st.sampled_from(POLICIES),
        evict_by=st.sampled_from(["node", "page", "page"]),
    )
    def start(self, page: int, pages: int, policy: str, evict_by: str) -> None:
        options = {"policy": policy, "evict_by": evict_by}
        self.engine = Engine(PrefixCache(page * pages, page, 5, 40, **options, **self.where))
        self.cache = self.engine.cache
        self.known: list[list[int]] = [[]]

    @property
    def running(self) -> list[Request]:
        return self.cache.running

    def prompt(self, random: Random) -> list[int]:
        stem = random.choice(self.known)
        stem = stem[: random.randint(0, len(stem))]
        prompt = (stem + [random.randint(0, 2) for _ in range(random.randint(1, 9))])[:36]
        self.known = [*self.known[-12:], prompt]
        return prompt

    def pages(self, prompt: list[int]) -> int:
        return -(-len(prompt) // self.cache.page_size) * self.cache.page_size

    def some(self, random: Random) -> list[Request]:
        running = self.running
        return random.sample(running, random.randint(min(1, len(running)), len(running)))

    @rule(random=st.integers(0, 2**32 - 1).map(Random), count=st.integers(1, 3))
    def begin(self, random: Random, count: int) -> None:
        prompts = [self.prompt(random) for _ in range(count)]
        names = random.choices([None, None, "a"], k=count)
        keys = [prompt[:-1] for prompt in prompts]
        cached = self.cache.tree.match(keys, names, touch=False).lengths.tolist()
        idle = not self.running
        requests = self.engine.begin(prompts, names, random.randint(0, 2))
        for request, length in zip(requests, cached, strict=True):
            if request.state == "running":
                assert request.cached_length <= length
                assert request.length == request.num_tokens
            else:
                assert request.missing > 0 or len(self.running) == 5
        if idle and self.pages(prompts[0]) <= self.cache.counts().slots:
            assert requests[0].state == "running"
            assert requests[0].cached_length == cached[0]

    @rule(random=st.integers(0, 2**32 - 1).map(Random))
    def compute_and_commit(self, random: Random) -> None:
        requests = self.some(random)
        ends = []
        for request in requests:
            done, most = self.engine.computed[request], min(request.num_tokens, request.length)
            ends.append(random.randint(done, max(done, most)))
            self.engine.compute(request, ends[-1])
        self.cache.commit(requests, ends)

    @rule(random=st.integers(0, 2**32 - 1).map(Random), n=st.integers(1, 3))
    def decode(self, random: Random, n: int) -> None:
        requests = [request for request in self.some(random) if request.length + n <= 40]
        lengths = [request.length for request in requests]
        short = self.cache.extend(requests, n)
        for request, length in zip(requests, lengths, strict=True):
            assert request.length == length + n * (request not in short)
        grown = [request for request in requests if request not in short]
        self.cache.commit(grown, 0, tokens=[[random.randint(0, 2) for _ in range(n)] for _ in grown])

    @rule(random=st.integers(0, 2**32 - 1).map(Random))
    def end(self, random: Random) -> None:
        requests = self.some(random)
        for request in requests:
            self.engine.computed.pop(request)
        self.cache.abort(requests)

    @rule(random=st.integers(0, 2**32 - 1).map(Random))
    def finish(self, random: Random) -> None:
        requests = self.some(random)
        for request in requests:
            self.engine.compute(request, min(request.num_tokens, request.length))
            self.engine.computed.pop(request)
            self.known = [*self.known[-12:], request.tokens[:36].tolist()]
        self.cache.finish(requests)
        assert all(request.state == "ended" for request in requests)

    @rule()
    def check(self) -> None:
        """Check the cache. Not an invariant after each step, because it waits for an index on a GPU."""
        self.cache.check()

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()
            self.cache.abort(self.running)
            self.cache.check()
            assert self.cache.counts().protected == self.cache.counts().held == 0

    @invariant()
    def kv_is_that_of_the_prefix(self) -> None:
        for request in self.running:
            self.engine.compare(request)


def test_random_programs(where: dict[str, str]) -> None:
    run_state_machine_as_test(lambda: Machine(where))  # type: ignore[arg-type]
