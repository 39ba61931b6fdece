"""The clock of one simulated server.

A server works in steps. At the begin of a step, the requests that have arrived join the queue, and the requests that
have ended leave. Then the server admits requests. The step takes (prefilled tokens) / rate seconds; requests that are
decoded run beside it and cost it nothing. At its end, the prompts are cached, and the requests begin to decode.
If nothing can be admitted, the clock goes on to the next arrival or end.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from flatradix.simulate.load import Job

NEVER = float("inf")


class Server(Protocol):
    """What the clock asks of a server. Requests are numbers; times are seconds."""

    def waiting(self) -> int:
        """Return how many requests wait."""

    def running(self) -> int:
        """Return how many requests are prefilled or decoded."""

    def add(self, numbers: Sequence[int]) -> None:
        """Let requests wait, in the order of their arrival."""

    def next_end(self) -> float:
        """Return when the next running request ends; NEVER if none runs."""

    def release(self, now: float) -> None:
        """Let the requests leave that have ended until `now`."""

    def begin(self, now: float) -> int | None:
        """Begin a step; return its tokens, or None if nothing can be admitted."""

    def end(self, now: float) -> list[tuple[int, int]]:
        """End the step; return (request, cached tokens) of each request whose prefill has ended with it."""

    def reject(self) -> int:
        """Take the request that would be next from the queue for good, and return it."""

    def drain(self) -> None:
        """Check, after the last request, that no slot was lost. Raises RuntimeError."""


class Log:
    """What happened to `count` requests.

    ttft: float64 [count], seconds from the arrival to the end of the prefill; NaN for a rejected request.
    hits: int64 [count], tokens found in the cache. lengths: for each server, (times, lengths) of its queue.
    most_running: the greatest number of requests that one server ran at a time.
    """

    def __init__(self, count: int) -> None:
        self.ttft = np.full(count, np.nan)
        self.hits = np.zeros(count, np.int64)
        self.lengths: list[tuple[array[float], array[int]]] = []
        self.steps = 0
        self.done = 0
        self.rejected = 0
        self.most_running = 0


def serve(
    server: Server, jobs: Sequence[Job], numbers: Sequence[int], rate: float, log: Log, tick: Callable[[Log], None]
) -> None:
    """Run one server until all of its requests have ended. A request without a prompt is rejected.

    jobs: all requests. numbers: those of this server, by arrival. tick: called after each step.
    """
    times, lengths = array("d"), array("q")
    log.lengths.append((times, lengths))
    asked = len(numbers)
    numbers = [number for number in numbers if len(jobs[number].prompt)]
    log.rejected += asked - len(numbers)
    now, coming, count = 0.0, 0, len(numbers)
    while True:
        arrived = coming
        while arrived < count and jobs[numbers[arrived]].arrival <= now:
            arrived += 1
        if arrived > coming:
            server.add(numbers[coming:arrived])
            coming = arrived
        server.release(now)
        times.append(now)
        lengths.append(server.waiting())
        tokens = server.begin(now)
        log.most_running = max(log.most_running, server.running())
        if tokens is not None:
            now += tokens / rate
            _note(log, jobs, server.end(now), now)
            tick(log)
            continue
        ends = server.next_end()
        if server.waiting() and ends == NEVER:
            server.reject()
            log.rejected += 1
            continue
        now = min(ends, jobs[numbers[coming]].arrival if coming < count else NEVER)
        if now == NEVER:
            break
    tick(log)
    server.drain()


def _note(log: Log, jobs: Sequence[Job], ended: list[tuple[int, int]], now: float) -> None:
    log.steps += 1
    log.done += len(ended)
    for number, hit in ended:
        log.ttft[number] = now - jobs[number].arrival
        log.hits[number] = hit
