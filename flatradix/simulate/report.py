"""The results of a simulation: figures of each policy, series over time, and their form as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flatradix.simulate.settings import Settings

_SAMPLES = 100


@dataclass(frozen=True)
class Outcome:
    """What one policy gave. Arrays with one entry a request are in the order of arrival.

    cache: what the servers' cache was. arrivals: float64 [N], in seconds. ttft: float64 [N], seconds from a request's
    arrival to the end of its prefill; NaN where it was rejected. hits: int64 [N], tokens found in the cache. times:
    float64 [S], seconds; queue: int64 [S], requests that waited on all servers then. longest_queue: of one server.
    most_running: the greatest number of requests that one server ran at a time. steps: prefill steps of all servers.
    end: when the last prefill ended, in seconds. cpu_seconds: what the simulation itself took.
    """

    policy: str
    cache: str
    arrivals: np.ndarray
    ttft: np.ndarray
    hits: np.ndarray
    times: np.ndarray
    queue: np.ndarray
    longest_queue: int
    most_running: int
    rejected: int
    steps: int
    end: float
    cpu_seconds: float

    @property
    def hit_tokens(self) -> int:
        return int(self.hits.sum())

    def served(self) -> np.ndarray:
        """Return the TTFT of the requests that were served, float64 [<= N], in seconds."""
        return self.ttft[~np.isnan(self.ttft)]

    def ttft_figures(self) -> dict[str, float | None]:
        """Return mean, p50, p99 and max of the TTFT in seconds; None if no request was served."""
        served = self.served()
        if not len(served):
            return dict.fromkeys(("mean", "p50", "p99", "max"))
        p50, p99 = np.percentile(served, [50, 99])
        return {"mean": float(served.mean()), "p50": float(p50), "p99": float(p99), "max": float(served.max())}


@dataclass(frozen=True)
class Report:
    """The outcomes of all policies. offered: prompt tokens that arrive each second. belady_tokens: see `belady`."""

    settings: Settings
    scheduler: str
    requests: int
    input_tokens: int
    offered: float
    belady_tokens: int
    outcomes: list[Outcome]
    versions: dict[str, str]

    def hit_rate(self, outcome: Outcome) -> float:
        """Return the share of all prompt tokens that was found in the cache."""
        return outcome.hit_tokens / max(1, self.input_tokens)

    def of_belady(self, outcome: Outcome) -> float | None:
        """Return the hits as a share of Belady's; None where Belady has none."""
        return outcome.hit_tokens / self.belady_tokens if self.belady_tokens else None

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data. Series are reduced to up to 100 samples."""
        return {
            "scheduler": self.scheduler,
            **asdict(self.settings),
            "requests": self.requests,
            "input_tokens": self.input_tokens,
            "offered_tokens_per_second": self.offered if self.offered < float("inf") else None,
            "belady_hit_tokens": self.belady_tokens,
            "policies": [self._outcome(outcome) for outcome in self.outcomes],
            "versions": self.versions,
        }

    def _outcome(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "policy": outcome.policy,
            "cache": outcome.cache,
            "hit_tokens": outcome.hit_tokens,
            "hit_rate": self.hit_rate(outcome),
            "of_belady": self.of_belady(outcome),
            "ttft_seconds": outcome.ttft_figures(),
            "longest_queue": outcome.longest_queue,
            "most_running": outcome.most_running,
            "rejected": outcome.rejected,
            "steps": outcome.steps,
            "end_seconds": outcome.end,
            "cpu_seconds": outcome.cpu_seconds,
            "samples": _samples(outcome),
        }


def mean_ttft(outcome: Outcome, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Return arrival times (the middle of each bin, seconds) and the mean TTFT of what arrived then, without gaps."""
    served = ~np.isnan(outcome.ttft)
    arrivals, ttft = outcome.arrivals[served], outcome.ttft[served]
    if not len(arrivals):
        return np.empty(0), np.empty(0)
    width = max(float(arrivals.max()), 1e-9) / bins
    place = np.minimum((arrivals / width).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = np.bincount(place, ttft, minlength=bins)
    some = counts > 0
    return (np.arange(bins)[some] + 0.5) * width, sums[some] / counts[some]


def thinned(outcome: Outcome, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return times (seconds) and the greatest length of the queue from each to the next, at most `points` of them."""
    steps = len(outcome.times)
    starts = np.unique(np.linspace(0, steps - 1, min(steps, points)).astype(np.int64)) if steps else np.empty(0, int)
    if not len(starts):
        return np.empty(0), np.empty(0, np.int64)
    return outcome.times[starts], np.maximum.reduceat(outcome.queue, starts)


def _samples(outcome: Outcome) -> dict[str, list[float]]:
    times, queue = thinned(outcome, _SAMPLES)
    arrivals, ttft = mean_ttft(outcome, _SAMPLES)
    return {
        "time": times.tolist(),
        "queue": queue.tolist(),
        "arrival": arrivals.tolist(),
        "ttft_seconds": ttft.tolist(),
    }
