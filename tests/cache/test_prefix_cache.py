"""PrefixCache: what requests get, and who owns their slots later."""

from __future__ import annotations

import pytest
import torch

from flatradix import CapacityError, PrefixCache, QueryError
from flatradix.inspect.nodes import nodes_of
from tests.support.prefix_engine import engine


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


def test_a_namespace_is_dropped(where: dict[str, str]) -> None:
    this = engine(where)
    prompt = list(range(13))
    for name in ("a", None):
        this.run(prompt, name)
    longer = [*prompt, 5, 6, 7, 8]
    (request,) = this.begin([longer], ["a"])
    this.compute(request, request.length)
    assert this.cache.drop("a") == 0  # the request holds all of it
    assert this.cache.probe([prompt, prompt], ["a", None]).cached_lengths.tolist() == [0, 12]
    this.cache.commit([request])
    this.compare(request)
    assert this.cache.probe([longer], ["a"]).cached_lengths.tolist() == [0]
    this.cache.check()
    this.cache.finish([request])
    with pytest.raises(QueryError, match="the namespace is a list"):
        this.cache.drop(["a"])
    assert this.cache.drop("a") == 16
    assert this.cache.drop(None) == 12
    assert this.cache.counts().free == this.cache.counts().slots
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


# Hits, reset and the table


def test_each_request_counts_one_hit_on_what_it_found(where: dict[str, str]) -> None:
    """Even if the request adds no page, and in however many chunks it comes."""
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
    nodes = {node.path: (node.hit_count, node.priority) for node in nodes_of(this.cache.tree.content())}
    assert nodes == {
        tuple(range(8)): (7, 7),
        tuple(range(12)): (1, 7),
        tuple(range(16)): (1, 7),
        tuple(range(20)): (1, 7),
    }
    this.cache.check()


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
    """Many slots are written row by row, few slots all at once."""
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
    table = this.cache.page_table
    kept = table[a.row].clone()
    table[a.row] = table[b.row]
    with pytest.raises(AssertionError, match=r"slots that are free, cached or held|row . of the .* table"):
        this.cache.check()
    table[a.row] = kept
    this.cache.check()


# Calls that do not wait


@pytest.mark.parametrize("index", ["cpu", "cuda"])
def test_decoding_does_not_synchronise(gpu: str, index: str) -> None:
    cache = PrefixCache(4096, 16, 8, 512, "cuda", index)
    requests = cache.begin([list(range(100)), list(range(50, 90))])
    for quiet in (False, True):  # the first round compiles and allocates, and may wait
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


def test_pins_with_an_end_and_a_budget(where: dict[str, str]) -> None:
    """They spare a finished prompt from the evictions of later requests, until their time has come."""
    cache = PrefixCache(8, 2, pin_budget=4, **where)
    for prompt in ([1, 2, 3, 4], [5, 6, 7, 8]):
        cache.finish(cache.begin([prompt]))
    tree = cache.tree
    tree.want(tree.match([1, 2, 3, 4], touch=False), until=10)
    with pytest.raises(CapacityError, match="4 too many"):
        tree.want(tree.match([5, 6, 7, 8], touch=False), until=10)
    for prompt, cached in (([9, 9, 9, 9], 4), ([9, 8, 7, 6], 0)):
        cache.finish(cache.begin([prompt]))
        assert tree.match([1, 2, 3, 4], touch=False).length == cached
        cache.check()
        tree.expire(10)
