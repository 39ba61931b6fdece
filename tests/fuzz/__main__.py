"""Fuzz flatradix: random programs, interrupted calls, and mutated files and command lines, with fresh seeds.

The targets take turns, a unit of some seconds each. A unit that fails, or ends its process by a crash or by taking too
long, leaves its folder under --keep, with the traceback and the last files. It is told with the command that repeats
it. The other units go on. Exits with 1 if a unit failed.

  python -m tests.fuzz --minutes 60
  python -m tests.fuzz --only tree-cuts --only cache-cuts --minutes 20 --processes 2
  python -m tests.fuzz --only snapshots --seed 7 --first 12 --units 1         repeats a unit
  python -m tests.fuzz --list
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import secrets
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import Result, Unit, make, prepare

SECONDS_A_LINE = 30
MOST_FAULTS = 20


class Fuzz:
    """Units in several processes, until the time is up. counts: what units counted, by target."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = self.printed = time.monotonic()
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.seconds: Counter[str] = Counter()
        self.faults: list[Unit] = []
        self.skipped: dict[str, str] = {}
        self.units = self._all_units()

    def _all_units(self) -> Iterator[Unit]:
        o = self.options
        numbers = itertools.count(o.first) if o.units is None else range(o.first, o.first + o.units)
        return (Unit(name, o.seed, number) for number in numbers for name in o.only)

    def _next(self) -> Unit | None:
        """Return the next unit to make; None if there is none, or no time."""
        if time.monotonic() - self.started >= 60 * self.options.minutes or len(self.faults) >= MOST_FAULTS:
            return None
        for unit in self.units:
            if unit.name not in self.skipped:
                return unit
            if len(self.skipped) == len(self.options.only):
                break
        return None

    def run(self) -> None:
        """Make units. A process that died takes the pool with it: then make a new pool."""
        while True:
            with ProcessPoolExecutor(self.options.processes, multiprocessing.get_context("spawn"), prepare) as pool:
                if not self._use(pool):
                    return

    def _use(self, pool: ProcessPoolExecutor) -> bool:
        """Make units in a pool; return whether to go on in another one, as a process has died."""
        under_way: dict[Future[Result], Unit] = {}
        unit: Unit | None = None
        try:
            while True:
                while len(under_way) < self.options.processes and (unit := self._next()) is not None:
                    under_way[pool.submit(make, unit, self.options.keep)] = unit
                unit = None
                if not under_way:
                    return False
                ended, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in ended:
                    self._take(future.result())
                    del under_way[future]
                self._progress()
        except BrokenProcessPool:
            lost = set(under_way.values()) | ({unit} if unit is not None else set())  # one may not be submitted yet
            for unit in lost:
                print(f"A PROCESS DIED in this unit, or in one beside it; again: {unit.again}", flush=True)
                self.faults.append(unit)
            return True
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise

    def _take(self, result: Result) -> None:
        unit = result.unit
        self.counts[unit.name] += result.counts
        self.counts[unit.name]["units"] += 1
        if result.skipped:
            self.skipped[unit.name] = result.skipped
        if result.fault:
            self.faults.append(unit)
            print(f"{result.fault}\nFAULT in unit {unit.number} of {unit.name}; again: {unit.again}", flush=True)

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self.printed >= SECONDS_A_LINE:
            self.printed = now
            print(f"{now - self.started:6.0f} s  {self.total()}", flush=True)

    def total(self) -> str:
        counts = sum(self.counts.values(), Counter())
        names = ("units", "programs", "cuts", "files", "commands")
        return ", ".join(f"{counts[name]:,} {name}" for name in names if counts[name]) + f", {len(self.faults)} faults"

    def report(self) -> str:
        lines = [
            f"{name}: " + ", ".join(f"{counts[what]:,} {what}" for what in sorted(counts) if counts[what])
            for name, counts in self.counts.items()
        ]
        lines += [f"{name}: skipped, {reason}" for name, reason in self.skipped.items()]
        lines += [f"FAILED; again: {unit.again}  (files: {self.options.keep / unit.folder})" for unit in self.faults]
        what = f"seed {self.options.seed}, {time.monotonic() - self.started:.0f} s: {self.total()}"
        return "\n".join([*lines, what])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60, help="begin no unit after so long (default: %(default)s)")
    parser.add_argument("--only", action="append", choices=list(TARGETS), metavar="NAME", help="a target; see --list")
    parser.add_argument("--seed", type=int, default=None, help="(default: a random one, which is printed)")
    parser.add_argument("--first", type=int, default=0, help="the unit to begin with (default: %(default)s)")
    parser.add_argument("--units", type=int, help="of each target (default: as many as there is time for)")
    parser.add_argument("--processes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="folder of faults (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the targets")
    options = parser.parse_args(arguments)
    if options.processes < 1 or (options.units is not None and options.units < 1):
        parser.error("--processes and --units must be at least 1")
    options.only = list(dict.fromkeys(options.only or TARGETS))
    options.seed = secrets.randbits(32) if options.seed is None else options.seed
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run units. Return the exit code."""
    options = parse(arguments)
    if options.list:
        print("\n".join(f"{name:12} {target.what}" for name, target in TARGETS.items()))
        return 0
    print(f"seed {options.seed}: {', '.join(options.only)}", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process is left behind
    fuzz = Fuzz(options)
    try:
        fuzz.run()
    except KeyboardInterrupt:
        print(f"stopped\n{fuzz.report()}", flush=True)
        return 130
    print(fuzz.report(), flush=True)
    return 1 if fuzz.faults else 0


if __name__ == "__main__":
    sys.exit(main())
