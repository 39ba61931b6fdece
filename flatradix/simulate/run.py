"""Running a simulation: each policy on the same requests, on new servers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter, process_time
from typing import NamedTuple

import numpy as np
import torch

from flatradix.replay.report import versions
from flatradix.simulate import belady
from flatradix.simulate.load import Job, offered
from flatradix.simulate.report import Outcome, Report
from flatradix.simulate.serve import Log, Server, serve
from flatradix.simulate.server import FlatServer
from flatradix.simulate.settings import Policy, Settings
from flatradix.warm_up import warm_up

Progress = Callable[[str, int, float], None]
_SECONDS_BETWEEN_REPORTS = 0.1


class Scheduler(NamedTuple):
    """What serves. make: returns a new server. cache: a name for the cache of these servers."""

    name: str
    cache: str
    make: Callable[[Sequence[Job], Settings, Policy], Server]


def scheduler(name: str, page_size: int) -> Scheduler:
    """Return a scheduler, "flatradix" or "sglang", ready to run. Raises `sglang.PeerMissingError`."""
    if name == "sglang":
        from flatradix.simulate import sglang  # optional

        return Scheduler(name, sglang.cache_name(), sglang.SGLangServer)
    warm_up("cpu", page_size)
    return Scheduler(name, "flatradix.RadixTree", FlatServer)


def simulate(
    jobs: Sequence[Job],
    settings: Settings,
    policies: Sequence[Policy],
    serving: Scheduler,
    progress: Progress | None = None,
) -> Report:
    """Run all policies on the same requests (by arrival) and return the report.

    Requests go to the servers in turn (round robin), whatever the policy. progress: called with the policy, the number
    of prefilled requests and the hit rate so far, about 10 times a second and at the end of each policy.
    """
    settings.validate()
    shares = [range(first, len(jobs), settings.servers) for first in range(settings.servers)]
    tell = progress or (lambda policy, done, rate: None)
    with _one_thread():
        outcomes = [_outcome(jobs, shares, settings, policy, serving, tell) for policy in policies]
    return Report(
        settings=settings,
        scheduler=serving.name,
        requests=len(jobs),
        input_tokens=sum(len(job.prompt) for job in jobs),
        offered=offered(jobs),
        belady_tokens=sum(belady.hit_tokens((jobs[n].prompt for n in share), settings.capacity) for share in shares),
        outcomes=outcomes,
        versions=versions(),
    )


def _outcome(
    jobs: Sequence[Job], shares: list[range], settings: Settings, policy: Policy, serving: Scheduler, tell: Progress
) -> Outcome:
    log = Log(len(jobs))
    begin = process_time()
    lengths = np.array([len(job.prompt) for job in jobs])
    tick = _ticker(lengths, policy, tell)
    for share in shares:
        serve(serving.make(jobs, settings, policy), jobs, share, settings.rate, log, tick)
    tell(policy.name, log.done, _hit_rate(lengths, log))
    arrivals = np.array([job.arrival for job in jobs])
    times, queue = _all_queues(log.lengths)
    return Outcome(
        policy=policy.name,
        cache=serving.cache,
        arrivals=arrivals,
        ttft=log.ttft,
        hits=log.hits,
        times=times,
        queue=queue,
        longest_queue=max((max(lengths, default=0) for _, lengths in log.lengths), default=0),
        most_running=log.most_running,
        rejected=log.rejected,
        steps=log.steps,
        end=float(np.nanmax(arrivals + log.ttft, initial=0.0)),
        cpu_seconds=process_time() - begin,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch's threads out of tensors of a few KiB: there they cost more time than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ticker(lengths: np.ndarray, policy: Policy, tell: Progress) -> Callable[[Log], None]:
    due = perf_counter()

    def tick(log: Log) -> None:
        nonlocal due
        if perf_counter() >= due:
            tell(policy.name, log.done, _hit_rate(lengths, log))
            due = perf_counter() + _SECONDS_BETWEEN_REPORTS

    return tick


def _hit_rate(lengths: np.ndarray, log: Log) -> float:
    """Return the hit rate of the requests whose prefill has ended."""
    return float(log.hits.sum()) / max(1, int(lengths[~np.isnan(log.ttft)].sum()))


def _all_queues(lengths: list[tuple[array[float], array[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Return times, float64 [S], and how many requests waited on all servers then, int64 [S]."""
    times = np.concatenate([np.array(of_one) for of_one, _ in lengths])
    changes = np.concatenate([np.diff(np.array(waiting, np.int64), prepend=0) for _, waiting in lengths])
    order = np.argsort(times, kind="stable")
    return times[order], np.cumsum(changes[order])
