"""The load of a simulation: requests with their arrival, from a trace or from a built-in workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flatradix.replay import traces, workload

_ARRIVALS = 5  # first number of the seed: no stream of `workload` begins with it
_SHORTEST_OUTPUT, _LONGEST_OUTPUT = 50, 600


class Job(NamedTuple):
    """One request. arrival: in seconds. prompt: int32 [length]. output: tokens that it generates."""

    arrival: float
    prompt: np.ndarray
    output: int


def of_trace(requests: Sequence[traces.Request], progress: Callable[[int], None] | None = None) -> list[Job]:
    """Return the requests of a trace by their arrival, the first at 0 s. A prompt takes 4 bytes a token.

    Requests without timestamps arrive in their order, at random as in `of_workload`, one a second: see `paced`.
    progress: called with the number of prompts made so far.
    """
    times = _arrivals(requests)
    jobs = []
    for at in np.argsort(times, kind="stable").tolist():
        jobs.append(Job(float(times[at]), traces.expand(requests[at]), requests[at].output_length))
        if progress is not None:
            progress(len(jobs))
    return jobs


def _arrivals(requests: Sequence[traces.Request]) -> np.ndarray:
    """Return when each request arrives, in seconds: float64 [N]; with timestamps, the first at 0 s."""
    times = [request.timestamp for request in requests if request.timestamp is not None]
    if len(times) < len(requests):
        return np.cumsum(np.random.default_rng([_ARRIVALS, 0]).exponential(1.0, len(requests)))
    first = min(times, default=0)
    return np.array([(at - first) / 1e3 for at in times], np.float64)


def of_workload(kind: str, requests: int, seed: int, offered: float) -> list[Job]:
    """Return requests of a built-in workload that arrive at random (a Poisson process), `offered` tokens a second."""
    prompts = list(workload.prompts(kind, requests, seed))
    rng = np.random.default_rng([_ARRIVALS, seed])
    arrivals = np.cumsum(rng.exponential(1.0, requests))
    outputs = rng.integers(_SHORTEST_OUTPUT, _LONGEST_OUTPUT + 1, requests)
    jobs = [Job(*job) for job in zip(arrivals.tolist(), prompts, outputs.tolist(), strict=True)]
    return paced(jobs, offered)


def offered(jobs: Sequence[Job]) -> float:
    """Return the prompt tokens that arrive each second, from the first arrival to the last."""
    span = jobs[-1].arrival - jobs[0].arrival if jobs else 0.0
    return sum(len(job.prompt) for job in jobs) / span if span > 0 else float("inf")


def paced(jobs: list[Job], rate: float) -> list[Job]:
    """Return the same requests with a faster or slower clock: they offer `rate` tokens a second."""
    factor = offered(jobs) / rate
    if not 0 < factor < float("inf"):
        return jobs
    return [job._replace(arrival=(job.arrival - jobs[0].arrival) * factor) for job in jobs]
