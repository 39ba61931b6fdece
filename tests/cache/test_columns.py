"""PrefixCache: batches of requests, decode steps, chunks, looks, forks and tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flatradix import PrefixCache, QueryError, Ragged
from flatradix.cache.input import Prompts, read_prompts
from flatradix.inputs.sequences import Batch
from tests.support.prefix_engine import engine, fingerprints

# Batches


def test_a_batch_is_a_sequence_of_views(where: dict[str, str]) -> None:
    cache = engine(where).cache
    requests = cache.begin([[1, 2, 3], [4] * 70, [5, 6, 7, 8, 9]])
    assert len(requests) == 3
    assert requests.running.tolist() == [True, False, True]
    assert requests[1].refusal == "70 tokens are more than max_length 64: cut the prompt"
    assert requests[1].num_tokens == 70
    assert requests[-1] is requests[2] is next(iter(requests[2:]))
    assert requests.lengths.tolist() == requests.num_tokens.tolist() == [3, 0, 5]
    running = requests.only_running()
    assert [request.num_tokens for request in running] == [3, 5]
    assert [*running[[True, False]]] == [requests[0]]
    cache.commit(running)
    assert requests.committed.tolist() == [0, 0, 4]
    cache.finish(requests[:1])
    assert requests.running.tolist() == [False, False, True]
    assert (requests[0].state, requests[1].state, requests[2].state) == ("ended", "refused", "running")
    assert cache.running == [requests[2]]
    with pytest.raises(QueryError, match="finish: request 0 has ended"):
        cache.finish(requests)
    with pytest.raises(IndexError):
        _ = requests[3]
    cache.check()


def test_a_row_is_used_again_by_another_request(where: dict[str, str]) -> None:
    """What was said about the first request must not be read from the second."""
    cache = engine(where, max_requests=1).cache
    first = cache.begin([[1, 2, 3]])
    looked_at = first[0]
    cache.abort(first)
    second = cache.begin([[4, 5, 6, 7, 8]])
    assert (looked_at.state, looked_at.num_tokens, looked_at.row) == ("ended", 3, -1)
    assert (first.lengths.tolist(), first[0].state) == ([0], "ended")
    assert second[0].num_tokens == 5
    with pytest.raises(QueryError, match="abort: request 0 has ended"):
        cache.abort(first)
    with pytest.raises(ValueError, match="has ended has no tokens"):
        _ = looked_at.tokens


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("place", ["host", "index"])
def test_prompts_in_a_ragged(where: dict[str, str], dtype: torch.dtype, place: str) -> None:
    this = engine(where, 128, page_size=4)
    for prompt in (range(8), range(20, 29)):
        this.run([*prompt])
    prompts = [[*range(8)], [*range(8), 50], [*range(20, 28), 60, 61], [7], [70] * 65]
    ragged = Ragged.from_sequences(prompts)
    ragged = Ragged(ragged.values.to(dtype), ragged.offsets)
    if place == "index":
        ragged = ragged.to(this.cache.tree.device)
    requests = this.cache.begin(ragged, ["x", None, None, None, None])
    assert requests.cached_lengths.tolist() == [0, 8, 8, 0, 0]
    assert requests.running.tolist() == [True] * 4 + [False]
    for request, prompt in zip(requests.only_running(), prompts, strict=False):
        assert request.tokens.tolist() == prompt
    this.cache.check()
    this.cache.abort(requests.only_running())
    again = this.cache.begin(Ragged.from_sequences(prompts[:1]).to(this.cache.tree.device))
    assert again.cached_lengths.tolist() == [4]
    this.cache.check()


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_prompts_come_back_from_a_device(count: int) -> None:
    """As when one of them does not fit. Any number of them, with a Ragged in host memory in place of a GPU's."""
    ragged = Ragged.from_sequences([[at, at + 1] for at in range(count)])
    read = read_prompts(ragged, None, 0, torch.device("cpu"))
    names = ["a", *[None] * (count - 1)]
    tokens = Batch(read.tokens.addresses, read.counts, True, ragged)
    found = Prompts(tokens, names, read.priorities, ragged, 2).on_host()
    assert (found.on_device, found.names) == (None, names)
    assert [found.array(at).tolist() for at in range(count)] == [[at, at + 1] for at in range(count)]


def test_a_bad_token_changes_nothing(where: dict[str, str]) -> None:
    this = engine(where)
    this.run([*range(9)])
    digest, counts = this.cache.tree.digest(), this.cache.counts()
    for prompts in ([[1, 2], [*range(8), 50, 51, 52, 53, 54, 55, 2**31]], [[3], [*range(8), -1]]):
        with pytest.raises(QueryError, match="query 1"):
            this.cache.begin(prompts)
        assert (this.cache.tree.digest(), this.cache.counts()) == (digest, counts)
        this.cache.check()


