"""Run random programs of a PrefixCache beside a model: python3 -m tests.cache.soak --operations 1000000 --processes 2

One call of the cache is one operation, however many requests it takes. A round is one program of tests/support/
prefix_program.py: up to 2000 calls of one cache. After each call, all slots by state, all counters, and the numbers and
the pages of each running request are compared with tests/support/prefix_model.py; after every 300th, `check` and all
tokens and slots too. Round N of seed S draws everything from Random("S/N"). Page sizes take turns: 1, 2, 16, 64.
At a difference, the program prints how to repeat the round, and exits with 1. With an index on a GPU, seven of
ten commits and ends are not looked at, so that they stay pending. Without a GPU, TRITON_INTERPRET=1 --device cuda runs
a few calls.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from random import Random
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flatradix.inputs import devices
from tests.support.interpreter import patch_once_a_launch
from tests.support.prefix_program import LENGTHS, Configuration, Program

FAULTS = (Exception, pytest.fail.Exception)  # the latter is a BaseException
PAGES = tuple(LENGTHS)
CALLS_A_ROUND = 2000
SECONDS_A_LINE = 10
SHOWN = ("prompts", "refused", "forks", "short", "steps of a request", "loans", "evicted pages", "looks", "checks")


class Round(NamedTuple):
    """What a round counted. fault: what to print if it failed."""

    number: int
    counts: Counter[str]
    fault: str = ""


def run_round(seed: int, number: int, calls: int, device: str = "cpu", kv: str = "cpu") -> Round:
    """Run a round of so many calls."""
    random, counts = Random(f"{seed}/{number}"), Counter[str]()
    configuration = Configuration.draw(random, PAGES[number % len(PAGES)], apart=device == kv == "cpu")
    program = Program(random, configuration, device, kv, counts)
    try:
        program.run(calls)
    except FAULTS:
        made = counts["calls"]
        again = f"--device {device} --kv {kv} --seed {seed} --round {number} --operations {made}"
        return Round(
            number,
            counts,
            f"{traceback.format_exc()}the last calls: {', '.join(program.done[-8:])}\n"
            f"DIFFERENCE in round {number}, call {made} ({program.done[-1]}), {configuration}; "
            f"again: python3 -m tests.cache.soak {again}",
        )
    counts["programs"] += 1
    return Round(number, counts)


def start_worker() -> None:
    """Prepare a process for rounds. Ctrl-C is for the parent, which lets the rounds end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    torch.set_num_threads(1)  # as tests/conftest.py does
    if devices.interpreted():
        patch_once_a_launch()


class Soak:
    """Rounds in several processes, until enough calls were made, the time is up, or a round fails."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic()
        self.next = options.round
        self.planned = 0
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.under_way: dict[Future[Round], int] = {}

    def run(self, progress: Callable[[int], None]) -> None:
        o = self.options
        spawn = multiprocessing.get_context("spawn")  # a fork would share a GPU's context
        with ProcessPoolExecutor(o.processes, spawn, start_worker) as pool:
            try:
                self._submit(pool)
                while self.under_way:
                    ended, _ = wait(self.under_way, return_when=FIRST_COMPLETED)
                    for future in ended:
                        self._take(future.result())
                        del self.under_way[future]
                    progress(self.counts["calls"])
                    self._submit(pool)
            except BrokenProcessPool:
                rounds = ", ".join(str(number) for number in self.under_way.values())
                self.faults.append(
                    f"A PROCESS DIED in one of the rounds {rounds}; again, each of them: python3 -m tests.cache.soak "
                    f"--device {o.device} --kv {o.kv} --seed {o.seed} --round N --operations {CALLS_A_ROUND}"
                )
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise

    def _submit(self, pool: ProcessPoolExecutor) -> None:
        o = self.options
        while len(self.under_way) < o.processes and not self.faults and self.planned < o.operations:
            if time.monotonic() - self.started >= o.seconds:
                break
            calls = min(CALLS_A_ROUND, o.operations - self.planned)
            self.under_way[pool.submit(run_round, o.seed, self.next, calls, o.device, o.kv)] = self.next
            self.planned += calls
            self.next += 1

    def _take(self, result: Round) -> None:
        self.counts += result.counts
        if result.fault:
            self.faults.append(result.fault)

    def __str__(self) -> str:
        counts = self.counts
        parts = ", ".join(f"{counts[name]:,} {name}" for name in SHOWN)
        return (
            f"{counts['calls']:,} calls in {counts['programs']:,} programs ({parts}); "
            f"{time.monotonic() - self.started:.0f} s"
        )


@contextmanager
def progress_of(operations: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, elsewhere a line every few seconds. Yield a function of the calls made."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("calls", total=operations)
            yield lambda done: bar.update(task, completed=done)
        return
    started = printed = time.monotonic()

    def line(done: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed >= SECONDS_A_LINE and 0 < done < operations:
            printed = now
            left = (now - started) / done * (operations - done)
            print(f"{now - started:6.0f} s  {done:,} of {operations:,} calls, {left:.0f} s left", flush=True)

    yield line


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.cache.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=100_000, help="calls in all (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no round after so long")
    parser.add_argument("--processes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--round", type=int, default=0, help="the round to begin with (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of the index: cpu (the default) or cuda")
    parser.add_argument("--kv", help="the device of the KV cache (default: that of the index)")
    options = parser.parse_args(arguments)
    options.kv = options.kv or options.device
    if min(options.operations, options.processes) < 1:
        parser.error("--operations and --processes must be at least 1")
    if "cuda" in (options.device, options.kv) and (reason := devices.why_not_cuda()):
        parser.error(reason)
    if devices.interpreted():
        options.kv = "cpu"  # an interpreter has no memory of its own
    elif options.device == "cuda" != options.kv:
        parser.error("an index on a GPU needs the KV cache there: --kv cuda")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rounds. Return the exit code."""
    options = parse(arguments)
    soak = Soak(options)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process is left behind
    try:
        with progress_of(options.operations) as progress:
            soak.run(progress)
    except KeyboardInterrupt:
        print(f"stopped: {soak}", flush=True)
        return 130
    if soak.faults:
        print("\n".join(soak.faults), f"FAILED: {soak}", sep="\n", flush=True)
        return 1
    what = f"index on {options.device}, KV on {options.kv}, seed {options.seed}, rounds {options.round}-{soak.next - 1}"
    print(f"ok, no difference: {soak}; {what}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
