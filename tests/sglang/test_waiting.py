"""FLATRADIX_QUEUE=1: SGLang's policies with a WaitingQueue, beside the same policies as SGLang has them."""

from __future__ import annotations

import importlib.util
import logging
import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.sglang_engine import Plan, draw_work, load_or_skip
from tests.support.sglang_pair import ever_later, is_drained
from tests.support.sglang_queue import POLICIES, Desk, QueueEngine, hooks, request

SGLANG = load_or_skip()
ROOMY = Plan(slots=20_000)


@pytest.fixture
def _hooked() -> Iterator[None]:
    with hooks():
        yield


def systems(desk: Desk, count: int = 6) -> list[list[int]]:
    """Cache some prompts; return them. Their halves have more than 32 tokens: SGLang does not look what is shared."""
    found = [[desk.rng.randrange(1000, 50_000) for _ in range(96 + 32 * number)] for number in range(count)]
    for prompt in found:
        desk.fill(prompt)
    return found


def alone(desk: Desk, known: list[list[int]]) -> list[int]:
    """Return a prompt that shares only cached tokens with others. Some are cached as a whole."""
    stem = desk.rng.choice(known)
    stem = stem[: desk.rng.choice([len(stem), len(stem) // 2])]
    number = desk._came + 1
    return [*stem, 100 + number % 900, number // 900, *range(desk.rng.choice([0, 1, 30]))]


# Switched off, and on


@pytest.mark.parametrize("value", [None, "", "0", "yes"])
def test_off_hooks_nothing(value: str | None) -> None:
    policy = SGLANG.policy.SchedulePolicy
    before = policy.calc_priority, policy.waiting_queue_prefix_matched, SGLANG.requests.Req.reset_for_retract
    with hooks(value) as registry:
        assert not registry._hooks
        after = policy.calc_priority, policy.waiting_queue_prefix_matched, SGLANG.requests.Req.reset_for_retract
        assert after == before
        assert Desk("lpm", ROOMY).policy.calc_priority.__func__ is before[0]


def test_the_plugin_registers_the_hooks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.integrations.sglang import plugin

    with hooks() as registry:
        monkeypatch.setattr(SGLANG.registry, "_RADIX_CACHE_REGISTRY", {})
        plugin.register()
        assert {target.split(".")[-1]: len(found) for target, found in registry._hooks.items()} == {
            "calc_priority": 1,
            "waiting_queue_prefix_matched": 1,
            "reset_for_retract": 1,
        }


def test_the_scheduler_has_what_is_hooked() -> None:
    spec = importlib.util.find_spec("sglang.srt.managers.scheduler")
    assert spec is not None
    assert "def init_schedule_policy(self):" in Path(str(spec.origin)).read_text()


def scheduler(policy: str = "lpm", **fields: Any) -> Any:
    desk = Desk.__new__(Desk)
    from tests.support.sglang_home import Home

    desk.home = Home(ROOMY)
    cache = fields.pop("tree_cache", desk.home.cache)
    options = [fields.pop(name, False) for name in ("hierarchical", "priority")]
    made = SGLANG.policy.SchedulePolicy(policy, cache, *options, False)
    return SimpleNamespace(tree_cache=cache, policy=made, waiting_queue=[], dllm_config=None, **fields)


def test_a_scheduler_is_taken_over(caplog: pytest.LogCaptureFixture) -> None:
    from flatradix.integrations.sglang.waiting import scheduler_ready, waiting_of

    made = scheduler()
    with caplog.at_level(logging.INFO):
        scheduler_ready(None, made)
    assert waiting_of(made.policy) is not None
    assert "the waiting queue is ordered beside the prefix cache" in caplog.text


def _other_cache() -> dict[str, Any]:
    return {"tree_cache": SGLANG.radix.RadixCache.create_simulated()}


def _taken() -> dict[str, Any]:
    from flatradix import WaitingQueue

    made = scheduler()
    made.tree_cache.queue = WaitingQueue(made.tree_cache.tree, keep=True)
    return {"tree_cache": made.tree_cache}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (_other_cache, "the prefix cache is a RadixCache"),
        (lambda: {"hierarchical": True}, "hierarchical"),
        (lambda: {"priority": True}, "goes with fcfs and lof"),
        (_taken, "another waiting queue keeps"),
    ],
)
def test_other_schedulers_are_left_alone(fields: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    from flatradix.integrations.sglang.waiting import scheduler_ready, waiting_of

    made = scheduler(**fields())
    scheduler_ready(None, made)
    assert waiting_of(made.policy) is None
    assert "FLATRADIX_QUEUE=1 has no effect: " in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("option", "reason"),
    [({"disaggregation_mode": "decode"}, "only the decode part"), ({}, "SGLANG_RADIX_FORCE_MISS")],
)
def test_other_servers_are_left_alone(option: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.integrations.sglang.waiting import why_not

    if not option:
        monkeypatch.setenv("SGLANG_RADIX_FORCE_MISS", "1")
    with SGLANG.context.get_context().override_server_args(**option):
        assert reason in str(why_not(scheduler()))


def test_priority_scheduling_is_followed_where_sglang_sorts() -> None:
    from flatradix.integrations.sglang.waiting import why_not

    assert why_not(scheduler("fcfs", priority=True)) is None


# Orders


@pytest.mark.usefixtures("_hooked")
@pytest.mark.parametrize("count", [1, 60, 300])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_order_is_sglangs(policy: str, page_size: int, count: int) -> None:
    """SGLang's own limit of 128 is raised for its side."""
    desk = Desk(policy, ROOMY._replace(page_size=page_size), seed=count)
    known = systems(desk)
    for _ in range(count):
        desk.join(alone(desk, known))
    desk.processed = 40
    desk.compare()


@pytest.mark.usefixtures("_hooked")
def test_the_order_for_eagle_is_sglangs() -> None:
    desk = Desk("lpm", ROOMY._replace(is_eagle=True), seed=3)
    known = systems(desk)
    for _ in range(50):
        desk.join(alone(desk, known))
    desk.compare()


@pytest.mark.usefixtures("_hooked")
@pytest.mark.parametrize("policy", ["lpm", "hrrn", "shortest-prefill-first"])
def test_the_order_stays_sglangs_while_requests_come_and_go(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties go by the last order of the list, by id or by time, as SGLang has them."""
    monkeypatch.setattr(SGLANG.policy, "IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD", -1)
    desk = Desk(policy, ROOMY, seed=5)
    known = systems(desk)
    for number in range(40):
        for _ in range(desk.rng.randint(0, 12)):
            desk.join(alone(desk, known))
        desk.processed += desk.rng.choice([0, 10, 25])
        if number % 5 == 1:
            desk.evict(desk.rng.randint(1, 60))
        if number % 5 == 2:
            known.append([*desk.rng.choice(known), *range(desk.rng.randint(1, 40))])
            desk.fill(known[-1])
        desk.compare()
        rids = [req.rid for req in desk.ours]
        gone = rids[: desk.rng.randint(0, 5)] if number % 3 else desk.rng.sample(rids, min(len(rids), 4))
        desk.leave(set(gone))
    assert len(desk.ours) > 60


@pytest.mark.usefixtures("_hooked")
@pytest.mark.parametrize("least", [5, 32])
@pytest.mark.parametrize("policy", ["lpm", "hrrn", "shortest-prefill-first"])
def test_sharing_is_deferred_as_in_sglang_where_nothing_is_cached(
    policy: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first request of a group has left, lpm goes by age, and so does SGLang."""
    monkeypatch.setattr(SGLANG.policy, "IN_BATCH_PREFIX_CACHING_DEPRIORITIZE_THRESHOLD", least)
    desk = Desk(policy, ROOMY, seed=least)
    stems = [[desk.rng.randrange(1000, 50_000) for _ in range(length)] for length in (3, 10, 31, 32, 60)]
    for number in range(30 if policy == "lpm" else 1):
        for _ in range(3 if policy == "lpm" else 60):
            desk.join([*desk.rng.choice(stems), desk._came, *range(desk.rng.randint(1, 50))])
        desk.processed += 10
        desk.compare()
        desk.leave([req.rid for req in desk.ours[: number % 4]])


@pytest.mark.usefixtures("_hooked")
@pytest.mark.parametrize("cached", [0, 32, 33, 400])
def test_sharing_is_deferred_at_any_cached_length(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk("lpm", ROOMY)
    stem = list(range(1000, 1000 + cached))
    if cached:
        desk.fill(stem)
    for tail in (50, 31):  # the second pair shares too few tokens that are not cached
        shared = list(range(tail * 1000, tail * 1000 + tail))
        for last in (1, 2):
            desk.join(stem + shared + [last])
    first, second, third, fourth = (req.rid for req in desk.ours)
    assert desk.order() == [first, third, fourth, second]
    desk.leave([first])
    assert desk.order() == [third, fourth, second]
    monkeypatch.setattr(SGLANG.policy, "IN_BATCH_PREFIX_CACHING_CHECK_THRESHOLD", -1)
    desk.join(stem + list(range(50_000 - 500, 50_000)))
    desk.join(stem + list(range(50_000 - 500, 50_000)))
    fifth, sixth = (req.rid for req in desk.ours[-2:])
    assert desk.order() == [third, fourth, second, fifth, sixth]


@pytest.mark.usefixtures("_hooked")
def test_a_request_that_cannot_use_the_cache_is_not_deferred() -> None:
    """Log probabilities of the prompt from its start on need all of it computed."""
    desk = Desk("lpm", ROOMY)
    prompt = list(range(200))
    desk.join([*prompt, 1])
    desk.join([*prompt, 2])
    desk.join([*prompt, 3], return_logprob=True)
    desk.ours[2].logprob_start_len = 0
    first, second, third = (req.rid for req in desk.ours)
    assert desk.order() == [first, third, second]
    desk.fill(prompt)
    assert desk.order() == [first, second, third]
    assert [req.num_matched_prefix_tokens for req in desk.ours] == [200, 200, 0]


@pytest.mark.usefixtures("_hooked")
def test_namespaces_share_nothing() -> None:
    desk = Desk("lpm", ROOMY)
    prompt = list(range(100))
    desk.fill(prompt, extra_key="adapter", cache_salt="salt")
    for options in ({}, {"extra_key": "adapter"}, {"extra_key": "adapter", "cache_salt": "salt"}):
        desk.join(prompt, **options)
    desk.compare()
    assert [req.num_matched_prefix_tokens for req in desk.ours] == [99, 0, 0]


@pytest.mark.usefixtures("_hooked")
def test_foreign_tokens_and_empty_prompts() -> None:
    desk = Desk("lpm", ROOMY)
    prompt = list(range(100))
    desk.fill(prompt)
    for tokens in ([], [2**60], [*prompt, 2**60, 5], [*prompt[:50], -1]):
        desk.join(tokens)
    desk.compare()
    assert [req.num_matched_prefix_tokens for req in desk.ours] == [100, 50, 0, 0]


@pytest.mark.usefixtures("_hooked")
def test_a_value_that_admission_wrote_is_set_again() -> None:
    """A candidate that is not admitted is matched without its last token, so by one page less."""
    desk = Desk("lpm", ROOMY._replace(page_size=16))
    desk.fill(list(range(32)))
    desk.join(list(range(32)))
    desk.compare()
    for req in (*desk.ours, *desk.theirs):
        req.init_next_round_input(desk.cache)
        assert req.num_matched_prefix_tokens == 16
    desk.compare()


@pytest.mark.usefixtures("_hooked")
def test_load_reports_know_that_long_queues_are_matched() -> None:
    queue = [None] * 200
    for policy, matched in (("lpm", True), ("hrrn", True), ("fcfs", False)):
        desk = Desk(policy, ROOMY)
        assert desk.policy.waiting_queue_prefix_matched(queue) is matched
        assert desk._their_policy.waiting_queue_prefix_matched(queue) is False


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_moving_runs(count: int) -> None:
    from flatradix.integrations.sglang.followed import move_runs

    rng = random.Random(count)
    for _ in range(50):
        lengths = [rng.randint(1, 4) for _ in range(count)]
        runs = [(sum(lengths[:number]), length) for number, length in enumerate(lengths)]
        rng.shuffle(runs)
        items = list(range(sum(lengths)))
        move_runs(items, runs)
        assert items == [item for first, length in runs for item in range(first, first + length)]


# Whom the queue follows


@pytest.mark.usefixtures("_hooked")
@pytest.mark.parametrize(
    ("policy", "page_size"), [*((policy, 1) for policy in (*POLICIES, "fcfs", "lof")), ("lpm", 16), ("hrrn", 16)]
)
def test_requests_are_followed(policy: str, page_size: int) -> None:
    """Requests come, are chunked, retracted and aborted in a pool that is too small."""
    plan = Plan(schedule=policy, page_size=page_size, seed=page_size)
    engine = QueueEngine(plan)
    with ever_later(SGLANG):
        engine.run(draw_work(plan, 50))
    assert engine.passes > 50
    assert engine.retracted > 0
    engine.cache.tree.check()
    is_drained(SGLANG, engine)


@pytest.mark.usefixtures("_hooked")
def test_a_request_that_comes_back_between_two_passes() -> None:
    """The same list as before, but the request has run meanwhile: it has output, and another arrival."""
    desk = Desk("hrrn", ROOMY)
    desk.join(list(range(50)))
    desk.order()
    (req,) = desk.ours
    req.output_ids.extend([7, 8, 9])
    req.reset_for_retract()
    req.arrival_processed_tokens = 77
    desk.order()
    followed = desk.waiting.followed
    (number,) = followed.queue.ids().tolist()
    assert followed.queue.prompt(number).tolist() == [*range(50), 7, 8, 9]
    assert followed.columns.arrival[followed.listed].tolist() == [77]


# Eviction


def two_prompts(desk: Desk) -> tuple[list[int], list[int]]:
    older, newer = list(range(40)), list(range(100, 140))
    desk.fill(older)
    desk.fill(newer)
    return older, newer


@pytest.mark.usefixtures("_hooked")
@pytest.mark.parametrize("policy", [*POLICIES, "fcfs"])
def test_evictions_spare_the_queue(policy: str) -> None:
    desk = Desk(policy, ROOMY)
    older, newer = two_prompts(desk)
    desk.join([*older, 1])
    desk.order()
    desk.evict(40)
    assert desk.cached(older) == 40
    assert desk.cached(newer) == 0
    assert desk.evict(40) == 40  # nothing else is left
    assert desk.cached(older) == 0


@pytest.mark.usefixtures("_hooked")
def test_evictions_follow_the_list_between_passes() -> None:
    desk = Desk("lpm", ROOMY)
    older, newer = two_prompts(desk)
    desk.join([*older, 1])  # no pass has seen it
    desk.evict(40)
    assert desk.cached(older) == 40
    desk.fill(newer)
    desk.leave([desk.ours[0].rid])
    desk.evict(40)
    assert desk.cached(older) == 0
    assert desk.cached(newer) == 40


@pytest.mark.usefixtures("_hooked")
@pytest.mark.parametrize("policy", ["lpm", "fcfs"])
def test_what_the_last_in_order_want_goes_first(policy: str) -> None:
    desk = Desk(policy, ROOMY)
    short, long = list(range(40)), list(range(100, 190))
    desk.fill(short)
    desk.fill(long)
    desk.join([*short, 1])
    desk.join([*long, 1])
    desk.order()
    desk.evict(1)
    gone = short if policy == "lpm" else long
    assert [desk.cached(tokens) for tokens in (short, long)] == [0 if gone is short else 40, 0 if gone is long else 90]


def test_off_takes_the_least_recently_used() -> None:
    with hooks(None):
        desk = Desk("lpm", ROOMY)
        desk.waiting.stop()
        older, newer = two_prompts(desk)
        desk.ours.append(request("r", [*older, 1]))
        desk.evict(40)
        assert (desk.cached(older), desk.cached(newer)) == (0, 40)


# Failures


@pytest.mark.usefixtures("_hooked")
@pytest.mark.parametrize("broken", ["calc_priority", "eviction", "retraction"])
def test_a_failure_gives_sglangs_behaviour_back(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flatradix.integrations.sglang.waiting import waiting_of

    desk = Desk("lpm", ROOMY)
    known = systems(desk)
    for _ in range(20):
        desk.join(alone(desk, known))
    desk.schedule()
    desk.join(alone(desk, known))
    monkeypatch.setattr(desk.waiting.followed.queue, "add", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(desk.waiting.followed.queue, "remove", lambda *_: 1 / 0)
    if broken == "eviction":
        assert desk.evict(5) >= 5
    elif broken == "retraction":
        desk.ours[0].reset_for_retract()
    desk.compare()
    assert waiting_of(desk.policy) is None
    assert desk.cache.before_eviction is None
    assert caplog.text.count("FLATRADIX_QUEUE=1 failed") == 1
    desk.cache.tree.check()


@pytest.mark.usefixtures("_hooked")
def test_an_interruption_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk("lpm", ROOMY)
    desk.join([1, 2])

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(desk.waiting.followed.queue, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        desk.order()
    assert desk.order() == [desk.ours[0].rid]


@pytest.mark.usefixtures("_hooked")
def test_a_reset_is_followed() -> None:
    desk = Desk("lpm", ROOMY)
    older, _ = two_prompts(desk)
    desk.join(older)
    desk.compare()
    desk.cache.reset()
    desk.compare()
    assert desk.ours[0].num_matched_prefix_tokens == 0
    assert isinstance(desk.ours[0].origin_input_ids, array)
