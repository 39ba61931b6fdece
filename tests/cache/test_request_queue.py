"""RequestQueue: waiting prompts of a PrefixCache begin when they fit, as the plan says."""

from __future__ import annotations

import random

import pytest
import torch

import flatradix
from flatradix.cache.waiting import RequestQueue
from tests.support.devices import interpreted
from tests.support.interrupts import bytecodes, interrupt_at


def _prompt(random_: random.Random) -> list[int]:
    return [random_.randrange(3) for _ in range(random_.randrange(1, 40))]


@pytest.mark.parametrize(("policy", "share"), [("fcfs", False), ("lpm", True), ("aged", True)])
def test_what_is_planned_begins(where: dict[str, str], policy: str, share: bool) -> None:
    """Every planned prompt runs, the cache stays sound, and the queue loses exactly the prompts that began."""
    random_ = random.Random(5)
    cache = flatradix.PrefixCache(240, page_size=4, max_requests=5, max_length=64, **where)
    queue = cache.queue()
    running: list[flatradix.Request] = []
    steps = 6 if interpreted(where["device"]) else 40
    for _ in range(steps):
        names = [random_.choice([None, "a"]) for _ in range(3)]
        queue.add([_prompt(random_) for _ in range(3)], namespace=names)
        before = set(queue.ids().tolist())
        free, rows = cache.free_space()
        most = min(3, rows)
        plan = queue.plan(policy, max_requests=most, free_tokens=free, whole_pages=True, share=share)
        requests, ids = queue.begin(policy, max_requests=3, share=share)
        assert ids.tolist() == plan.ids.tolist()
        assert [request.state for request in requests] == ["running"] * len(requests)
        assert [request.committed for request in requests] == plan.cached_lengths.tolist()
        slots = sum(-(-request.num_tokens // 4) * 4 - request.cached_length for request in requests)
        assert slots == plan.new_tokens
        assert set(queue.ids().tolist()) == before - set(ids.tolist())
        running += requests
        while running and random_.random() < 0.7:
            cache.finish([running.pop(random_.randrange(len(running)))])
        cache.check()
    assert len(queue) < 3 * steps


def test_a_kept_prefix_is_there_when_its_prompt_begins(where: dict[str, str]) -> None:
    cache = flatradix.PrefixCache(64, page_size=4, max_length=64, **where)
    old, new = list(range(16)), list(range(100, 132))
    (request,) = cache.begin([old])
    cache.finish([request])
    queue = cache.queue()
    queue.add([*old, 7, 8])
    for start in (200, 300, 400):
        (request,) = cache.begin([[token + start for token in new]])
        cache.finish([request])
    (request,), _ids = queue.begin()
    assert request.cached_length == 16
    assert len(queue) == 0


def test_what_prompts_share_is_planned_and_allocated_once(where: dict[str, str]) -> None:
    cache = flatradix.PrefixCache(24, page_size=4, max_length=64, **where)
    queue = cache.queue()
    stem = list(range(12))
    queue.add([[*stem, 20], [*stem, 30], [*stem, 40]])
    assert len(queue.plan(free_tokens=24, whole_pages=True).ids) == 1
    requests, ids = queue.begin(share=True)
    assert ids.tolist() == [0, 1, 2]
    assert [request.cached_length for request in requests] == [0, 12, 12]
    assert [request.lender for request in requests] == [None, requests[0], requests[0]]
    assert (len(queue), cache.free_space()[0]) == (0, 0)
    cache.check()


def test_prompts_that_do_not_begin_though_planned_go_on_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer slots are free than the plan was told: of its prompts, those that start leave the queue."""
    cache = flatradix.PrefixCache(20, page_size=4, max_length=64)
    queue = cache.queue()
    stem = list(range(12))
    queue.add([[*stem, 20], [*stem, *range(30, 40)], [*stem, 40]])
    monkeypatch.setattr(cache, "free_space", lambda: (1000, 10))
    requests, ids = queue.begin(share=True)
    assert (ids.tolist(), queue.ids().tolist()) == ([0, 2], [1])
    assert [request.borrowed for request in requests] == [0, 12]
    cache.check()


def test_a_budget_and_a_limit_end_the_plan() -> None:
    cache = flatradix.PrefixCache(1000, page_size=4, max_requests=2, max_length=64)
    queue = cache.queue(keep=False)
    ids = queue.add([[1] * 10, [2] * 10, [3] * 10])
    requests, begun = queue.begin(token_budget=12)
    assert begun.tolist() == ids[:1].tolist()
    more, begun = queue.begin()
    assert begun.tolist() == ids[1:2].tolist()  # two requests are the most
    cache.finish(requests)
    cache.abort(more)
    _more, begun = queue.begin(torch.flip(queue.ids(), [0]))
    assert begun.tolist() == ids[2:].tolist()


def test_an_interrupted_begin_leaves_each_prompt_waiting_or_running() -> None:
    def scene() -> tuple[flatradix.PrefixCache, RequestQueue]:
        cache = flatradix.PrefixCache(64, page_size=4, max_requests=8, max_length=32)
        queue = cache.queue()
        queue.add([[1, 2, 3], [4, 5]])
        return cache, queue

    total = bytecodes(scene()[1].begin, "cache")
    found = set()
    for at in range(0, total, 7):
        cache, queue = scene()
        interrupt_at(at, queue.begin, "cache")
        found.add((len(queue), len(cache.running)))
        cache.check()
    assert found <= {(2, 0), (0, 2)}
    assert (2, 0) in found
