"""Run random programs of a waiting queue beside plain Python: python3 -m tests.gpu.soak_queue --seconds 240

A round is one program: 40 to 80 rules of tests/queue/test_machine.py, on a tree on the GPU and a tree on the CPU. The
queue's columns and a plan are compared after each rule, everything else after every eighth. A call that all trees get
is one operation, and so is a look at all columns. Round N of seed S draws everything from Random("S/N"). At a
difference, the program prints how to repeat the round, and exits with 1.
Without a GPU, TRITON_INTERPRET=1 runs a few rules.
"""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis.stateful import INITIALIZE_RULE_MARKER, RULE_MARKER

from flatradix.inputs import devices
from tests.queue.test_machine import ORDERS, QueueMachine
from tests.support.interpreter import patch_once_a_launch
from tests.support.waiting import Plan
from tests.tree.test_machine import POLICIES

DIFFERENCES = (Exception, pytest.fail.Exception)  # the latter is a BaseException
RULES_A_CHECK = 8
SECONDS_A_LINE = 5
STOPPED = 128 + signal.SIGTERM


class Configuration(NamedTuple):
    page_size: int
    bigram: bool

    def __str__(self) -> str:
        return f"page {self.page_size} {'bigrams' if self.bigram else 'tokens'}"


CONFIGURATIONS = tuple(Configuration(page_size, bigram) for bigram in (False, True) for page_size in (1, 2, 16, 64))


def flip(random: Random) -> bool:
    return random.random() < 0.5


# Each draws an argument of this name.
DRAWS: dict[str, Callable[[Random], Any]] = {
    **dict.fromkeys(("again", "bad", "compute_last", "defer", "everything", "less", "listens", "lock"), flip),
    **dict.fromkeys(("odd", "serve", "split", "there", "touch", "whole", "wide_slots"), flip),
    "keep": lambda random: random.random() < 0.7,
    "pages": lambda random: random.randint(0, 6),
    "policy": lambda random: random.choice(ORDERS),
    "random": lambda random: random,
    "rounds": lambda random: random.randint(1, 4),
    "space": lambda random: random.randint(0, 12),
    "slot_device": lambda random: random.choice((None, "cpu")),
    "steps": lambda random: random.randint(1, 5),
    "what": lambda random: random.choice(("reset", "evict", "evict -1", "unlock", "save", "load")),
}
DRAWS_OF_START = DRAWS | {
    "evict_by": lambda random: random.choice(("node", "page")),
    "pages": lambda random: random.choice((6, 15, 31, 63, 64)),
    "policy": lambda random: random.choice(POLICIES),
}
# The names of the arguments, of each rule and of the start.
RULES: dict[str, tuple[str, ...]] = {
    name: tuple(getattr(member, RULE_MARKER).arguments)
    for name, member in inspect.getmembers(QueueMachine)
    if hasattr(member, RULE_MARKER)
}
START = tuple(getattr(QueueMachine.start, INITIALIZE_RULE_MARKER).arguments)
OFTEN = {"add": 4, "busy": 6, "insert_after_evicting": 4, "order": 4, "plan": 6}
SELDOM = {"reopen": 1, "whole_tree": 1}
WEIGHTS = [(OFTEN | SELDOM).get(name, 2) for name in RULES]


class Totals(Counter[str]):
    """Counters over all rounds."""

    @property
    def operations(self) -> int:
        return self["calls"] + self["orders"] + self["plans"] + self["looks"]

    def __str__(self) -> str:
        counts = [f"{self[name]} {name}" for name in ("calls", "orders", "plans", "looks")]
        counts.append(f"{self['refused']} calls refused")
        return f"{self.operations} operations in {self['programs']} programs ({', '.join(counts)})"


