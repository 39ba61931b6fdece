"""Random programs for a PrefixCache: every slot holds the KV of its token's prefix, and no slot is lost."""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flatradix import PrefixCache, Request, Requests
from tests.support.prefix_engine import Engine, common

SEEDS = st.integers(0, 2**32 - 1).map(Random)
POLICIES = ("lru", "lfu", "priority", "slru")


class Machine(RuleBasedStateMachine):
    """Requests that share prefixes, in a pool that is too small for them."""

    def __init__(self, where: dict[str, str]) -> None:
        super().__init__()
        self.where = where

    @initialize(
        page=st.sampled_from([1, 4]),
        pages=st.integers(6, 30),
        policy=st.sampled_from(POLICIES),
        evict_by=st.sampled_from(["node", "page", "page"]),
    )
    def start(self, page: int, pages: int, policy: str, evict_by: str) -> None:
        options = {"policy": policy, "evict_by": evict_by}
        self.engine = Engine(PrefixCache(page * pages, page, 7, 40, **options, **self.where))
        self.cache = self.engine.cache
        self.known: list[list[int]] = [[]]

    @property
    def running(self) -> Requests:
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

    @rule(random=SEEDS, count=st.integers(1, 5), share=st.booleans())
    def begin(self, random: Random, count: int, share: bool) -> None:
        prompts = [self.prompt(random) for _ in range(count)]
        self.begin_these(random, prompts, random.choices([None, None, "a"], k=count), share)

    @rule(name=st.sampled_from([None, "a"]))
    def drop(self, name: str | None) -> None:
        """Drop a namespace in which requests may run."""
        free = self.cache.free_space()[0]
        freed = self.cache.drop(name)
        assert self.cache.free_space()[0] == free + freed
        assert not self.cache.tree.match(self.known, name, touch=False).lengths.any()

    @rule(random=SEEDS, count=st.integers(2, 5))
    def begin_family(self, random: Random, count: int) -> None:
        """Begin prompts with a new prefix in common, which they share; some share more of one another."""
        prompts = [[*self.prompt(random)[:8], *random.choices(range(3, 5), k=random.randint(2, 10))]]
        while len(prompts) < count:
            stem = random.choice(prompts)
            cut = random.choice((len(stem), len(stem) - 1, random.randint(0, len(stem))))
            prompts.append((stem[:cut] + random.choices(range(3, 6), k=random.randint(1, 6)))[:36])
        self.known = [*self.known[-12:], random.choice(prompts)]
        name = random.choice([None, "a"])
        names = [name if random.random() < 0.9 else None for _ in prompts]
        self.begin_these(random, prompts, names, share=True)

    def begin_these(self, random: Random, prompts: list[list[int]], names: list[str | None], share: bool) -> None:
        keys = [prompt[:-1] for prompt in prompts]
        cached = self.cache.tree.match(keys, names, touch=False).lengths.tolist()
        idle = not self.running
        held = self.cache.counts().held
        requests = self.engine.begin(prompts, names, random.randint(0, 2), share)
        started = [request for request in requests if request.state == "running"]
        for request, length in zip(requests, cached, strict=True):
            if request.state == "running":
                assert request.committed <= length
                assert request.length == request.num_tokens
            else:
                assert request.missing > 0 or len(self.running) == 7
        self.compare_shared(started, share)
        needed = sum(self.pages(request.tokens) - request.cached_length for request in started)
        assert self.cache.counts().held == held + needed
        if idle and self.pages(prompts[0]) <= self.cache.counts().slots:
            assert requests[0].state == "running"
            assert requests[0].cached_length == cached[0]

    def compare_shared(self, started: list[Request], share: bool) -> None:
        """Compare what the requests of a `begin` share with plain Python."""
        page = self.cache.page_size
        for number, request in enumerate(started):
            key = request.tokens[:-1]
            shared: dict[Request | None, int] = {None: request.committed}
            for other in started[:number] if share else ():
                if other.namespace == request.namespace:
                    shared[other] = common(key, other.tokens[:-1]) // page * page
            longest = max(shared.values())
            assert request.cached_length == longest
            lenders = [other for other, length in shared.items() if length == longest]
            assert request.lender is lenders[0]
            assert request.borrowed == (longest if lenders[0] else 0)

    @precondition(lambda self: self.running)
    @rule(random=SEEDS)
    def compute_and_commit(self, random: Random) -> None:
        requests = self.some(random)
        ends = []
        for request in requests:
            done, most = self.engine.computed[request], min(request.num_tokens, request.length)
            if request in self.engine.together or request.borrowed:
                done = request.committed
            ends.append(random.randint(done, max(done, most)))
            self.engine.compute(request, ends[-1])
        self.cache.commit(requests, ends)

    @precondition(lambda self: self.running)
    @rule(random=SEEDS, n=st.integers(1, 3))
    def decode(self, random: Random, n: int) -> None:
        requests = [request for request in self.some(random) if request.length + n <= 40]
        lengths = [request.length for request in requests]
        short = self.cache.extend(requests, n)
        for request, length in zip(requests, lengths, strict=True):
            assert request.length == length + n * (request not in short)
        grown = [request for request in requests if request not in short]
        self.cache.commit(grown, 0, tokens=[[random.randint(0, 2) for _ in range(n)] for _ in grown])

    @precondition(lambda self: self.running)
    @rule(random=SEEDS, n=st.integers(0, 2))
    def step(self, random: Random, n: int) -> None:
        """Decode requests of which all is computed, as a batch."""
        chosen = [request for request in self.some(random) if request.length == request.num_tokens <= 38]
        for request in chosen:
            self.engine.compute(request, request.length)
        running = self.running
        batch = running[[at for at, request in enumerate(running) if request in chosen]]
        chosen = list(batch)
        lengths, slots = batch.lengths, [one.slots.tolist() for one in chosen]
        short, changed = self.cache.step(batch, [random.randint(0, 2) for _ in chosen], n)
        for request, length, before in zip(chosen, lengths.tolist(), slots, strict=True):
            assert (request.num_tokens, request.length) == (length + 1, length + n * (request not in short))
            assert request in changed or request.slots.tolist()[:length] == before

    @precondition(lambda self: self.running)
    @rule(random=SEEDS, n=st.integers(1, 2))
    def fork(self, random: Random, n: int) -> None:
        request = random.choice(self.running)
        self.engine.compute(request, min(request.num_tokens, request.length))
        page = self.cache.page_size
        forks, copies = self.cache.fork(request, n)
        for source, target in copies.tolist():
            old, new = (slice(page * number, page * (number + 1)) for number in (source, target))
            self.engine.kv[new] = self.engine.kv[old]
        for fork in forks.only_running():
            assert fork.slots.tolist()[: fork.committed] == request.slots.tolist()[: fork.committed]
            self.engine.computed[fork] = min(fork.num_tokens, fork.length)

    @rule(random=SEEDS, count=st.integers(0, 4))
    def probe(self, random: Random, count: int) -> None:
        prompts = [self.prompt(random) for _ in range(count)]
        names = random.choices([None, None, "a"], k=count)
        digest = self.cache.tree.digest()
        found = self.cache.probe(prompts, names)
        assert self.cache.tree.digest() == digest
        keys = [prompt[:-1] for prompt in prompts]
        if count:
            assert found.cached_lengths.tolist() == self.cache.tree.match(keys, names, touch=False).lengths.tolist()
            (request,) = self.cache.begin(prompts[:1], names[:1])
            assert (request.state == "running") == found.fits[0]
            if request.state == "running":
                assert request.cached_length == found.cached_lengths[0]
                self.cache.abort([request])

    @precondition(lambda self: self.engine.together)
    @rule(random=SEEDS)
    def forward(self, random: Random) -> None:
        """Compute requests that began together, and commit nothing yet."""
        self.engine.forward(self.engine.together[random.choice([*self.engine.together])])

    @precondition(lambda self: self.running)
    @rule(random=SEEDS)
    def end(self, random: Random) -> None:
        requests = self.some(random)
        self.forget(requests)
        self.cache.abort(requests)

    @property
    def lenders(self) -> list[Request]:
        return [request.lender for request in self.running if request.lender]

    @precondition(lambda self: self.lenders)
    @rule(random=SEEDS)
    def end_lender(self, random: Random) -> None:
        """End one request from which others borrow, with some or all of what it lends not committed."""
        lender = random.choice(self.lenders)
        up_to = random.choice((0, random.randint(0, lender.num_tokens)))
        if up_to:
            self.engine.compute(lender, up_to)
        self.forget([lender])
        if up_to or random.random() < 0.5:
            self.cache.finish([lender], up_to)
        else:
            self.cache.abort([lender])

    @precondition(lambda self: self.lenders)
    @rule(random=SEEDS)
    def commit_family(self, random: Random) -> None:
        """Commit up to any length for some requests that borrow or lend."""
        family = [*{*self.lenders, *(request for request in self.running if request.borrowed)}]
        requests = random.sample(sorted(family, key=lambda request: request.row), random.randint(1, len(family)))
        ends = [random.randint(0, min(request.num_tokens, request.length)) for request in requests]
        for request, end in zip(requests, ends, strict=True):
            self.engine.compute(request, end)
        self.cache.commit(requests, ends)

    def forget(self, requests: list[Request]) -> None:
        for request in requests:
            self.engine.computed.pop(request)
            self.engine.together.pop(request, None)

    @precondition(lambda self: self.running)
    @rule(random=SEEDS)
    def finish(self, random: Random) -> None:
        requests = self.some(random)
        for request in requests:
            self.engine.compute(request, min(request.num_tokens, request.length))
            self.known = [*self.known[-12:], request.tokens[:36].tolist()]
        self.forget(requests)
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
