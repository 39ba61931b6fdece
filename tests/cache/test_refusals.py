"""PrefixCache without free slots, and with bad arguments: a refused request holds nothing, an error changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flatradix import PrefixCache
from tests.support.prefix_engine import Engine, engine


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
    assert this.begin([list(range(200, 224))])[0].state == "running"
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
    """`extend` returns the requests that do not fit. When one of them ends, another one fits."""
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


@pytest.mark.parametrize(("evict_by", "evicted"), [("node", 16), ("page", 12)])
def test_what_is_cached_goes_before_a_request_is_refused(evict_by: str, evicted: int, where: dict[str, str]) -> None:
    """12 slots are missing. Nodes have 8."""
    this = engine(where, 32, evict_by=evict_by)
    for first in (0, 50, 100):
        this.run(list(range(first, first + 9)))
    (request,) = this.begin([list(range(200, 220))])
    assert request.state == "running"
    assert this.cache.counts().evicted_tokens == evicted
    assert this.cache.extend([request], 12) == []
    assert this.cache.counts().free == 0
    this.cache.check()


def test_whoever_is_alone_and_fits_starts(where: dict[str, str]) -> None:
    """The cached prefix of one prompt of a batch must not keep another prompt from starting."""
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


def test_a_begin_that_fails_on_the_way_leaves_nothing_behind(
    where: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all three prompts fit, so they start one by one. The first has started when the third gets no memory."""
    this = engine(where, 16)
    this.run(list(range(9)))
    admit, admitted = this.cache._state.pages.admit, []

    def no_memory(prompts: Any, place: Any, grant: Any) -> None:
        admitted.append(int((grant.lengths - grant.begins).sum()))
        if len(admitted) == 2:
            raise torch.OutOfMemoryError
        admit(prompts, place, grant)

    monkeypatch.setattr(this.cache._state.pages, "admit", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        this.begin([[50, 51], [60] * 40, [70, 71]])
    assert admitted == [2, 2]
    counts = this.cache.counts()
    assert (counts.running, counts.held, counts.free + counts.evictable) == (0, 0, 16)
    this.cache.check()


# Bad arguments


def test_the_largest_chunk_is_no_chunk(where: dict[str, str]) -> None:
    """Sums of token numbers must not overflow: pages would be taken that are not there."""
    this = engine(where, 64, max_length=20)
    this.run([1, 2, 3, 4, 5])
    this.run([9, 8, 7, 6, 5])
    prompts = [[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4], [*range(20)]]
    for chunk in (2**63 - 1, 2**70):
        requests = this.cache.begin(prompts, chunk=chunk)
        assert requests.lengths.tolist() == [6, 6, 20]
        this.cache.check()
        this.cache.abort(requests)


def test_the_largest_number_of_slots_is_too_many(where: dict[str, str]) -> None:
    this = engine(where, 8, max_length=20)
    requests = this.begin([[1, 2], [3, 4]])
    for call in (this.cache.extend, lambda who, n: this.cache.step(who, [5, 6], n)):
        nothing_changed(this, lambda call=call: call(requests, [2**63 - 1, 18]), "more are asked for")
        nothing_changed(this, lambda call=call: call(requests, None), "n must be an integer")
    nothing_changed(this, lambda: this.cache.step(requests, None), "give what each request has generated")
    nothing_changed(this, lambda: this.cache.commit(requests, 2**63 - 1), "cannot have")
    nothing_changed(this, lambda: this.cache.fork(requests[0], 2.5), "fork: n must be a positive integer")
    this.cache.check()


def test_a_bad_token_costs_no_repair(where: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    this = engine(where, 16)
    this.run([*range(9)])
    monkeypatch.setattr("flatradix.cache.recover.repair", lambda *_: pytest.fail("a repair"))
    for prompts in ([[1, -1]], [[*range(8), 2**31]], [[1, 2], [*range(8), 50, -3]], [[5] * 9, [6] * 9, [7, -1]]):
        nothing_changed(this, lambda prompts=prompts: this.cache.begin(prompts), "outside")
    this.cache.check()


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
        (lambda: cache.begin([[1], [2]], ["a"]), "namespace"),
        (lambda: cache.commit([a, a]), "request 1 is there twice"),
        (lambda: cache.commit([foreign]), "request 0 is of another PrefixCache"),
        (lambda: cache.abort([a, ended]), "abort: request 1 has ended"),
        (lambda: cache.commit([a, b], [9, 3]), "request 1 cannot have 3 tokens computed: it has 4 slots, and 2 tokens"),
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
        ({"num_slots": 8, "page_size": 0}, "page_size must be a positive integer"),
        ({"num_slots": 8, "max_requests": 0}, "max_requests must be a positive integer"),
        ({"num_slots": 8, "max_length": 0}, "max_length must be a positive integer"),
        ({"num_slots": 8, "policy": "best"}, "best"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixCache(**options)