def test_a_bad_token_is_found_wherever_it_is(where: dict[str, str]) -> None:
    """Also if the prompts start one by one, or are refused; then none has started, and nothing was evicted."""
    this = engine(where, 24, page_size=4, max_length=20)
    this.run([*range(9)])
    digest, counts = this.cache.tree.digest(), this.cache.counts()
    for prompts, query in (
        ([[*range(10, 22)], [50, 51, -5], [*range(30, 40)]], 1),
        ([[1] * 30, [50, 51, -5]], 1),
        ([[1] * 30 + [-5]], 0),
        ([[7], [1] * 21 + [2**31]], 1),
    ):
        for call in (this.cache.begin, this.cache.probe):
            with pytest.raises(QueryError, match=f"tokens of query {query}") as error:
                call(prompts)
            assert error.value.query == query
        assert (this.cache.tree.digest(), this.cache.counts()) == (digest, counts)
        this.cache.check()


def test_a_bad_token_on_a_device(where: dict[str, str]) -> None:
    cache = engine(where).cache
    for bad in (-1, 2**31):
        ragged = Ragged.from_sequences([[1, 2], [3, bad]]).to(cache.tree.device)
        for call in (cache.begin, cache.probe):
            with pytest.raises(QueryError, match="outside"):
                call(ragged)
        cache.check()
        assert cache.counts().requests == 0


def test_requests_that_are_read_once(where: dict[str, str]) -> None:
    cache = engine(where).cache
    requests = cache.begin([[1, 2, 3], [4]])
    assert cache.extend(filter(None, requests), 2) == []
    assert cache.step(iter(requests), [5, 6]).short == []
    assert requests.num_tokens.tolist() == [4, 2]
    cache.finish(request for request in requests)
    assert [request.state for request in requests] == ["ended", "ended"]
    for call in (cache.commit, cache.finish):
        with pytest.raises(ValueError, match="0 requests, but tokens for 1"):
            call([], tokens=[[1]])
    with pytest.raises(ValueError, match="0 requests, but tokens for 2"):
        cache.step([], [1, 2])


def test_a_batch_keeps_its_views(where: dict[str, str]) -> None:
    cache = engine(where).cache
    requests = cache.begin([[1, 2, 3, 4]], "x")
    request = requests[0]
    cache.finish(requests)
    assert requests[0] is request is requests[:1][0]
    assert (request.num_tokens, request.committed, request.namespace) == (4, 4, "x")
    assert requests == requests


def test_tokens_beyond_the_last_slot(where: dict[str, str]) -> None:
    """A request of max_length tokens has generated one more when it ends."""
    cache = engine(where, 64, page_size=4, max_length=10).cache
    requests = cache.begin([[*range(9)]])
    assert cache.extend(requests, 1) == []
    with pytest.raises(QueryError, match="cannot have 12 tokens computed: it has 10 slots"):
        cache.commit(requests, 12, tokens=[[9, 10, 11]])
    request = requests[0]
    cache.finish(requests, tokens=[[9, 10]])
    assert (request.num_tokens, request.committed) == (11, 8)
    cache.check()


# Decode


@pytest.mark.parametrize("form", [list, np.array, torch.tensor, lambda tokens: [[token] for token in tokens]])
def test_a_step_is_a_commit_and_an_extend(where: dict[str, str], form: object) -> None:
    assert callable(form)
    this, other = engine(where, 128, page_size=4), engine(where, 128, page_size=4)
    prompts = [[1, 2, 3], [1, 2, 3, 4, 5, 6, 7], [9] * 6]
    mine, theirs = this.cache.begin(prompts), other.cache.begin(prompts)
    this.cache.commit(mine)
    other.cache.commit(theirs)
    for step in range(9):
        tokens = [100 + step, 7, 100 + step % 2]
        short, changed = this.cache.step(mine, form(tokens))
        assert short == []
        before = [request.slots.tolist() for request in theirs]
        found = other.cache.commit(theirs, tokens=[[token] for token in tokens])
        assert [*found.rows] == [*changed.rows]
        assert other.cache.extend(theirs) == []
        for request, twin, slots in zip(mine, theirs, before, strict=True):
            assert request.slots.tolist() == twin.slots.tolist()
            assert request.tokens.tolist() == twin.tokens.tolist()
            if twin.row not in found.rows:
                assert twin.slots.tolist()[: len(slots)] == slots
        this.cache.check()
    assert this.cache.tree.digest() == other.cache.tree.digest()
    assert mine.lengths.tolist() == [12, 16, 15]


