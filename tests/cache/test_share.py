"""Prompts that begin together and share new slots: who owns them, and what a commit or an end means for the others."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from flatradix import Ragged, Request
from flatradix.cache.check import check_loans
from flatradix.cache.share import Loan, Sharing
from flatradix.inspect.nodes import nodes_of
from tests.support.prefix_engine import Engine, common, engine

STEM = list(range(1, 13))  # three pages of 4


def relations(requests: list[Request]) -> list[tuple[int | None, int, int]]:
    """Return the lender of each request as a position, what it borrows, and what it need not compute."""
    where = {request: number for number, request in enumerate(requests)}
    return [
        (where[request.lender] if request.lender else None, request.borrowed, request.cached_length)
        for request in requests
    ]


def counts(this: Engine) -> tuple[int, int, int]:
    found = this.cache.counts()
    return found.free, found.protected, found.held


# Begin


def test_new_tokens_that_prompts_share_have_one_slot(where: dict[str, str]) -> None:
    this = engine(where)
    first, second, third = requests = this.begin([[*STEM, 20], [*STEM, 30, 31], [*STEM[:6], 40]], share=True)
    assert relations(requests) == [(None, 0, 0), (0, 12, 12), (0, 4, 4)]
    assert second.slots.tolist()[:12] == first.slots.tolist()[:12]
    assert third.slots.tolist()[:4] == first.slots.tolist()[:4]
    assert len({slot for request in requests for slot in request.slots.tolist()}) == 12 + 1 + 2 + 3
    assert counts(this) == (64 - 24, 0, 16 + 4 + 4)
    found = this.cache.counts()
    assert (found.shared_tokens, found.cached_tokens, found.prompt_tokens) == (16, 0, 13 + 14 + 7)
    this.cache.check()
    this.forward(requests)
    this.cache.finish(requests)
    this.cache.check()
    assert this.begin([[*STEM, 30, 31]])[0].cached_length == 12
    assert this.cache.counts().duplicate_tokens == 0


def test_prompts_on_the_device_share_as_others_do(where: dict[str, str]) -> None:
    this = engine(where)
    ragged = Ragged.from_sequences([[*STEM, 20], [*STEM, 30, 31], [*STEM[:6], 40], [7] * 5])
    requests = this.cache.begin(ragged.to(this.cache.tree.device), share=True)
    assert relations(list(requests)) == [(None, 0, 0), (0, 12, 12), (0, 4, 4), (None, 0, 0)]
    this.cache.check()


def test_only_what_is_asked_for_is_shared(where: dict[str, str]) -> None:
    this = engine(where)
    prompts = [[*STEM, 20], [*STEM, 30]]
    assert relations(this.begin(prompts)) == [(None, 0, 0)] * 2
    assert relations(this.begin(prompts, ["a", "b"], share=True)) == [(None, 0, 0)] * 2
    this.cache.check()


def test_calls_share_nothing_with_one_another(where: dict[str, str]) -> None:
    this = engine(where)
    assert [relations(this.begin([[*STEM, 20]], share=True)) for _ in range(2)] == [[(None, 0, 0)]] * 2
    this.cache.check()


@pytest.mark.parametrize(("page", "shared"), [(1, 15), (4, 12), (16, 0)])
def test_the_last_token_is_not_shared(page: int, shared: int, where: dict[str, str]) -> None:
    """As nothing of the last page is taken from the cache: neither from a longer prompt, nor from a shorter one."""
    this = engine(where, 128, page_size=page)
    prompt = list(range(16))
    for prompts in ([prompt, prompt], [prompt, [*prompt, 20]], [[*prompt, 20], prompt]):
        requests = this.begin(prompts, share=True)
        assert requests[1].cached_length == shared
        assert requests[1].lender is (requests[0] if shared else None)
        this.cache.check()
        this.forward(requests)
        this.cache.abort(requests)


def test_what_is_cached_comes_before_what_is_shared(where: dict[str, str]) -> None:
    this = engine(where)
    this.run([*STEM, 20])
    requests = this.begin([[*STEM, 30], [*STEM, 30, 31, 32, 33, 34], [*STEM, 30, 31, 32, 33, 35], [9]], share=True)
    assert relations(requests) == [(None, 0, 12), (None, 0, 12), (1, 16, 16), (None, 0, 0)]
    assert this.cache.counts().shared_tokens == 4
    this.forward(requests)
    this.cache.finish(requests)
    this.cache.check()


@pytest.mark.parametrize("page", [1, 16])
def test_a_chain_of_three(page: int, where: dict[str, str]) -> None:
    """Each borrows more than the one before it, and every page has the slots of the first that has it."""
    this = engine(where, 20 * page, page_size=page, max_length=6 * page)
    one, two, three, four = ([token] * page for token in (1, 2, 3, 4))
    requests = this.begin(
        [[*one, *two, 9], [*one, *three, *four, 9], [*one, *three, *four, 8], [*one, *three, 7]], share=True
    )
    assert relations(requests) == [
        (None, 0, 0), (0, page, page), (1, 3 * page, 3 * page), (1, 2 * page, 2 * page),
    ]  # fmt: skip
    assert requests[3].slots.tolist()[:page] == requests[0].slots.tolist()[:page]
    assert this.cache.counts().held == (3 + 3 + 1 + 1) * page
    this.forward(requests)
    this.cache.check()
    this.cache.commit([requests[3]], 2 * page)
    this.cache.check()
    assert [request.committed for request in requests] == [page, 2 * page, 2 * page, 2 * page]
    assert [request.lender for request in requests] == [None, None, requests[1], None]
    this.cache.abort(requests)
    this.cache.check()
    assert counts(this) == (18 * page, 0, 0)


def test_one_by_one_when_they_do_not_fit_together(where: dict[str, str]) -> None:
    """A prompt that does not start lends nothing."""
    this = engine(where, 32)
    requests = this.begin([[*STEM, *[7] * 30], [*STEM, 20], [*STEM, 21], [*STEM, *[8] * 20], [*STEM, 22]], share=True)
    assert [request.state for request in requests] == ["refused", "running", "running", "refused", "running"]
    assert relations([requests[n] for n in (1, 2, 4)]) == [(None, 0, 0), (0, 12, 12), (0, 12, 12)]
    assert requests[3].refusal == "20 slots are needed and 12 can be had: 8 too few"
    assert requests[0].lender is None
    assert requests[0].borrowed == 0
    this.cache.check()
    this.forward(requests)


def test_rows_run_out(where: dict[str, str]) -> None:
    this = engine(where, max_requests=2)
    requests = this.begin([[*STEM, 20], [*STEM, 21], [*STEM, 22]], share=True)
    assert [request.state for request in requests] == ["running", "running", "refused"]
    assert requests[2].refusal == "all 2 requests that max_requests allows are running"
    this.cache.check()


# Commit


@pytest.mark.parametrize("who", [0, 1, 2])
def test_whoever_commits_commits_for_all(who: int, where: dict[str, str]) -> None:
    this = engine(where)
    requests = this.begin([[*STEM, 20, 21, 22, 23], [*STEM, 30, 31, 32, 33], [*STEM[:9], 40]], share=True)
    this.forward(requests)
    this.cache.commit([requests[who]])
    this.cache.check()
    expected = [[16, 12, 8], [12, 16, 8], [8, 8, 8]][who]
    assert [request.committed for request in requests] == expected
    lenders = [request.lender for request in requests]
    assert lenders == [None, requests[0] if who == 2 else None, None]
    assert this.cache.counts().duplicate_tokens == 0
    this.cache.commit(requests)
    this.cache.check()
    assert [request.committed for request in requests] == [16, 16, 8]
    for request in requests:
        this.compare(request)
    this.cache.finish(requests)
    assert counts(this)[1:] == (0, 0)
    this.cache.check()


def test_what_is_committed_in_part_stays_shared(where: dict[str, str]) -> None:
    this = engine(where)
    first, second = requests = this.begin([[*STEM, 20], [*STEM, 30]], share=True)
    this.forward(requests)
    this.cache.commit([second], 7)
    assert relations(requests) == [(None, 0, 0), (0, 12, 12)]
    assert (first.committed, second.committed) == (4, 4)
    assert counts(this) == (64 - 20, 4, 16)
    this.cache.check()
    this.cache.abort([first])
    assert relations([second]) == [(None, 0, 4)]
    this.cache.check()


def test_slots_of_another_request_replace_those_that_are_shared(where: dict[str, str]) -> None:
    """The owner's slots become free, once, and all that share them get the tree's slots."""
    this = engine(where, 96, max_requests=5)
    (rival,) = this.begin([[*STEM, 50]])
    requests = this.begin([[*STEM, 20], [*STEM, 30], [*STEM[:8], 40]], share=True)
    for request in (rival, *requests):
        this.compute(request, request.length)
    this.cache.commit([rival])
    free = this.cache.counts().free
    this.cache.commit([requests[2]], 8)
    assert this.cache.counts().duplicate_tokens == 8
    this.cache.commit([requests[1]])
    found = this.cache.counts()
    assert (found.duplicate_tokens, found.free) == (12, free + 12)
    for request in requests:
        length = min(12, request.committed)
        assert request.slots.tolist()[:length] == rival.slots.tolist()[:length]
        this.compare(request)
    this.cache.check()


def test_two_families_and_a_stranger_in_one_commit(where: dict[str, str]) -> None:
    this = engine(where, 128, max_requests=8)
    names = ["a", "b", "a", "b"]
    family = this.begin([[*STEM, 20], [*STEM, 20], [*STEM, 30], [*STEM[:9], 30]], names, share=True)
    (stranger,) = this.begin([[*STEM, 60]], "a")
    assert relations(family) == [(None, 0, 0), (None, 0, 0), (0, 12, 12), (1, 8, 8)]
    for request in (*family, stranger):
        this.compute(request, request.length)
    this.cache.commit([family[3], stranger, family[2]], [8, 12, 12])
    this.cache.check()
    assert [request.committed for request in family] == [12, 8, 12, 8]
    assert stranger.committed == 12
    assert family[2].slots.tolist()[:12] == stranger.slots.tolist()[:12]  # the stranger came first
    assert this.cache.counts().duplicate_tokens == 12
    for request in (*family, stranger):
        this.compare(request)


def test_each_request_of_a_family_counts_its_hit(where: dict[str, str]) -> None:
    this = engine(where, policy="lfu")
    this.run([*STEM, 20])
    requests = this.begin([[*STEM, 30, 31, 32, 33, 34], [*STEM, 30, 31, 32, 33, 35]], share=True)
    this.forward(requests)
    for _ in range(2):
        this.cache.commit(requests[1:])
    this.cache.finish(requests)
    assert {node.start: node.hit_count for node in nodes_of(this.cache.tree.content())} == {0: 3, 12: 2}


def test_a_borrower_grows(where: dict[str, str]) -> None:
    this = engine(where)
    requests = this.begin([[*STEM, 20], [*STEM, 30]], share=True)
    assert this.cache.extend(requests, [1, 9]) == []
    this.cache.check()
    this.forward(requests)
    this.cache.commit(requests, 0, tokens=[[21], list(range(31, 40))])
    assert [request.borrowed for request in requests] == [0, 12]
    this.compute(requests[1], 22)
    this.cache.commit(requests[1:], 21)
    assert [request.committed for request in requests] == [12, 20]
    this.cache.check()


# End


def test_the_heir_computes_what_the_lender_would_have(where: dict[str, str]) -> None:
    this = engine(where)
    first, *others = this.begin([[*STEM, 20], [*STEM[:5], 30], [*STEM, 40], [*STEM, 50]], share=True)
    slots = first.slots.tolist()
    assert [request.lender for request in others] == [first] * 3
    this.cache.abort([first])
    assert relations(others) == [(1, 4, 4), (None, 0, 0), (1, 12, 12)]
    assert others[1].slots.tolist()[:12] == slots[:12]
    assert counts(this) == (64 - 12 - 3 * 4, 0, 24)
    this.cache.check()
    this.forward(others)
    this.cache.finish(others)
    this.cache.check()


def test_an_heir_goes_on_borrowing_what_the_lender_borrowed(where: dict[str, str]) -> None:
    this = engine(where, max_requests=5)
    prompts = [[*STEM[:4], 9], [*STEM, 20], [*STEM[:9], 30], [*STEM, 40]]
    first, second, *others = this.begin(prompts, share=True)
    assert relations([first, second, *others]) == [(None, 0, 0), (0, 4, 4), (1, 8, 8), (1, 12, 12)]
    this.cache.abort([second])
    assert relations([first, *others]) == [(None, 0, 0), (2, 8, 8), (0, 4, 4)]
    this.cache.check()
    this.cache.abort([first])
    assert relations(others) == [(1, 8, 8), (None, 0, 0)]
    this.cache.check()
    this.forward(others)
    this.cache.abort(others)
    assert counts(this) == (64, 0, 0)


def test_a_lender_that_ends_early_leaves_the_rest_to_its_heir(where: dict[str, str]) -> None:
    this = engine(where)
    requests = this.begin([[*STEM, 20], [*STEM, 30]], share=True)
    this.forward(requests)
    this.cache.finish(requests[:1], 6)
    assert relations(requests[1:]) == [(None, 0, 4)]
    assert requests[1].committed == 4
    this.compare(requests[1])  # the forward pass has written all of it
    this.cache.check()


@pytest.mark.parametrize("number", range(6))
def test_all_end_in_any_order(number: int, where: dict[str, str]) -> None:
    random = Random(number)
    this = engine(where, 128, max_requests=8)
    prompts = [[*STEM[: random.randint(0, 12)], 50 + n, *[60 + n % 2] * random.randint(0, 9)] for n in range(8)]
    requests = this.begin(prompts, share=True)
    random.shuffle(requests)
    while requests:
        gone, requests = requests[: number % 3 + 1], requests[number % 3 + 1 :]
        this.cache.abort(gone)
        this.cache.check()
    assert counts(this) == (128, 0, 0)


def test_reset_ends_loans(where: dict[str, str]) -> None:
    this = engine(where)
    requests = this.begin([[*STEM, 20], [*STEM, 30]], share=True)
    this.cache.reset()
    assert [request.lender for request in requests] == [None, None]
    this.cache.check()
    assert counts(this) == (64, 0, 0)


# Check


@pytest.mark.parametrize(
    ("loan", "message"),
    [
        (Loan(3, 12), "both requests run"),
        (Loan(2, 12), "namespaces"),
        (Loan(0, 11), "behind the last page"),
        (Loan(0, 16), "its length fits"),
    ],
)
def test_check_finds_a_wrong_loan(loan: Loan, message: str) -> None:
    this = engine({})
    requests = this.begin([[*STEM, 20], [*STEM, 30], [*STEM, 40]], [None, None, "a"], share=True)
    rows = [request.row for request in requests]
    tokens = {request.row: request.tokens for request in requests}
    free = 3  # the only row without a request

    def check(loan: Loan) -> None:
        lender = rows[loan.lender] if loan.lender < len(rows) else free
        check_loans({rows[1]: loan._replace(lender=lender)}, this.cache._state.pages, this.cache._state.columns, tokens)

    check(Loan(0, 12))
    with pytest.raises(AssertionError, match=message):
        check(loan)


# Plain values


def test_many_prompts_find_the_first_with_their_prefix() -> None:
    """`Sharing` against plain Python, with prompts that often begin in the same way."""
    random = Random(1)
    for page in (1, 3):
        sharing = Sharing(page)
        cached = [[random.randrange(3) for _ in range(9)] for _ in range(3)]
        started: list[tuple[int, list[int], str | None]] = []
        for row in range(300):
            tokens = np.array([random.randrange(3) for _ in range(random.randrange(12))], np.int64)
            name = random.choice(["a", None])
            found = max(common(tokens, key) // page * page for key in cached)
            loan = sharing.start(row, tokens, name, found)
            known = [other for _, other, space in started if space == name]
            lengths = [common(tokens, other) // page * page for other in known]
            rows = [number for number, _, space in started if space == name]
            longest = max(lengths, default=0)
            if longest <= found:
                assert loan is None
            else:
                assert loan == Loan(rows[lengths.index(longest)], longest)
            started.append((row, tokens.tolist(), name))
