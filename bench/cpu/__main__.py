"""Compare flatradix on one CPU core with SGLang's default tree (`UnifiedRadixCache` with its Rust core).

One process calls both trees alternately on one core, through their Python interfaces, and compares the medians.
SGLang's parameter objects are built before the timed call, except in the replay rows. Without SGLang, only flatradix
is measured; bench/support/sglang_trees.py says how to install SGLang. Rows on a trace need one in Mooncake's format.

  python3 -m bench.cpu                          all rows: about three minutes, 5 GB of memory
  python3 -m bench.cpu --quick                  fewer repetitions, without the slowest rows: about a minute
  python3 -m bench.cpu --only match lock-1      the rows whose names begin with one of these
  python3 -m bench.cpu --list                   the names of the rows
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.cpu import apart, change, match, replay
from bench.support import sglang_trees
from bench.support.harness import Row, Setup, start_afresh
from bench.support.report import machine_of, number, pin, result_of

ROOT = Path(__file__).resolve().parents[2]
ROWS = [*match.ROWS, *change.ROWS, *replay.ROWS, *apart.ROWS]
TRACE = ROOT.parent / "shared" / "traces" / "conversation_trace.jsonl"
LINE = "{:<54} {:>12} {:>12} {:>8} {:>9}  {}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the rows whose names begin with one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument(
        "--quick", action="store_true", help="fewer repetitions, 500 trace requests, no row of 1M nodes"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results to this file")
    parser.add_argument("--trace", type=Path, default=TRACE, help="the trace (default: %(default)s)")
    parser.add_argument("--core", type=int, help="the core to run on (default: the last that is allowed)")
    return parser.parse_args(arguments)


def _chosen(names: list[str] | None) -> list[Row]:
    if names is None:
        return ROWS
    for name in names:
        if not any(row.name.startswith(name) for row in ROWS):
            raise SystemExit(f"no row is called {name!r}; --list shows the names")
    return [row for row in ROWS if row.name.startswith(tuple(names))]


def _peer() -> bool:
    """Return whether SGLang's default tree runs here; print the reason if it does not."""
    try:
        sglang_trees.RustTree(1)
    except sglang_trees.PeerMissing as reason:
        print(f"SGLang is left out: {reason}")
        return False
    return True


def _skip(row: Row, setup: Setup) -> str | None:
    if row.needs_trace and setup.trace is None:
        return "no trace; give one with --trace"
    if row.slow and setup.quick:
        return "left out by --quick"
    return None


def _show(result: dict[str, Any]) -> None:
    theirs, ratio, unit = result["theirs"], result["ratio"], result["unit"]
    target = number(result["target"]) + (f" {unit}" if result["target_is"] == "ours" else "")
    met = {True: "yes", False: "NO", None: "-"}[result["met"]]
    print(
        LINE.format(
            result["work"],
            f"{number(result['ours'])} {unit}",
            "-" if theirs is None else f"{number(theirs)} {unit}",
            "-" if ratio is None else f"{ratio:.3f}",
            target,
            f"{met}{'  (' + result['note'] + ')' if result['note'] else ''}",
        ),
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    rows = _chosen(options.only)
    if options.list:
        print("\n".join(f"{row.name:<20} {row.work}" for row in rows))
        return
    machine = machine_of(pin(options.core))
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    setup = Setup(options.quick, options.trace if options.trace.is_file() else None, _peer())
    print(LINE.format("work", "flatradix", "sglang", "ratio", "target", "met"))
    results = []
    for row in rows:
        if reason := _skip(row, setup):
            print(f"{row.work:<54} skipped: {reason}")
            continue
        start_afresh()
        results.append(result_of(row, row.measure(setup)))
        _show(results[-1])
    met = [result["met"] for result in results if result["met"] is not None]
    print(f"{sum(met)} of {len(met)} targets met")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
