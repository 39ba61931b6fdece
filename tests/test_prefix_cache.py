"""PrefixCache: what requests get, what becomes of their slots, and that the KV in a slot is that of its token's prefix.

The KV of a token is a fingerprint of its namespace and all tokens up to it, as that is what a real one depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from flatradix import PrefixCache, Request, prefix_cache
from flatradix.check import nodes_of
from tests.conftest import GPU, usable
from tests.devices import interpreted

# Where index and slots are: both beside one another on a device, or an index on the CPU with the slots elsewhere.
WHERE = ["cpu", "apart", GPU, pytest.param("cuda apart", marks=pytest.mark.gpu)]


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Keyword arguments of a PrefixCache."""
    name = request.param
    if name == "apart":
        monkeypatch.setattr(prefix_cache, "_slot_device", lambda index, kv: kv)
    if name.startswith("cuda"):
        usable("cuda")
        if name == "cuda apart" and interpreted():
            pytest.skip("an interpreter has no second device")
    kv = "cuda" if name.startswith("cuda") and not interpreted() else "cpu"
    return {"device": "cuda" if name == "cuda" else "cpu", "kv_device": kv}


def fingerprints(tokens: Sequence[int], namespace: Any) -> list[int]:
    """The KV of each token."""
    found, state = [], hash(("kv", namespace))
    for token in tokens:
        state = hash((state, int(token)))
        found.append(state)
    return found


class Engine:
    """An engine's KV memory, and which tokens of each request it has computed."""

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self.kv = np.zeros(cache.counts().slots, dtype=np.int64)
        self.computed: dict[Request, int] = {}

    def begin(self, prompts: list[list[int]], namespaces: Any = None, priority: Any = 0) -> list[Request]:
        requests = self.cache.begin(prompts, namespaces, priority)
        for request in requests:
            if request.state == "running":
                self.computed[request] = request.cached_length
                self.compare(request)
        return requests

    def compute(self, request: Request, up_to: int) -> None:
        """The KV of tokens that are known and have slots."""
        begin = self.computed[request]
        self.kv[request.slots.cpu().numpy()[begin:up_to]] = fingerprints(request.tokens, request.namespace)[begin:up_to]
        self.computed[request] = max(begin, up_to)

    def compare(self, request: Request) -> None:
        """What a request would attend to is what it computed or would have computed."""
        end = self.computed[request]
        expected = fingerprints(request.tokens[:end], request.namespace)
        assert self.kv[request.slots.cpu().numpy()[:end]].tolist() == expected

    def run(self, prompt: list[int], namespace: Any = None) -> Request:
        """A whole request."""
        (request,) = self.begin([prompt], namespace)
        self.compute(request, request.length)
        self.cache.finish([request])
        return request


def engine(where: dict[str, str], slots: int = 64, **options: Any) -> Engine:
    return Engine(PrefixCache(slots, **{"page_size": 4, "max_requests": 4, "max_length": 64} | options, **where))


def test_a_prompt_is_computed_once(where: dict[str, str]) -> None:
    this = engine(where)
    prompt = list(range(21))
    first = this.run(prompt)
    assert (first.cached_length, first.state, first.committed) == (0, "ended", 20)
    again, longer, other = this.begin([prompt, [*prompt, 7, 8], [*prompt[:9], 5]])
    assert [request.cached_length for request in (again, longer, other)] == [20, 20, 8]
    assert [request.length for request in (again, longer, other)] == [21, 23, 10]
    assert again.slots.tolist()[:20] == longer.slots.tolist()[:20]
    counts = this.cache.counts()
    assert (counts.held, counts.protected, counts.free) == (4 + 4 + 4, 20, 64 - 32)
    assert (counts.prompt_tokens, counts.cached_tokens, counts.requests) == (21 + 21 + 23 + 10, 48, 4)
    assert counts.hit_rate == 48 / 75
    assert counts.occupancy == 0.5
    this.cache.check()


