"""The simulation, compared with times and hits by hand, with an exhaustive search, and with SGLang's scheduler.

A server drains its tree after each run and raises if a slot was lost, so every run here checks that too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")


from flatradix.replay import plot, traces
from flatradix.simulate import belady, load, peer, run, settings
from flatradix.simulate.load import Job
from flatradix.simulate.report import Outcome, Report
from flatradix.simulate.settings import DEFAULTS, ORDERS, Settings, read_policies, read_policy
from tests.cli.test_cli import LINES, call, refused, trace  # noqa: F401  (a fixture)

EVERY_POLICY = [order + extras for order in ORDERS for extras in ("", "+keep+defer")]


def job(arrival: float, tokens: Sequence[int], output: int = 0) -> Job:
    return Job(arrival, np.array(tokens, np.int32), output)


def text(number: int, length: int) -> list[int]:
    """Return `length` tokens that no other number gives."""
    return list(range(1000 * number, 1000 * number + length))


def outcome_of(jobs: list[Job], policy: str = "fcfs", scheduler: str = "flatradix", **options: Any) -> Outcome:
    return report_of(jobs, [policy], scheduler, **options).outcomes[0]


def report_of(jobs: list[Job], policies: list[str], scheduler: str = "flatradix", **options: Any) -> Report:
    plan = Settings(**{"rate": 100.0, "capacity": 1000, "page_size": 4, "chunk": 100, "tpot": 1.0, **options})
    return run.simulate(jobs, plan, read_policies(policies, scheduler), ready(scheduler))


@cache
def ready(scheduler: str) -> run.Scheduler:
    return run.scheduler(scheduler, 4)


@cache
def busy_load() -> list[Job]:
    return load.of_workload("mix", 60, 1, 40_000)


# One server, by hand


def test_a_shared_prefix_is_computed_once() -> None:
    jobs = [job(0, text(1, 8), 2), job(1, text(1, 8) + text(2, 4)), job(2, text(1, 8))]
    found = outcome_of(jobs)
    # The last token of a prompt is always computed, and so is the page that it lies in.
    assert found.hits.tolist() == [0, 8, 4]
    assert found.ttft == pytest.approx([0.08, 0.04, 0.04])
    assert (found.longest_queue, found.most_running, found.rejected, found.steps) == (1, 2, 0, 3)
    assert found.end == pytest.approx(2.04)


def test_an_overloaded_queue() -> None:
    jobs = [job(0, text(number, 10)) for number in range(4)] + [job(3.5, text(9, 10))]
    found = outcome_of(jobs, rate=10.0, chunk=10, page_size=2)
    assert found.ttft == pytest.approx([1, 2, 3, 4, 1.5])
    assert found.longest_queue == 4
    assert found.queue.tolist()[:5] == [4, 3, 2, 1, 1], "the fourth is on its way when the fifth comes"


def test_a_long_prompt_is_cut_at_pages() -> None:
    jobs = [job(0, text(1, 25)), job(0, text(2, 4)), job(0, text(3, 8))]
    found = outcome_of(jobs, rate=1.0, chunk=10)
    # 8, 8 and 8 tokens; then the last one, the second prompt, and no page of the third; then the third.
    assert found.ttft == pytest.approx([29, 29, 37])
    assert found.steps == 5


def test_later_requests_find_the_pages_of_a_cut_prompt() -> None:
    found = outcome_of([job(0, text(1, 24)), job(10, text(1, 25))], rate=1.0, chunk=10)
    assert found.hits.tolist() == [0, 24]


def test_a_decoding_request_holds_its_slots() -> None:
    jobs = [job(0, text(1, 12), 4), job(0, text(2, 12), 4)]
    found = outcome_of(jobs, capacity=20)
    assert found.ttft == pytest.approx([0.12, 0.12 + 4 + 0.12])
    assert found.most_running == 1
    assert outcome_of(jobs, capacity=32).ttft == pytest.approx([0.24, 0.24])
    assert outcome_of(jobs, max_running=1).ttft == pytest.approx([0.12, 4.24])


def test_an_output_stays_cached() -> None:
    first = job(0, text(1, 6), 4)
    output = [traces.VOCABULARY] * 4  # of request 0
    assert outcome_of([first, job(9, text(1, 6) + output)]).hits.tolist() == [0, 8]


def test_what_never_fits_is_rejected() -> None:
    jobs = [job(0, text(1, 12)), job(0, text(2, 21)), job(0, text(3, 18), 8), job(0, text(4, 8))]
    found = outcome_of(jobs, capacity=20)
    assert found.rejected == 2
    assert np.isnan(found.ttft).tolist() == [False, True, True, False]


def test_an_empty_prompt_is_rejected() -> None:
    found = outcome_of([job(0, []), job(0, text(1, 4))])
    assert found.rejected == 1
    assert found.ttft == pytest.approx([np.nan, 0.04], nan_ok=True)
    assert outcome_of([]).hits.tolist() == []


def test_more_servers_than_requests() -> None:
    assert outcome_of([job(0, text(1, 10))], servers=3).ttft == pytest.approx([0.1])


def test_the_longest_match_goes_first() -> None:
    jobs = [job(0, text(1, 8)), job(1, text(2, 8)), job(1, text(1, 8) + text(3, 4))]
    assert outcome_of(jobs, "fcfs", chunk=8).ttft == pytest.approx([0.08, 0.08, 0.12])
    assert outcome_of(jobs, "lpm", chunk=8).ttft == pytest.approx([0.08, 0.12, 0.08])
    # The chunk has room for the 4 tokens that are not cached and for one page of the other prompt.


def test_keep_spares_what_waits() -> None:
    jobs = [job(0, text(1, 8)), job(1, text(2, 8)), job(2, text(3, 8)), job(2, text(1, 8) + text(4, 4))]
    assert outcome_of(jobs, "fcfs", capacity=20).hits.tolist() == [0, 0, 0, 0]
    assert outcome_of(jobs, "fcfs+keep", capacity=20).hits.tolist() == [0, 0, 0, 8]


def test_defer_lets_the_older_one_bring_the_prefix() -> None:
    shared = text(1, 8)
    jobs = [job(0, shared + text(2, 4)), job(0, shared + text(3, 4)), job(0, text(4, 12))]
    assert outcome_of(jobs, "fcfs", chunk=24).hits.tolist() == [0, 0, 0]
    assert outcome_of(jobs, "fcfs+defer", chunk=24).hits.tolist() == [0, 8, 0]


def test_duplicates_of_one_step_are_cached_once() -> None:
    found = outcome_of([job(0, text(1, 8), 3), job(0, text(1, 8), 3), job(2, text(1, 9))])
    assert found.hits.tolist() == [0, 0, 8]


def test_servers_take_turns() -> None:
    jobs = [job(number, text(1, 8) + text(2 + number, 4)) for number in range(4)]
    assert outcome_of(jobs, servers=2).hits.tolist() == [0, 0, 8, 8]
    crowd = outcome_of([job(0, text(number, 10)) for number in range(4)], rate=10.0, chunk=12, servers=2)
    assert crowd.ttft == pytest.approx([1, 1, 2, 2])
    assert (crowd.longest_queue, int(crowd.queue.max())) == (2, 4)


# Every policy


@pytest.mark.parametrize("policy", EVERY_POLICY)
def test_every_policy_serves_all_and_repeats(policy: str) -> None:
    options = {"rate": 30_000.0, "capacity": 60_000, "page_size": 16, "chunk": 2048, "tpot": 0.02}
    first, second = (outcome_of(busy_load(), policy, **options) for _ in range(2))
    assert first.rejected == 0
    assert not np.isnan(first.ttft).any()
    assert first.hit_tokens > 0
    assert first.hits.tolist() == second.hits.tolist()
    assert first.ttft.tolist() == second.ttft.tolist()


def test_names_of_policies() -> None:
    policies = read_policies(["aged+defer+keep", "fcfs", "fcfs"], "flatradix")
    assert [policy.name for policy in policies] == ["aged+keep+defer", "fcfs"]
    for scheduler, names in DEFAULTS.items():
        assert tuple(policy.name for policy in read_policies(None, scheduler)) == names
    of_ours, of_theirs = ("best", "fcfs+hold", "+keep"), ("aged", "lpm+keep")
    for wrong, scheduler in [(name, "flatradix") for name in of_ours] + [(name, "sglang") for name in of_theirs]:
        with pytest.raises(ValueError, match="policy"):
            read_policy(wrong, scheduler)


# Belady


def blocks(*numbers: int) -> np.ndarray:
    return np.repeat(np.array(numbers, np.int32), traces.BLOCK_TOKENS)


def test_belady_by_hand() -> None:
    hits = lambda room, *prompts: belady.hit_tokens(prompts, 512 * room + 511) // 512  # noqa: E731
    assert hits(9, blocks(1, 2), blocks(1, 2), blocks(1, 3)[:-1], blocks(2, 1)) == 3
    assert hits(2, blocks(1), blocks(2), blocks(3), blocks(1), blocks(2)) == 1, "2 goes for 3: its next use is later"
    assert hits(2, blocks(1, 2, 3), blocks(1, 2, 3)) == 2, "a prompt that is larger than the cache leaves its beginning"
    assert hits(1, blocks(1, 2), blocks(1, 3)) == 1
    assert hits(0, blocks(1), blocks(1)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_belady_is_the_best(seed: int) -> None:
    """No choice of leaves to evict gives more hits: a search over all of them finds the same."""
    rng = np.random.default_rng(seed)
    paths = [tuple(rng.integers(0, 2, rng.integers(1, 4)).tolist()) for _ in range(8)]
    prompts = [blocks(*(10 * depth + way for depth, way in enumerate(path))) for path in paths]
    assert belady.hit_tokens(prompts, 512 * 4) == 512 * _most_hits(tuple(paths), 4)


def _most_hits(paths: tuple[tuple[int, ...], ...], room: int) -> int:
    @cache
    def best(now: int, held: frozenset[tuple[int, ...]]) -> int:
        if now == len(paths):
            return 0
        own = [paths[now][: end + 1] for end in range(len(paths[now]))]
        found = sum(block in held for block in own)
        return found + max(best(now + 1, kept) for kept in _shrunk(held | set(own), frozenset(own), room))

    return best(0, frozenset())


def _shrunk(held: frozenset[tuple[int, ...]], own: frozenset[tuple[int, ...]], room: int) -> set[frozenset]:
    if len(held) <= room:
        return {held}
    leaves = [block for block in held - own if not any(other[:-1] == block for other in held)]
    return {kept for leaf in leaves for kept in _shrunk(held - {leaf}, own, room)}


def test_policies_stay_below_belady_in_whole_blocks() -> None:
    report = report_of(busy_load(), ["fcfs", "fcfs+keep"], rate=30_000.0, capacity=60_000, page_size=512, chunk=8192)
    for outcome in report.outcomes:
        share = report.of_belady(outcome)
        assert share is not None
        assert 0 < share <= 1


# The load


def test_a_trace_is_sorted_and_begins_at_zero() -> None:
    requests = [traces.Request(2500, 700, 3, (1, 2)), traces.Request(500, 512, 4, (1,))]
    jobs = load.of_trace(requests)
    assert [(one.arrival, len(one.prompt), one.output) for one in jobs] == [(0.0, 512, 4), (2.0, 700, 3)]
    assert jobs[1].prompt[:512].tolist() == jobs[0].prompt.tolist()
    assert load.offered(jobs) == 606
    assert load.offered(load.paced(jobs, 1212.0)) == pytest.approx(1212)
    assert load.paced(jobs[:1], 5.0) == jobs[:1]


def test_the_built_in_load() -> None:
    jobs = busy_load()
    assert load.offered(jobs) == pytest.approx(40_000)
    assert [one.arrival for one in jobs] == sorted(one.arrival for one in jobs)


# SGLang


def sglang_or_skip() -> None:
    if "sglang" in sys.modules and "sglang.srt.mem_cache.memory_pool" not in sys.modules:
        pytest.skip("this process has imported parts of SGLang with stand-ins")
    try:
        peer.load()
    except peer.PeerMissingError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("page_size", [1, 16])
def test_the_rival_equals_ours_without_pressure(page_size: int) -> None:
    sglang_or_skip()
    options = {"rate": 30_000.0, "capacity": 2**21, "page_size": page_size, "chunk": 2048, "tpot": 0.02}
    ours, theirs = (outcome_of(busy_load(), "fcfs", name, **options) for name in ("flatradix", "sglang"))
    assert ours.hits.tolist() == theirs.hits.tolist()
    assert ours.ttft.tolist() == theirs.ttft.tolist()
    assert (ours.longest_queue, ours.steps) == (theirs.longest_queue, theirs.steps)
    assert ours.queue.tolist() == theirs.queue.tolist()
    assert ours.most_running == theirs.most_running


@pytest.mark.parametrize("policy", settings.SGLANG_ORDERS)
def test_the_rival_under_pressure(policy: str) -> None:
    sglang_or_skip()
    options = {"rate": 30_000.0, "capacity": 60_000, "page_size": 16, "chunk": 2048, "tpot": 0.02}
    found, again = (outcome_of(busy_load(), policy, "sglang", **options) for _ in range(2))
    assert found.hits.tolist() == again.hits.tolist()
    assert found.rejected == 0
    assert not np.isnan(found.ttft).any()
    assert found.hit_tokens > 0
    assert found.cache.startswith(f"SGLang {peer.VERSION}, ")


def test_without_sglang(trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(peer, "load", peer.load.__wrapped__)
    monkeypatch.setattr(peer, "__file__", str(tmp_path / "a" / "b" / "peer.py"))
    monkeypatch.setattr(peer.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("FLATRADIX_PEERS", raising=False)
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    line = refused("simulate", trace, "--scheduler", "sglang")
    assert "needs SGLang 0.5.23, which is not installed" in line
    assert "pip install --no-deps --target" in line


# The command


def test_command(trace: str, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out.json"
    server = ["--rate", "1000", "--capacity", "2000", "--page-size", "100"]
    result = call("simulate", trace, *server, "--policy", "fcfs", "--policy", "lpm+keep", "--json", str(out))
    assert result.exit_code == 0, result.output
    assert result.stderr == "simulating 3 requests of trace.jsonl with 2 policies\n"
    for word in ("hit rate", "TTFT mean", "p50", "p99", "queue", "of Belady", "fcfs", "lpm+keep", "2,900 prompt"):
        assert word in result.stdout
    figures = json.loads(out.read_text())
    assert (figures["source"], figures["requests"], figures["input_tokens"]) == ("trace.jsonl", len(LINES), 2900)
    assert [row["policy"] for row in figures["policies"]] == ["fcfs", "lpm+keep"]
    row = figures["policies"][0]
    # All three arrive within 2 ms. The first takes 1 s; then the others are prefilled together.
    assert row["hit_tokens"] == 1500
    assert row["ttft_seconds"]["mean"] == pytest.approx((1 + 2 * 1.4 - 0.003) / 3)
    assert row["longest_queue"] == 2
    assert set(row["samples"]) == {"time", "queue", "arrival", "ttft_seconds"}
    assert figures["belady_hit_tokens"] == 2 * 512
    assert row["of_belady"] == pytest.approx(1500 / 1024)


def test_json_to_standard_output(trace: str) -> None:  # noqa: F811
    result = call("simulate", trace, "--json", "-", "--limit", "2", "--offered", "1000")
    figures = json.loads(result.stdout)
    assert figures["requests"] == 2
    assert figures["offered_tokens_per_second"] == pytest.approx(1000)
    assert [row["policy"] for row in figures["policies"]] == list(DEFAULTS["flatradix"])
    assert "hit rate" in result.stderr


def test_built_in_workload_and_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    result = call("simulate", "--requests", "20", "--workload", "agents", "--figure", str(path))
    assert result.exit_code == 0, result.output
    assert "the built-in workload (agents)" in result.stdout
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rate", "0"], "--rate 0: it must be more than 0"),
        (["--capacity", "63"], "--capacity 63 is less than one page of 64 tokens"),
        (["--chunk", "10"], "--chunk 10 is less than one page"),
        (["--servers", "0"], "--servers 0: it must be 1 or more"),
        (["--max-running", "0"], "--max-running 0"),
        (["--tpot", "-1"], "--tpot -1"),
        (["--every", "0"], "--every 0"),
        (["--patience", "0"], "--patience 0"),
        (["--offered", "0"], "--offered 0"),
        (["--policy", "best"], "policy 'best' is unknown to flatradix: one of fcfs, lpm"),
        (["--policy", "fcfs+hold"], "+hold is unknown"),
        (["--scheduler", "vllm"], "scheduler 'vllm' is unknown: one of flatradix, sglang"),
        (["--scheduler", "sglang", "--policy", "lpm+keep"], "SGLang has no +keep"),
        (["--workload", "songs"], "workload 'songs' is unknown"),
        (["--figure", "a.txt"], "the name of a plot ends in .png"),
        (["--json", "/no/such/folder/a.json"], "there is no directory"),
        (["--limit", "0"], "--limit 0"),
    ],
)
def test_refuses_before_any_work(arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "simulate", lambda *_: pytest.fail("it began to work"))
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: True)
    assert reason in refused("simulate", *arguments)


def test_refuses_with_a_trace(trace: str) -> None:  # noqa: F811
    assert "--requests is for the built-in workload" in refused("simulate", trace, "--requests", "5")
    assert "this would overwrite the trace" in refused("simulate", trace, "--json", trace)
    assert "no such file" in refused("simulate", "missing.jsonl")


def test_help_names_the_policies() -> None:
    shown = " ".join(call("simulate", "--help").stdout.split())
    for word in (*ORDERS, "--scheduler", "--figure", "+keep", "Belady"):
        assert word in shown
    assert "simulate" in call("--help").stdout
