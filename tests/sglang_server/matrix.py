"""Compare SGLang servers with flatradix and with SGLang's own cache, in many configurations.

    python3 -m tests.sglang_server.matrix OUT [NAMES ...] [--times N] [--list]

A configuration starts two servers side by side, on this machine's CPU, with a tiny model, and asks both the same. The
prefix caches are small, SGLang checks its pool after every step, and its overlap loop is on. What is asked:

one_by_one   Turns of many talks, one after another: answers and cached tokens must be equal, request by request.
chats        The same over OpenAI's interface.
odd          What clients should not send. The same must be refused.
sessions     SGLang's sessions.
all_at_once  Talks at the same time; some clients give up. Every request must be answered; hits depend on time.
pauses       Pauses that retract or abort, flushes, and aborts of everything: every request must end.

OUT/NAME/ keeps the servers' logs, OUT/NAME.json the figures and the faults, OUT/table.md the table of all
configurations in OUT. Exits with 1 if there was a fault. Needs requirements/peers.txt and requirements/server.txt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.sglang_server.compare import compare
from tests.sglang_server.configurations import CONFIGURATIONS, Configuration
from tests.sglang_server.drive import ask_both
from tests.sglang_server.server import Launcher, ServerFault, why_not
from tests.sglang_server.tiny_model import write_model

HEAD = (
    "| configuration | requests | equal answers | equal hits | all at once: hits, SGLang / here | retractions | errors "
    "| healthy |\n|---|---|---|---|---|---|---|---|\n"
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.list:
        print("\n".join(f"{row.name:16} {row.summary}" for row in CONFIGURATIONS))
        return
    reason = why_not()
    if reason or options.out is None:
        sys.exit(reason or "name a folder for the results")
    known = {row.name: row for row in CONFIGURATIONS}
    unknown = [name for name in options.names if name not in known]
    if unknown:
        sys.exit(f"no configuration {', '.join(unknown)}; --list shows them")
    rows = [_longer(known[name], options.times) for name in options.names or known]
    options.out.mkdir(parents=True, exist_ok=True)
    faults = sum(_run_all(rows, options.out))
    (options.out / "table.md").write_text(table(options.out))
    sys.exit(1 if faults else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.sglang_server.matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="a folder for logs, figures and the table")
    parser.add_argument("names", nargs="*", metavar="NAMES", help="configurations (default: all)")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="N times as many requests")
    parser.add_argument("--list", action="store_true", help="show the configurations with their options, and end")
    return parser


def _longer(row: Configuration, times: int) -> Configuration:
    return row._replace(load=row.load._replace(turns=row.load.turns * times))


def _run_all(rows: Sequence[Configuration], out: Path) -> Iterator[int]:
    """Run the configurations one after another; yield the number of faults of each."""
    model = write_model(out / "model")
    launcher: Launcher | None = None
    environment: dict[str, str] = {}
    try:
        for number, row in enumerate(rows, 1):
            # SGLang reads some of its variables when it is imported.
            wanted = {key: value for key, value in row.settings.environment.items() if key.startswith("SGLANG_")}
            if launcher is None or launcher.has_ended or wanted != environment:
                if launcher is not None:
                    launcher.close()
                launcher, environment = Launcher(out, wanted), wanted
            print(f"{number:2} of {len(rows)}  {row.name:16} ", end="", flush=True)
            found = _run(launcher, model, row, out)
            print(_progress(found), flush=True)
            (out / "table.md").write_text(table(out))
            yield len(found["faults"])
    finally:
        if launcher is not None:
            launcher.close()


def _run(launcher: Launcher, model: Path, row: Configuration, out: Path) -> dict[str, Any]:
    began = time.monotonic()
    try:
        theirs, ours = ask_both(launcher, model, out / row.name, row.settings, row.scenarios, row.load)
        found = compare(theirs, ours, row.same_hits, row.same_events).to_json()
    except ServerFault as error:
        found = {"faults": [str(error)], "healthy": False}
    found["options"] = row.summary
    found["seconds"] = round(time.monotonic() - began)
    (out / f"{row.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def _progress(found: dict[str, Any]) -> str:
    if not found["faults"]:
        return f"{found['requests']} requests, no fault, {found['seconds']} s"
    return f"{len(found['faults'])} FAULTS, {found['seconds']} s\n" + "\n".join(
        f"    {at}" for at in found["faults"][:5]
    )


def table(out: Path) -> str:
    """Return a Markdown table of the configurations whose figures are in a folder."""
    lines = []
    for row in CONFIGURATIONS:
        path = out / f"{row.name}.json"
        if path.is_file():
            cells = _cells(json.loads(path.read_text()))
            lines.append(f"| {row.name} | " + " | ".join(cells) + " |\n")
    return HEAD + "".join(lines)


def _cells(found: dict[str, Any]) -> list[str]:
    if "requests" not in found:
        return ["did not start", *[""] * 5, "no"]
    in_order = found["in_order"]
    equal = [f"{found[name]} of {in_order}" if in_order else "" for name in ("equal_answers", "equal_cached")]
    theirs, ours, prompt = found["cached"].get("all_at_once", [0, 0, 0])
    crowd = f"{theirs / prompt:.0%} / {ours / prompt:.0%}" if prompt else ""
    pair = [" / ".join(str(count) for count in found[name]) for name in ("retractions", "errors")]
    return [str(found["requests"]), *equal, crowd, *pair, "yes" if found["healthy"] else "no"]


if __name__ == "__main__":
    main()