def test_the_last_token_is_always_computed(where: dict[str, str]) -> None:
    this = engine(where)
    this.run(list(range(8)))
    for length, cached in ((8, 4), (9, 8), (1, 0), (4, 0), (5, 4)):
        (request,) = this.begin([list(range(length))])
        assert request.cached_length == cached
        this.cache.abort([request])
    this.cache.check()


def test_namespaces_share_nothing(where: dict[str, str]) -> None:
    this = engine(where)
    prompt = list(range(9))
    this.run(prompt, "a")
    found = this.begin([prompt, prompt, prompt], ["a", "b", None])
    assert [request.cached_length for request in found] == [8, 0, 0]
    this.cache.check()


def test_who_commits_later_takes_over_the_slots_of_the_first(where: dict[str, str]) -> None:
    this = engine(where)
    prompt = list(range(10))
    first, second = this.begin([prompt, [*prompt[:6], 50, 51, 52]])
    own = second.slots.tolist()
    for request in (first, second):
        this.compute(request, request.length)
    this.cache.commit([first])
    assert first.slots.tolist() == list(range(10))
    this.cache.commit([second])
    assert second.slots.tolist() == [*range(4), *own[4:]]
    counts = this.cache.counts()
    assert (counts.duplicate_tokens, counts.held, counts.protected) == (4, 4 + 4, 12)
    for request in (first, second):
        this.compare(request)
    this.cache.finish([second, first])
    assert this.cache.counts().held == this.cache.counts().protected == 0
    this.cache.check()


def test_chunks(where: dict[str, str]) -> None:
    """Each chunk can be reused as soon as it is committed."""
    this = engine(where)
    prompt = list(range(30))
    (request,) = this.begin([prompt])
    for up_to, committed in ((10, 8), (11, 8), (20, 20), (30, 28)):
        this.compute(request, up_to)
        this.cache.commit([request], up_to)
        assert request.committed == committed
        (other,) = this.begin([prompt])
        assert other.cached_length == committed
        this.compare(request)
        this.cache.abort([other])
        this.cache.check()


def test_decoding(where: dict[str, str]) -> None:
    this = engine(where, page_size=4)
    short, long = this.begin([[1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8]])
    for step in range(6):
        assert this.cache.extend([short, long]) == []
        for request in (short, long):
            request_tokens = [100 + step]
            this.cache.commit([request], 0, tokens=[request_tokens])
            this.compute(request, request.length)
        this.cache.check()
    assert (short.length, long.length) == (9, 14)
    assert this.cache.extend([short], [0]) == []
    this.cache.finish([short, long])
    (again,) = this.begin([[1, 2, 3, *range(100, 106), 7]])
    assert again.cached_length == 8
    this.cache.check()


def test_what_a_request_generated_can_be_told_when_it_ends(where: dict[str, str]) -> None:
    this = engine(where)
    (request,) = this.begin([[1, 2, 3]])
    assert this.cache.extend([request], 5) == []
    this.cache.finish([request], tokens=[[4, 5, 6, 7, 8, 9, 10]])
    assert (request.num_tokens, request.committed, request.length) == (10, 8, 8)
    assert this.cache.begin([list(range(1, 20))])[0].cached_length == 8


# Too little room


def test_what_does_not_fit_is_refused_and_holds_nothing(where: dict[str, str]) -> None:
    this = engine(where, 32, max_requests=8)
    first, large, small = this.begin([list(range(20)), list(range(100, 117)), list(range(200, 212))])
    assert [request.state for request in (first, large, small)] == ["running", "refused", "running"]
    assert large.missing == 8
    assert large.refusal == "20 slots are needed and 12 can be had: 8 too few"
    assert "was refused (20 slots are needed" in repr(large)
    with pytest.raises(ValueError, match=r"a request that was refused \(20 slots"):
        _ = large.slots
    with pytest.raises(ValueError, match=r"finish: request 1 was refused \(20 slots are needed and 12 can be had"):
        this.cache.finish([first, large])
    this.cache.check()
    this.cache.finish([first, small])
    (large,) = this.begin([list(range(100, 117))])
    assert (large.state, large.missing) == ("running", 0)
    counts = this.cache.counts()
    assert (counts.refused, counts.requests, counts.evicted_tokens) == (1, 3, 20)
    this.cache.check()


