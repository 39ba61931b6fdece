"""Replay a trace with the settings of each reference row and compare the figures exactly. Exits with 1 if one differs.

    python3 -m bench.reference [FOLDER] [--device cuda]

FOLDER holds conversation_trace.jsonl and conversation_reference.json (default: ../shared/traces beside the checkout).
Takes about a minute, most of it to make 145M tokens from the trace's hash ids nine times.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flatradix.replay import traces
from flatradix.replay.replay import replay

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("input_tokens", "hit_tokens", "hits_sha256", "evicted_tokens", "rejected", "final_tokens")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    options = parser.parse_args(arguments)
    compare(options.folder, options.device)


def compare(folder: Path, device: str) -> None:
    trace, reference = folder / "conversation_trace.jsonl", folder / "conversation_reference.json"
    if not (trace.is_file() and reference.is_file()):
        sys.exit(f"{folder}: there is no {trace.name} and {reference.name}; name their folder")
    requests = traces.read_trace(trace)
    wrong = 0
    print(f"{'page':>5} {'capacity':>9} {'hold':>4} {'hit tokens':>11} {'in the tree':>12}  as the reference")
    for row in json.loads(reference.read_text()):
        report = replay(traces.prompts(requests), row["page"], row["capacity"], row["hold"], device=device)
        found = report.to_json()
        differing = [name for name in FIGURES if found[name] != row[name]]
        wrong += bool(differing)
        seconds = sum(operation["total_seconds"] for operation in report.operations().values())
        verdict = f"NO: {', '.join(differing)}" if differing else "yes"
        settings = f"{row['page']:>5} {row['capacity']:>9} {row['hold']:>4}"
        print(f"{settings} {report.hit_tokens:>11} {seconds:>10.2f} s  {verdict}", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