def test_the_last_token_of_a_step_is_not_computed(where: dict[str, str]) -> None:
    """Not even if there is a slot for it: after a rejected draft, the slot holds the KV of that draft."""
    cache = engine(where, 16, page_size=1).cache
    requests = cache.begin([[1, 2]])
    cache.step(requests, [3], 2)
    cache.step(requests, [4], 2)
    assert (requests[0].num_tokens, requests[0].length, requests[0].committed) == (4, 6, 3)
    assert cache.begin([[1, 2, 3, 4, 5]]).cached_lengths.tolist() == [3]
    cache.step(requests, [[5, 6]], 1)  # a draft that was accepted, and the token behind it
    assert requests[0].committed == 5
    cache.check()


def test_a_step_without_room(where: dict[str, str]) -> None:
    cache = engine(where, 12, page_size=4).cache
    requests = cache.begin([[1] * 4, [2] * 4, [3] * 3])
    cache.commit(requests)
    short, _ = cache.step(requests, [5, 6, 7])
    assert short == [requests[0], requests[1]]
    assert requests.lengths.tolist() == [4, 4, 4]
    assert requests.num_tokens.tolist() == [5, 5, 4]
    assert [request.missing for request in requests] == [4, 4, 0]
    cache.check()


def test_mistakes_in_a_step_change_nothing(where: dict[str, str]) -> None:
    cache = engine(where, max_length=8).cache
    requests = cache.begin([[1, 2], [3] * 7])
    before = cache.counts(), requests.num_tokens.tolist()
    for tokens, n, message in (
        ([1], 1, "2 requests, but tokens for 1"),
        ([1, -5], 1, "tokens of query 1: -5 at position 0"),
        ([[1], [2] * 7], 1, "step: request 1 would have 14 tokens; 12 can be known"),
        ([[1], []], [7, 0], "step: request 0 has 2 tokens, and 7 more"),
        ([[1], []], -1, "give 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.step(requests, tokens, n)
        assert (cache.counts(), requests.num_tokens.tolist()) == before
    with pytest.raises(QueryError, match="step: request 1 is there twice"):
        cache.step([requests[0], requests[0]], [1, 2])
    cache.check()


# Chunks


def test_slots_for_a_first_chunk_only(where: dict[str, str]) -> None:
    this = engine(where, 24, page_size=4)
    (request,) = this.cache.begin([[*range(30)]])
    assert request.state == "refused"
    (request,) = this.cache.begin([[*range(20)]], chunk=6)
    assert (request.num_tokens, request.length, this.cache.free_slots) == (20, 6, 16)
    slots = this.cache.table[request.row, :8].cpu().numpy()
    this.kv[slots] = fingerprints(request.tokens[:8], None)  # up to the end of the last page
    this.computed[request] = 8
    this.cache.commit([request], up_to=8)
    assert (request.length, request.committed) == (8, 8)
    assert this.cache.extend([request], 12) == []
    this.compute(request, 20)
    this.cache.finish([request])
    assert this.cache.begin([[*range(20), 1]]).cached_lengths.tolist() == [20]
    this.cache.check()


def test_more_may_not_be_computed_than_the_last_page_holds(where: dict[str, str]) -> None:
    cache = engine(where, page_size=4).cache
    requests = cache.begin([[*range(20)]], chunk=6)
    with pytest.raises(QueryError, match="cannot have 9 tokens computed: it has 8 slots"):
        cache.commit(requests, up_to=9)
    with pytest.raises(ValueError, match="chunk must be a positive integer"):
        cache.begin([[1]], chunk=0)
    with pytest.raises(ValueError, match="give `share` or `chunk`, not both"):
        cache.begin([[1]], chunk=4, share=True)
    with pytest.raises(ValueError, match="chunk must be a positive integer"):
        cache.begin([[1]], chunk=2.5)
    cache.check()


# Look without taking


def test_a_probe_finds_what_begin_would(where: dict[str, str]) -> None:
    this = engine(where, 32, max_length=40)
    this.run([*range(9)])
    this.run([*range(50, 67)])
    before = this.cache.tree.digest(), this.cache.tree.num_nodes
    prompts = [[*range(12)], [*range(4), 20], [1] * 33, [2] * 32, [3] * 41]
    found = this.cache.probe(prompts)
    assert found.cached_lengths.tolist() == [8, 4, 0, 0, 0]
    assert found.needed_slots.tolist() == [4, 4, 36, 32, 44]
    assert found.fits.tolist() == [True, True, False, True, False]
    assert (this.cache.tree.digest(), this.cache.tree.num_nodes) == before
    assert (this.cache.free_slots, this.cache.available_slots) == (8, 32)
    (held,) = this.begin([[*range(8), 30]])
    assert this.cache.probe([[1] * 20]).fits.tolist() == [True]
    assert this.cache.probe([[1] * 21]).fits.tolist() == [False]  # what is held does not go
    assert this.cache.probe([[*range(8), 31]]).fits.tolist() == [True]
    this.cache.abort([held])
    assert [request.state for request in this.begin(prompts[3:4])] == ["running"]


# Forks


def test_a_fork_shares_whole_pages(where: dict[str, str]) -> None:
    this = engine(where, 64, page_size=4, max_requests=4)
    (request,) = this.begin([[*range(10)]], "a")
    this.compute(request, 10)
    forks, copies = this.cache.fork(request, 3)
    assert forks.running.tolist() == [True] * 3
    assert forks.cached_lengths.tolist() == [8] * 3
    copies = copies.tolist()
    assert [source for source, _ in copies] == [int(request.pages[2])] * 3
    assert [target for _, target in copies] == [int(fork.pages[2]) for fork in forks]
    for source, target in copies:  # what the engine does
        this.kv[target * 4 : target * 4 + 4] = this.kv[source * 4 : source * 4 + 4]
    for number, fork in enumerate(forks):
        assert (fork.length, fork.tokens.tolist(), fork.namespace) == (10, [*range(10)], "a")
        this.computed[fork] = 10
        this.compare(fork)
        assert this.cache.step([fork], [100 + number]).short == []
        this.compute(fork, 11)
    this.cache.check()
    counts = this.cache.counts()
    assert (counts.protected, counts.held) == (8, 4 * 4)
    this.cache.abort([request])
    this.cache.finish(forks)
    this.cache.check()
    assert this.cache.counts().protected == 0


def test_a_fork_that_does_not_fit(where: dict[str, str]) -> None:
    this = engine(where, 16, page_size=4, max_requests=4)
    (request,) = this.begin([[*range(10)]])
    forks, copies = this.cache.fork(request, 2)
    assert [fork.state for fork in forks] == ["refused"] * 2
    assert (forks[0].missing, len(copies)) == (4, 0)
    assert request.state == "running"
    assert [fork.state for fork in this.cache.fork(request, 1)[0]] == ["running"]
    with pytest.raises(ValueError, match="n must be a positive integer"):
        this.cache.fork(request, 0)
    this.cache.check()


# Ends


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_what_ended_last_is_evicted_last(where: dict[str, str], end: str) -> None:
    this = engine(where, 32, page_size=4)
    first, second = this.begin([[1] * 8, [2] * 8])
    for request in (first, second):
        this.compute(request, 8)
    this.cache.commit([first, second])
    getattr(this.cache, end)([second], touch=True)
    getattr(this.cache, end)([first], touch=True)
    this.begin([[3] * 20])
    assert this.cache.tree.match([[1] * 8, [2] * 8], touch=False).lengths.tolist() == [8, 4]


# Tables


def test_tables(where: dict[str, str]) -> None:
    """The table of slots is made when it is asked for, and right from then on."""
    early, late = (engine(where, 128, page_size=4, max_requests=6) for _ in range(2))
    assert early.cache.table.shape == (6, 64)
    for this in (early, late):
        this.run([*range(13)])
        requests = this.begin([[*range(11)], [*range(9), 40, 41], [*range(12), 1], [50] * 5])
        for request in requests:
            this.compute(request, request.length)
        this.cache.commit(requests)
        this.cache.extend(requests, 3)
        this.cache.finish(requests[1:2])
        this.begin([[60] * 14])
    for request, twin in zip(early.cache.running, late.cache.running, strict=True):
        slots = early.cache.table[request.row, : request.length].tolist()
        assert slots == late.cache.table[twin.row, : twin.length].tolist() == request.slots.tolist()
        pages = request.pages.tolist()
        assert slots == [4 * pages[at // 4] + at % 4 for at in range(request.length)]
        assert early.cache.page_table[request.row, : len(pages)].tolist() == pages
    early.cache.check()
    late.cache.check()


def test_the_tokens_of_a_place(where: dict[str, str]) -> None:
    cache = PrefixCache(64, 4, **where)
    cache.finish(cache.begin([[*range(9)], [*range(4), 20, 21, 22, 23]]))
    found = cache.tree.tokens(cache.tree.match([[*range(8)], [*range(4), 20, 21, 22, 23], [5]], touch=False))
    assert found.to_list() == [[*range(8)], [*range(4), 20, 21, 22, 23], []]
    assert found.values.dtype == torch.int32
