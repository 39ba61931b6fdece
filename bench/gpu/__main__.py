"""Measure the tree on a GPU: GPU time of each operation, wall-clock time from Python, and where the CPU is faster.

The GPU time excludes launches, which are enqueued behind a sleep. The calls cycle over several input sets, so that
large inputs come from memory and not from L2. Floors follow from the copy speed of this GPU. Targets are for an H200.

  python3 -m bench.gpu                          all rows: less than four minutes, compilation included
  python3 -m bench.gpu --quick                  fewer repetitions, none of the largest inputs: about 90 s
  python3 -m bench.gpu --only match wall        the rows whose names begin with one of these
  python3 -m bench.gpu --list                   the names of the rows
  TRITON_INTERPRET=1 python3 -m bench.gpu --tiny     tries the code without a GPU
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import traceback
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
import triton

import flatradix
from bench.gpu import crossover, evict, graph, kernels, wall
from bench.support.gpu_harness import H200_SPEED, Measured, Row, Setup, copying_speed, number, start_afresh
from flatradix.inputs import devices
from flatradix.replay import plot

ROWS = [*kernels.ROWS, *wall.ROWS, *evict.ROWS, *graph.ROWS]
CROSSOVER = "crossover"
TITLES = {"gpu": "the GPU's time, queries on the device", "wall": "wall clock from Python"}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the rows whose names begin with one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, none of the largest inputs")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the code where there is no GPU")
    parser.add_argument("--page", type=int, default=1, metavar="N", help="tokens a page (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results to this file")
    parser.add_argument("--figure", type=Path, metavar="OUT.png", help="draw the crossover at 4096 tokens")
    options = parser.parse_args(arguments)
    if options.page < 1 or 128 % options.page:
        parser.error("--page takes 1, 2, 4, ... 128")
    for name in options.only or ():
        if not any(known.startswith(name) for known in (*(row.name for row in ROWS), CROSSOVER)):
            parser.error(f"no row is called {name!r}; --list shows the names")
    if options.figure and not _is_chosen(CROSSOVER, options.only):
        parser.error(f"--figure draws the row {CROSSOVER!r}, which --only leaves out")
    return options


def _is_chosen(name: str, only: list[str] | None) -> bool:
    return only is None or name.startswith(tuple(only))


def _machine() -> dict[str, Any]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none: interpreted",
        "cuda": torch.version.cuda,
        "cpu": models[0] if models else platform.processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numba": numba.__version__,
        "numpy": np.__version__,
        "flatradix": flatradix.__version__,
    }


def _result(row: Row, measured: Measured) -> dict[str, Any]:
    taken = measured.taken * 1e6
    floor = None if measured.floor is None else measured.floor * 1e6
    target = row.target
    if row.relative and floor is not None and target is not None:
        target *= floor
    return {
        "name": row.name,
        "work": row.work,
        "clock": row.clock,
        "floor_us": floor,
        "measured_us": taken,
        "target_us": target,
        "met": None if target is None else taken <= target,
        "note": measured.note,
    }


def _cells(result: dict[str, Any]) -> list[str]:
    met = {True: "yes", False: "**no**", None: "-"}[result["met"]]
    values = (result[name] for name in ("floor_us", "measured_us", "target_us"))
    numbers = ("-" if value is None else number(value) for value in values)
    return [result["work"], *numbers, met, result["note"]]


def _table(results: list[dict[str, Any]], clock: str) -> str:
    """Return the results of one clock as a Markdown table, or an empty string if there are none."""
    lines = ["| " + " | ".join(_cells(result)) + " |" for result in results if result["clock"] == clock]
    head = f"| {TITLES[clock]}, us | floor | measured | target | met | note |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(lines) + "\n" if lines else ""


def _measured(row: Row, setup: Setup) -> dict[str, Any] | None:
    """Measure a row and return its result. If it fails, print the traceback and return None: other rows still run."""
    start_afresh(setup)
    begun = time.perf_counter()
    try:
        result = _result(row, row.measure(setup))
    except Exception:
        print(f"{row.name}: FAILED\n{traceback.format_exc()}", flush=True)
        return None
    _, *numbers, met, note = _cells(result)
    floor, taken, target = numbers
    print(
        f"{row.name:<22} {taken:>8} us, floor {floor}, target {target}, met {met}{', ' + note if note else ''} "
        f"({time.perf_counter() - begun:.1f} s)",
        flush=True,
    )
    return result


def _crossover(setup: Setup) -> list[crossover.Point] | None:
    try:
        return crossover.measure(setup)
    except Exception:
        print(f"{CROSSOVER}: FAILED\n{traceback.format_exc()}", flush=True)
        return None


def _setup(options: argparse.Namespace) -> Setup:
    reason = devices.why_not_cuda()
    if reason:
        raise SystemExit(f"no GPU: {reason}; TRITON_INTERPRET=1 with --tiny tries the code without one")
    if devices.interpreted() and not options.tiny:
        raise SystemExit("interpreted kernels are slow: add --tiny")
    # The CPU's tree runs in one thread; further torch threads would compete with it.
    torch.set_num_threads(1)
    device = torch.device("cpu" if devices.interpreted() else "cuda:0")
    speed = H200_SPEED if devices.interpreted() else copying_speed(device)
    return Setup(options.quick, options.tiny, options.page, device, speed)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.list:
        print("\n".join([f"{row.name:<22} {row.work}" for row in ROWS] + [f"{CROSSOVER:<22} against one CPU thread"]))
        return
    if options.figure:
        plot.require(options.figure)
    setup = _setup(options)
    machine = _machine()
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    if setup.on_gpu:
        told += f"; copies at {setup.speed / 1e12:.2f} TB/s"
    print(f"{told}; page size {setup.page}", flush=True)
    begun = time.perf_counter()
    report: dict[str, Any] = {
        "machine": machine,
        "copy_bytes_a_second": setup.speed if setup.on_gpu else None,
        "page_size": setup.page,
        "quick": setup.quick,
        "tiny": setup.tiny,
    }
    chosen = [row for row in ROWS if _is_chosen(row.name, options.only) and not (row.slow and setup.quick)]
    found = [_measured(row, setup) for row in chosen]
    results = report["rows"] = [result for result in found if result is not None]
    points = _crossover(setup) if _is_chosen(CROSSOVER, options.only) else []
    failed = len(results) < len(chosen) or points is None
    if points:
        report["crossover"] = [{**point._asdict(), "fastest": point.fastest} for point in points]
        report["sentence"] = crossover.sentence(points)
    report["seconds"] = time.perf_counter() - begun
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{told}; page size {setup.page}; {report['seconds']:.0f} s\n")
    print("\n".join(text for text in (_table(results, clock) for clock in TITLES) if text))
    if points:
        print(f"{crossover.table(points)}\n\n{report['sentence']}")
        if options.figure:
            crossover.draw(points, setup, f"{machine['gpu']}, {machine['cpu']}", options.figure)
    met = [result["met"] for result in results if result["met"] is not None]
    print(f"{sum(met)} of {len(met)} targets met")
    if failed:
        raise SystemExit("some rows failed")


if __name__ == "__main__":
    main()
