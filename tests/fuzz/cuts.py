"""Interrupts calls of a random program: at a random bytecode, by a real timer, or at an allocation that fails."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from random import Random
from typing import Any, Protocol

from tests.support.interrupts import Interrupt, fails_at, interrupt_at, timer

BYTECODE, TIMER, ALLOCATION = "cuts at a bytecode", "cuts by a timer", "cuts at an allocation"
WAYS = (BYTECODE, TIMER, ALLOCATION)
SHARES = (90, 8, 2)
ATTEMPTS = 30


class Cutter:
    """Makes calls, and interrupts them. counts: the cuts by their way, and the calls."""

    def __init__(self, random: Random, counts: Counter[str], shares: tuple[int, ...] = SHARES) -> None:
        """shares: how often each of WAYS is taken."""
        self.random, self.counts, self.shares = random, counts, shares
        self._bytecodes: dict[str, float] = defaultdict(lambda: 200.0)  # of a whole call, by name, roughly
        self._seconds: dict[str, float] = defaultdict(lambda: 1e-4)

    def cut(self, name: str, call: Callable[[], Any], is_done: Callable[[], bool] | None = None) -> None:
        """Make a call that is interrupted a few times, each time made again, as a caller may, and often whole at last.

        is_done: tells whether an interrupted call has taken effect; it is then not made again. None: it has no effect.
        An error that the call raises by itself passes.
        """
        for _ in range(self.random.randint(0, ATTEMPTS)):
            self.counts["calls"] += 1
            (way,) = self.random.choices(WAYS, self.shares)
            cut = self._make(way, name, call)
            self.counts[way] += cut
            self.counts["cuts"] += cut
            if not cut or (is_done is not None and is_done()):
                return
        if self.random.random() < 0.6:
            self.counts["calls"] += 1
            call()

    def _make(self, way: str, name: str, call: Callable[[], Any]) -> bool:
        if way == BYTECODE:
            outcome = interrupt_at(int(self.random.random() * (1.01 * self._bytecodes[name] + 2)), call)
            if not outcome.where:
                self._bytecodes[name] += (outcome.ran - self._bytecodes[name]) / 2
            elif self.random.random() < 0.05:
                self._bytecodes[name] *= 1.3  # a call that was always cut has shown no length
            return bool(outcome.where)
        if way == ALLOCATION:
            return fails_at(self.random.randrange(12), call)
        return self._ring(name, call)

    def _ring(self, name: str, call: Callable[[], Any]) -> bool:
        begun = time.perf_counter()
        try:
            with timer(self.random.uniform(1e-6, 1.5 * self._seconds[name])):
                call()
        except Interrupt:
            return True
        self._seconds[name] += (time.perf_counter() - begun - self._seconds[name]) / 4
        return False


class Program(Protocol):
    """Random calls that are interrupted, beside what the caller knows."""

    def run_one(self) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None: ...


def run_programs(
    make: Callable[[Random, Counter[str]], Program], seed: str, programs: int, steps: int, steps_a_check: int
) -> Counter[str]:
    """Run some programs, each of so many steps; return what they count."""
    random, counts = Random(seed), Counter[str]()
    for _ in range(programs):
        program = make(random, counts)
        for step in range(1, steps + 1):
            program.run_one()
            if step % steps_a_check == 0:
                program.check()
        program.close()
        counts["programs"] += 1
    return counts
