"""Compare the SGLang backend with SGLang's default cache (`UnifiedRadixCache` with its Rust core) on one CPU core.

One process makes the calls of SGLang's scheduler on both caches alternately, and compares the medians. Pages have 64
tokens, chunks 4096. Prints a Markdown table. Without SGLang, prints the reason and stops; see
bench/support/sglang_modules.py.

  python3 -m bench.scheduler                       all rows: two minutes
  python3 -m bench.scheduler --quick               fewer repetitions: half a minute
  python3 -m bench.scheduler --only match life-1k  the rows whose names begin with one of these
"""

from __future__ import annotations

import argparse

from bench.support import sglang_modules
from bench.support.harness import Setup, start_afresh
from bench.support.report import machine_of, number, pin, result_of
from bench.support.sglang_trees import PeerMissing


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.scheduler", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the rows whose names begin with one of these")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--core", type=int, help="the core to run on (default: the last that is allowed)")
    options = parser.parse_args(arguments)
    machine = machine_of(pin(options.core))
    try:
        sglang_modules.load()
    except PeerMissing as reason:
        raise SystemExit(str(reason)) from None
    from bench.scheduler.rows import ROWS

    print(", ".join(f"{key} {value}" for key, value in machine.items()), end="\n\n")
    print("| work | flatradix | SGLang | ratio | target | met |\n|---|---|---|---|---|---|")
    for name in options.only or ():
        if not any(row.name.startswith(name) for row in ROWS):
            raise SystemExit(f"no row is called {name!r}: {', '.join(row.name for row in ROWS)}")
    chosen = [row for row in ROWS if options.only is None or row.name.startswith(tuple(options.only))]
    met = []
    for row in chosen:
        start_afresh()
        result = result_of(row, row.measure(Setup(options.quick, None, True)))
        met.append(result["met"])
        times = " | ".join(f"{number(result[side])} {row.unit}" for side in ("ours", "theirs"))
        verdict = "yes" if result["met"] else "NO"
        target = f"{row.target} {row.unit}" if row.absolute else row.target
        print(f"| {row.work} | {times} | {result['ratio']:.3f} | {target} | {verdict} |", flush=True)
    print(f"\n{sum(met)} of {len(met)} targets met")


if __name__ == "__main__":
    main()
