"""Run all checks and benchmarks that need a GPU, from a checkout: python3 -m tests.gpu.run_all OUT

Checks run first, then benchmarks. Each step writes a log to the folder OUT. The program installs nothing, and reports
the steps that cannot run here.

  soak        one process for each configuration, in parallel; 100,000 operations in all, if --seconds allows;
              compiles all kernels on the way
  soak-queue  twelve processes with random programs of a waiting queue; 100,000 operations in all, if --queue-seconds
              allows
  soak-cache  six processes with random programs of a PrefixCache, half of its calls with the index on the GPU
  pytest      python3 -m pytest -m gpu, in parallel if pytest-xdist is installed
  reference   all reference rows of a trace (--traces FOLDER)
  memcheck, racecheck   compute-sanitizer over a short soak, if it is installed
  bench       python3 -m bench.gpu, to OUT/bench.json, .log and .png
  index       python3 -m bench.index
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.gpu.soak import CONFIGURATIONS

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("soak", "soak-queue", "soak-cache", "pytest", "reference", "memcheck", "racecheck", "bench", "index")
OPERATIONS = 100_000
QUEUE_SOAKS = 12
# The first rounds of two processes lie so far apart. One more than a multiple of the number of configurations: no two
# of eight processes compile the same kernels at the beginning.
ROUNDS_APART = 1001
Command = tuple[str, list[str]]  # the name of its log, and the command line


def soaks(options: argparse.Namespace) -> Iterator[Command]:
    each = -(-OPERATIONS // len(CONFIGURATIONS))
    for number in range(len(CONFIGURATIONS)):
        arguments = ["--seed", str(options.seed), "--round", str(number), "--operations", str(each)]
        yield f"soak{number}", ["-m", "tests.gpu.soak", *arguments, "--seconds", str(options.seconds)]


def queue_soaks(options: argparse.Namespace) -> Iterator[Command]:
    each = -(-OPERATIONS // QUEUE_SOAKS)
    for number in range(QUEUE_SOAKS):
        arguments = ["--seed", str(options.seed), "--round", str(number * ROUNDS_APART), "--operations", str(each)]
        yield f"soak-queue{number}", ["-m", "tests.gpu.soak_queue", *arguments, "--seconds", str(options.queue_seconds)]


def cache_soaks(options: argparse.Namespace) -> Iterator[Command]:
    for device in ("cuda", "cpu"):
        arguments = ["--device", device, "--kv", "cuda", "--seed", str(options.seed), "--processes", "3"]
        limits = ["--operations", str(OPERATIONS // 2), "--seconds", str(options.queue_seconds)]
        yield f"soak-cache-{device}", ["-m", "tests.cache.soak", *arguments, *limits]


def tests(options: argparse.Namespace) -> Iterator[Command]:
    side_by_side = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    yield "pytest", ["-m", "pytest", "-m", "gpu", "-v", "--durations=15", *side_by_side]


def references(options: argparse.Namespace) -> Iterator[Command]:
    if options.traces:
        yield "reference", ["-m", "bench.reference", str(options.traces), "--device", "cuda"]


def sanitized(tool: str, options: argparse.Namespace) -> Iterator[Command]:
    if shutil.which("compute-sanitizer"):
        soak = ["-m", "tests.gpu.soak", "--seed", str(options.seed), "--round", "10", "--operations", "300"]
        # flatradix counts a kernel's parameters by asking the driver for one too many. That error is expected.
        options_of = {"memcheck": ["--report-api-errors", "no"]}
        tool_options = ["--tool", tool, "--error-exitcode", "9", *options_of.get(tool, [])]
        yield tool, ["compute-sanitizer", *tool_options, sys.executable, *soak]


def benchmarks(options: argparse.Namespace) -> Iterator[Command]:
    arguments = ["--json", str(options.out / "bench.json")]
    if importlib.util.find_spec("matplotlib"):
        arguments += ["--figure", str(options.out / "bench.png")]
    yield "bench", ["-m", "bench.gpu", *arguments]


def comparisons(options: argparse.Namespace) -> Iterator[Command]:
    yield "index", ["-m", "bench.index"]


def commands(step: str, options: argparse.Namespace) -> list[Command]:
    if step in ("memcheck", "racecheck"):
        return list(sanitized(step, options))
    makers = {
        "soak": soaks,
        "soak-queue": queue_soaks,
        "soak-cache": cache_soaks,
        "pytest": tests,
        "reference": references,
        "bench": benchmarks,
        "index": comparisons,
    }
    return list(makers[step](options))


def last_lines(log: Path, count: int) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-count:])


def run(step: str, options: argparse.Namespace) -> str:
    """Run the commands of a step in parallel; return "passed", "FAILED" or "not here"."""
    found = commands(step, options)
    if not found:
        return "not here"
    begun = time.monotonic()
    running = []
    for name, command in found:
        log = options.out / f"{name}.log"
        program = command if command[0] == "compute-sanitizer" else [sys.executable, *command]
        with log.open("w") as out:
            running.append((log, subprocess.Popen(program, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)))
    good = True
    for log, process in running:
        try:
            code: int | str = process.wait(max(1, options.limit - (time.monotonic() - begun)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = f"stopped after {options.limit} s"
        good &= code == 0
        print(f"{log.stem}: {code}\n{last_lines(log, 1 if len(found) > 1 else 12)}", flush=True)
    print(f"{step}: {time.monotonic() - begun:.0f} s\n", flush=True)
    return "passed" if good else "FAILED"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.gpu.run_all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the logs")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, help="these steps, in this order")
    parser.add_argument("--traces", type=Path, help="folder of the trace and its reference figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=150, help="the longest that the soak goes on")
    parser.add_argument(
        "--queue-seconds", type=int, default=240, help="the longest that the soaks of queue and cache go on"
    )
    parser.add_argument("--limit", type=int, default=400, help="seconds after which a step is stopped")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONUNBUFFERED"] = "1"
    results = {step: run(step, options) for step in options.only}
    print(", ".join(f"{step} {result}" for step, result in results.items()))
    return 1 if "FAILED" in results.values() else 0


if __name__ == "__main__":
    raise SystemExit(main())
