"""A soak: engines at full occupancy for a long time. Memory must stay flat and every check clean.

Two engines without a model take turns. One is a PrefixCache with a waiting queue that keeps; the other is a RadixTree
with slots of its own. Their conversations have several times as many tokens as there are slots, so each step evicts.
All calls are drawn from --seed. When both pools are full and a twentieth of the time is over, the soak begins: from
then on, memory is sampled at regular intervals, and the time of each call is counted. After each thirtieth of the time,
`check` runs, the slots of the tree are counted, and the queue's cached lengths are compared with a match.

  python -m bench.soak                          30 minutes on the CPU
  python -m bench.soak --minutes 8 --device cuda
  python -m bench.soak --minutes 0.2 --small    to try it
  TRITON_INTERPRET=1 python -m bench.soak --minutes 0.2 --small --device cuda

Exits with 1 if a check fails, or if the memory in RAM or on the GPU is more than 32 MiB larger in the last tenth of the
samples than in the first (medians). Times are told, never judged.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.soak import cache_engine, report, tree_engine
from bench.soak.cache_engine import CacheEngine, Sizes
from bench.soak.report import Sample
from bench.soak.times import PARTS, Times, on_gpu, resident
from bench.support.report import machine_of
from flatradix import __version__
from flatradix.inputs import devices

LARGE = Sizes(1 << 17, 16, 64, 2048, 768, 64)
SMALL = Sizes(1 << 10, 4, 8, 128, 64, 8)
CHECKS, SAMPLES = 30, 200
SECONDS_A_LINE = 10
FULL = 0.9  # what runs in pieces of pages and holds locks leaves a pool never quite full


class Soak:
    """Both engines, their times, and what was sampled. failed: the traceback of a check that failed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.seconds = 60 * options.minutes
        self.times = Times(cache_engine.NAMES + tree_engine.NAMES)
        sizes = SMALL if options.small else LARGE
        draw = np.random.default_rng(options.seed)
        self.cache = CacheEngine(draw, options.device, sizes, self.times)
        self.tree = tree_engine.TreeEngine(draw, options.device, sizes, self.times)
        self.samples: list[Sample] = []
        self.checks = self.steps = 0
        self.failed = ""
        self.printed = time.monotonic()

    def run(self) -> None:
        self.fill()
        begun, sampled = time.monotonic(), 0
        self.sample(0.0)
        while (passed := time.monotonic() - begun) < self.seconds and not self.failed:
            share = passed / self.seconds
            self.times.part = min(int(share * PARTS), PARTS - 1)
            self.step()
            if share * SAMPLES >= sampled + 1:
                sampled = int(share * SAMPLES)
                self.sample(passed)
            if share * CHECKS >= self.checks + 1:
                self.check()
            self.progress(f"{passed:,.0f} of {self.seconds:,.0f} s")
        self.sample(passed)
        if not self.failed:
            self.check()

    def fill(self) -> None:
        """Run until both pools are full, and everything was called that allocates memory once."""
        begun = time.monotonic()
        while True:
            self.step()
            self.progress("filling")
            if self.steps % 64 == 0 and min(self.cache.occupancy, self.tree.occupancy) >= FULL:
                self.check()
                if time.monotonic() - begun > self.seconds / 20:
                    break
        self.times.counts[:] = 0
        self.checks = self.steps = 0

    def step(self) -> None:
        self.steps += 1
        self.cache.step()
        self.tree.step()

    def sample(self, passed: float) -> None:
        evicted, occupancy = (
            (self.cache.evicted, self.tree.evicted),
            (self.cache.occupancy, self.tree.occupancy),
        )
        memory = resident(), on_gpu(self.options.device)
        self.samples.append(Sample(passed, *memory, self.steps, evicted, occupancy))

    def check(self) -> None:
        self.checks += 1
        try:
            self.cache.check()
            self.tree.check()
        except AssertionError:
            self.failed = traceback.format_exc()

    def progress(self, where: str) -> None:
        now = time.monotonic()
        if now - self.printed >= SECONDS_A_LINE:
            self.printed = now
            calls = int(self.times.counts.sum())
            print(f"{where}: {self.steps:,} steps, {calls:,} calls, {resident() / 2**20:,.0f} MiB in RAM", flush=True)

    def results(self) -> dict[str, Any]:
        first, last = self.samples[0], self.samples[-1]
        return {
            "machine": machine_of(None) | {"flatradix": __version__},
            "device": self.options.device,
            "seed": self.options.seed,
            "seconds": last.seconds,
            "steps": self.steps,
            "calls": int(self.times.counts.sum()),
            "evicted tokens": [new - old for old, new in zip(first.evicted, last.evicted, strict=True)],
            "lowest occupancy": [min(one.occupancy[at] for one in self.samples) for at in (0, 1)],
            "checks": self.checks,
            "failed": self.failed,
            "memory": [one._asdict() | {"flat": one.is_flat} for one in report.growth_of(self.samples)],
            "operations": report.rows_of(self.times),
            "samples": [one._asdict() for one in self.samples],
        }


def tell(soak: Soak) -> bool:
    """Print the results. Return whether they are good."""
    found = soak.results()
    print(report.table(soak.times))
    print(
        f"{found['calls']:,} calls in {found['steps']:,} steps, {found['seconds']:,.0f} s, seed {found['seed']}, "
        f"device {found['device']}; evicted tokens: {found['evicted tokens'][0]:,} of the cache, "
        f"{found['evicted tokens'][1]:,} of the tree; lowest occupancy "
        + " and ".join(f"{one:.1%}" for one in found["lowest occupancy"])
    )
    print(report.memory(soak.samples))
    flat = all(one["flat"] for one in found["memory"])
    if not flat:
        print(f"FAILED: memory grew by more than {report.MARGIN >> 20} MiB")
    print(f"FAILED check number {soak.checks}:\n{soak.failed}" if soak.failed else f"{soak.checks} checks, all clean")
    if soak.options.json:
        soak.options.json.write_text(json.dumps(found, indent=1))
    if soak.options.plot:
        report.plot(soak.samples, soak.times, soak.options.plot)
    return flat and not soak.failed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of the indexes: cpu (the default) or cuda, with the KV there")
    parser.add_argument("--small", action="store_true", help="small pools, for a trial or interpreted kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to a file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and p99; needs matplotlib")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < float("inf"):
        parser.error("--minutes must be more than 0")
    if options.device.startswith("cuda") and (reason := devices.why_not_cuda()):
        parser.error(reason)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(1)
    soak = Soak(options)
    soak.run()
    return 0 if tell(soak) else 1


if __name__ == "__main__":
    sys.exit(main())