def test_a_refused_request_does_not_keep_its_prefix_locked(where: dict[str, str]) -> None:
    this = engine(where, 16)
    this.run(list(range(9)))
    (refused,) = this.begin([[*range(9), *range(50, 70)]])
    assert (refused.state, refused.missing) == ("refused", 24 - 8)
    assert this.cache.counts().protected == 0
    assert this.begin([list(range(30, 46))])[0].state == "running"
    this.cache.check()


def test_a_refused_prompt_keeps_nothing_young(where: dict[str, str]) -> None:
    this = engine(where, 32)
    for first in (0, 100):
        this.run(list(range(first, first + 8)))
    (refused,) = this.begin([[*range(8), *range(50, 90)]])
    assert refused.state == "refused"
    assert this.begin([list(range(200, 220))])[0].state == "running"
    assert this.cache.tree.match([range(8), range(100, 108)], touch=False).lengths.tolist() == [0, 8]


def test_more_requests_than_may_run(where: dict[str, str]) -> None:
    this = engine(where, max_requests=2)
    found = this.begin([[1], [2], [3]])
    assert [request.state for request in found] == ["running", "running", "refused"]
    assert found[2].refusal == "all 2 requests that max_requests allows are running"
    this.cache.abort(found[:1])
    assert this.begin([[3]])[0].state == "running"
    this.cache.check()


def test_decoding_without_room(where: dict[str, str]) -> None:
    """Those that do not fit are returned; when one of them goes, the others go on."""
    this = engine(where, 24, page_size=4)
    requests = this.begin([[1] * 8, [2] * 8, [3] * 4])
    short = this.cache.extend(requests)
    assert short == requests[1:]
    assert [request.missing for request in requests] == [0, 4, 4]
    assert [request.length for request in requests] == [9, 8, 4]
    this.cache.check()
    this.cache.abort([requests[2]])
    assert this.cache.extend([requests[1]]) == []
    assert requests[1].missing == 0
    this.cache.check()


def test_what_is_cached_goes_before_a_request_is_refused(where: dict[str, str]) -> None:
    this = engine(where, 32)
    for first in (0, 50, 100):
        this.run(list(range(first, first + 9)))
    (request,) = this.begin([list(range(200, 220))])
    assert request.state == "running"
    assert this.cache.counts().evicted_tokens == 16  # 12 are too few, and nodes of 8 go as a whole
    assert this.cache.extend([request], 12) == []
    assert this.cache.counts().free == 0
    this.cache.check()


def test_whoever_is_alone_and_fits_starts(where: dict[str, str]) -> None:
    """What is cached for one prompt of a batch must not stand in the way of another."""
    this = engine(where, 16)
    for first in (0, 100):
        this.run(list(range(first, first + 8)))
    a, b = this.begin([list(range(13)), list(range(100, 113))])
    assert (a.state, a.cached_length, b.state, b.missing) == ("running", 8, "refused", 16)
    this.cache.abort([a])
    large, small = this.begin([list(range(30)), list(range(200, 216))])
    assert (large.state, small.state) == ("refused", "running")
    assert (large.missing, large.refusal) == (16, "24 slots are needed and 8 can be had: 16 too few")
    this.cache.check()


def test_an_eviction_that_fails_leaves_nothing_behind(where: dict[str, str]) -> None:
    def broken(nodes: Any) -> torch.Tensor:
        raise RuntimeError("no score today")

    this = engine(where, 16, policy=broken)
    this.run(list(range(9)))
    (kept,) = this.begin([list(range(50, 54))])
    for call in (lambda: this.begin([[7] * 9]), lambda: this.cache.extend([kept], 9)):
        with pytest.raises(RuntimeError, match="no score today"):
            call()
        this.cache.check()
        counts = this.cache.counts()
        assert (counts.running, counts.free, counts.evictable, counts.held) == (1, 4, 8, 4)


# What the tree is told