class Program(QueueMachine):
    """The machine of a queue. It draws rules itself, and counts."""

    def __init__(self, random: Random, device: str, configuration: Configuration, totals: Totals) -> None:
        super().__init__(device, *configuration)
        self.random = random
        self.totals = totals
        self.done: list[str] = []

    def draw(self, names: Sequence[str], draws: dict[str, Callable[[Random], Any]]) -> dict[str, Any]:
        return {name: draws[name](self.random) for name in names}

    def run(self, is_over: Callable[[], bool]) -> None:
        """Run one program, up to its end or until `is_over`."""
        self.done.append("start")
        self.start(**self.draw(START, DRAWS_OF_START))
        for number in range(1, self.random.randint(40, 80) + 1):
            if is_over():
                break
            (name,) = self.random.choices(list(RULES), WEIGHTS)
            self.done.append(name)
            getattr(self, name)(**self.draw(RULES[name], DRAWS))
            self.queues_agree()
            self.plans_agree()
            if number % RULES_A_CHECK == 0:
                self.check_all()
        self.steps_away = 0
        self.done.append("the end")
        self.check_all()
        self.totals["programs"] += 1

    # Counted

    def expect(self, *arguments: Any, **keywords: Any) -> Any:
        found = super().expect(*arguments, **keywords)
        self.totals["calls"] += 1
        self.totals["refused"] += found is None
        return found

    def order(self, random: Random, policy: Any, defer: bool) -> None:
        super().order(random, policy, defer)
        self.totals["orders"] += 1

    def compare_plans(self, order: tuple[Any, Any], options: dict[str, Any]) -> Plan:
        found = super().compare_plans(order, options)
        self.totals["plans"] += 1
        return found

    def queues_agree(self) -> None:
        self.totals["looks"] += self.steps_away == 0
        super().queues_agree()


class Clock:
    """Prints the totals every few seconds, and says when to end."""

    def __init__(self, totals: Totals, operations: int, seconds: float) -> None:
        self.totals = totals
        self.operations = operations
        self.started = self.printed = time.monotonic()
        self.deadline = self.started + seconds

    def is_over(self) -> bool:
        now = time.monotonic()
        if now - self.printed >= SECONDS_A_LINE:
            self.printed = now
            print(f"{now - self.started:6.1f} s  {self.totals}", flush=True)
        return self.totals.operations >= self.operations or now >= self.deadline


def print_at_end(totals: Totals) -> None:
    """Have SIGTERM print the totals and end the process at once."""

    def stop(*_: Any) -> None:
        os.write(1, f"\nstopped: {totals}\n".encode())
        os._exit(STOPPED)

    signal.signal(signal.SIGTERM, stop)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.soak_queue", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, default=0, help="the round to begin with")
    parser.add_argument("--device", default="cuda")
    return parser.parse_args(arguments)


def soak(options: argparse.Namespace, totals: Totals) -> int:
    """Run rounds. Return the exit code."""
    clock = Clock(totals, options.operations, options.seconds)
    number = options.round
    ran: dict[Configuration, None] = {}
    while not clock.is_over():
        configuration = CONFIGURATIONS[number % len(CONFIGURATIONS)]
        ran[configuration] = None
        before = totals.operations
        program = Program(Random(f"{options.seed}/{number}"), options.device, configuration, totals)
        try:
            program.run(clock.is_over)
        except DIFFERENCES:
            traceback.print_exc()
            print(
                f"DIFFERENCE in round {number}, rule {len(program.done) - 1} ({program.done[-1]}), {configuration}; "
                f"again: python3 -m tests.gpu.soak_queue --device {options.device} --seed {options.seed} "
                f"--round {number} --operations {totals.operations - before + 1}\n{totals}",
                flush=True,
            )
            return 1
        number += 1
    taken = time.monotonic() - clock.started
    print(f"ok: {totals}, configuration {', '.join(map(str, ran))}; {taken:.0f} s", flush=True)
    return 0


def main() -> int:
    torch.set_num_threads(1)  # as tests/conftest.py does
    if devices.interpreted():
        patch_once_a_launch()
    options = parse()
    reason = devices.why_not_cuda() if options.device == "cuda" else ""
    if reason:
        raise SystemExit(reason)
    totals = Totals()
    print_at_end(totals)
    return soak(options, totals)


if __name__ == "__main__":
    raise SystemExit(main())