def test_each_request_counts_one_hit_on_what_it_found(where: dict[str, str]) -> None:
    """Also one that adds no page of its own, in however many chunks it came."""
    this = engine(where, policy="lfu")
    prompt = list(range(9))
    for _ in range(4):
        this.run(prompt)
    (request,) = this.cache.begin([list(range(20))], priority=7)
    for up_to in (8, 12, 16, 20):
        this.cache.commit([request], up_to)
    together = this.cache.begin([prompt, [*prompt, 3]])
    this.cache.commit(together)
    this.cache.finish([request, *together])
    nodes = {node.path: (node.hit_count, node.priority) for node in nodes_of(this.cache.tree)}
    assert nodes == {
        tuple(range(8)): (7, 7),
        tuple(range(12)): (1, 7),
        tuple(range(16)): (1, 7),
        tuple(range(20)): (1, 7),
    }
    this.cache.check()


# Mistakes


def nothing_changed(this: Engine, call: Callable[[], Any], message: str) -> None:
    before = this.cache.counts(), this.cache.tree.digest()
    with pytest.raises(ValueError, match=message):
        call()
    assert (this.cache.counts(), this.cache.tree.digest()) == before
    this.cache.check()


def test_mistakes_change_nothing(where: dict[str, str]) -> None:
    this, other = engine(where), engine(where)
    cache = this.cache
    a, b = this.begin([list(range(9)), [1, 2]])
    (ended,) = this.begin([[7]])
    cache.abort([ended])
    (foreign,) = other.begin([[1]])
    for call, message in (
        (lambda: cache.begin([1, 2, 3]), r"wrap a single one: \[prompt\]"),
        (lambda: cache.begin([[1], []]), "tokens of query 1: the prompt is empty"),
        (lambda: cache.begin([[1], [3, -1]]), "tokens of query 1: -1 at position 1 is outside"),
        (lambda: cache.begin([[0] * 65]), "65 are more than max_length 64"),
        (lambda: cache.begin([[1], [2]], ["a"]), "namespace"),
        (lambda: cache.commit([a, a]), "request 1 is there twice"),
        (lambda: cache.commit([foreign]), "request 0 is of another PrefixCache"),
        (lambda: cache.abort([a, ended]), "abort: request 1 has ended"),
        (lambda: cache.commit([a, b], [9, 3]), "request 1 cannot have 3 tokens computed: it has 2 slots, and 2 tokens"),
        (lambda: cache.commit([a], -1), "cannot have -1 tokens"),
        (lambda: cache.finish([a, b], tokens=[[1]]), "2 requests, but tokens for 1"),
        (lambda: cache.commit([a, b], tokens=[[1], [2**31]]), "tokens of query 1: 2147483648 at position 0"),
        (lambda: cache.extend([a, b], [1, 63]), "request 1 has 2 tokens, and 63 more are asked for"),
        (lambda: cache.extend([a], -1), "give 0 or more"),
    ):
        nothing_changed(this, call, message)
    assert (a.num_tokens, b.num_tokens, a.length) == (9, 2, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 3, "page_size": 4}, r"num_slots must be from one page \(4\)"),
        ({"num_slots": 2**31}, "num_slots must be from one page"),
        ({"num_slots": 8, "page_size": 0}, "page_size must be at least 1"),
        ({"num_slots": 8, "max_requests": 0}, "max_requests must be at least 1"),
        ({"num_slots": 8, "max_length": 0}, "max_length must be at least 1"),
        ({"num_slots": 8, "policy": "best"}, "best"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixCache(**options)


def test_nothing_to_do(where: dict[str, str]) -> None:
    cache = engine(where).cache
    assert cache.begin([]) == cache.extend([]) == []
    cache.commit([])
    cache.finish([])
    cache.abort([])
    cache.check()


def test_reset(where: dict[str, str]) -> None:
    this = engine(where)
    this.run(list(range(9)))
    (request,) = this.begin([[1, 2, 3]])
    this.cache.reset()
    assert request.state == "ended"
    counts = this.cache.counts()
    assert (counts.free, counts.running, counts.requests, counts.cached_tokens) == (64, 0, 0, 0)
    this.cache.check()
    assert this.run(list(range(9))).cached_length == 0


def test_torch_defaults_do_not_matter(where: dict[str, str]) -> None:
    with torch.device("meta"), torch.inference_mode():
        this = engine(where)
    with torch.device("meta"):
        requests = this.begin([list(range(9)), list(range(5)), [3]])
        for request in requests:
            this.compute(request, request.length)
        this.cache.commit(requests)
        assert this.cache.extend(requests, [1, 0, 4]) == []
        this.cache.finish(requests[:2])
        this.cache.check()
        this.cache.abort(requests[2:])
        this.cache.reset()
        assert this.begin([[1, 2]])[0].slots.tolist() == [0, 1]


def test_long_and_short_rows(where: dict[str, str]) -> None:
    """Slots are written row by row where they are many, all at once where they are few."""
    this = engine(where, 2000, page_size=1, max_length=700)
    long = this.begin([list(range(600)), list(range(1000, 1500)), [5]])
    for request in long:
        this.compute(request, request.length)
    assert this.cache.extend(long, [3, 0, 70]) == []
    assert len({slot for request in long for slot in request.slots.tolist()}) == 603 + 500 + 71
    this.cache.check()
    for request in long:
        this.compare(request)


def test_check_finds_a_slot_in_two_places(where: dict[str, str]) -> None:
    this = engine(where)
    a, b = this.begin([[1, 2], [3]])
    kept = this.cache.table[a.row].clone()
    this.cache.table[a.row] = this.cache.table[b.row]
    with pytest.raises(AssertionError, match="slots that are free, cached or held"):
        this.cache.check()
    this.cache.table[a.row] = kept
    this.cache.check()


# Random programs


POLICIES = ("lru", "lfu", "priority", "slru")


class Machine(RuleBasedStateMachine):
    """Requests that share prefixes, in a pool that is too small for them."""

    def __init__(self, where: dict[str, str]) -> None:
        super().__init__()
        self.where = where

    @initialize(page=st.sampled_from([1, 4]), pages=st.integers(6, 20), policy=st.sampled_from(POLICIES))
    def start(self, page: int, pages: int, policy: str) -> None:
        self.engine = Engine(PrefixCache(page * pages, page, 5, 40, policy=policy, **self.where))
        self.cache = self.engine.cache
        self.known: list[list[int]] = [[]]

    @property
    def running(self) -> list[Request]:
        return list(self.cache._running.values())

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
        """Not after each step: it waits for what an index on a GPU has not told yet."""
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


# Without waiting


@pytest.mark.parametrize("index", ["cpu", "cuda"])
def test_decoding_does_not_synchronise(gpu: str, index: str) -> None:
    cache = PrefixCache(4096, 16, 8, 512, "cuda", index)
    requests = cache.begin([list(range(100)), list(range(50, 90))])
    for quiet in (False, True):  # what is compiled and allocated once may wait
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            for _ in range(20):
                assert cache.extend(requests) == []
            cache.commit(requests, tokens=[[1] * 20, [2] * 20])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    cache.finish(requests)
    cache.check()


def test_an_index_on_the_cpu_never_waits_for_the_kv(gpu: str) -> None:
    """Hits, duplicates, refusals and evictions included."""
    cache = PrefixCache(512, 16, 8, 300, "cuda")

    def live(base: int) -> None:
        prompts = [[*range(40), *range(base, base + 60)], [*range(40), *range(base, base + 50)], [7] * 300]
        requests = cache.begin(prompts)
        running = [request for request in requests if request.state == "running"]
        cache.commit(running)
        cache.extend(running[:2], 20)
        cache.finish(running[:1], tokens=[[1] * 20])
        cache.abort(running[1:])

    live(1000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for turn in range(8):
            live(2000 + 100 * turn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts = cache.counts()
    assert min(counts.evicted_tokens, counts.duplicate_tokens, counts.cached_tokens) > 0
    cache.check()
