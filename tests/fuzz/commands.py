"""Random command lines: each ends with 0, or with 2 and one line that says why. No traceback, no hang."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from flatradix import cli
from tests.cli.test_cli import RUNNER
from tests.fuzz import limits

COMMANDS = 12
SECONDS_A_COMMAND = 120
MEMORY = 3 << 30
NUMBERS = (
    "0",
    "1",
    "-1",
    "2",
    "16",
    "63",
    "64",
    "512",
    "1e3",
    "1.5",
    "2147483648",
    "9" * 30,
    "9" * 5000,
    "nan",
    "inf",
    "-inf",
)
WORDS = (
    "",
    " ",
    "lru",
    "mru",
    "x",
    "auto",
    "cpu",
    "cuda",
    "cuda:99",
    "tpu",
    "--",
    "-",
    "\ud800",
    "é",
    "\0",
    "[red]",
    "%s",
)
# So many requests, so that every call is short.
FEW = ("1", "2", "7", "12")
SHARED = ("page-size", "capacity", "policy", "limit", "block-size", "workload", "seed")
OPTIONS = {
    "replay": (*SHARED, "hold", "device", "batch"),
    "tree": (*SHARED, "hold", "device", "max-nodes"),
    "simulate": (
        *SHARED, "rate", "scheduler", "servers", "chunk", "tpot", "max-running", "patience", "every", "offered",
    ),
}  # fmt: skip
GOOD = {
    "policy": ("lru", "lfu", "slru", "fifo", "priority", "lpm", "fcfs", "aged+keep", "fcfs+keep+defer", "k-lpm"),
    "device": ("cpu", "auto"),
    "workload": ("mix", "chat", "agents", "documents"),
    "scheduler": ("flatradix",),
    "capacity": ("1000", "64", "100000"),
    "servers": ("1", "2", "3"),
}
LINES = [{"timestamp": at, "input_length": 300 + at, "output_length": 3, "hash_ids": [at % 3]} for at in range(5)]


@cache
def warm_up() -> None:
    """Compile and import what commands use, before the memory of a command is limited."""
    for command in ("replay", "simulate", "tree"):
        RUNNER.invoke(cli.app, [command, *few(command)])


def few(command: str) -> list[str]:
    return ["--limit", "3"] if command == "tree" else ["--requests", "3"]


def value(random: Random, option: str, folder: Path) -> str:
    draw = random.random()
    if option == "limit":
        return random.choice(FEW) if draw < 0.8 else random.choice(("0", "-1", "x", "9" * 40))
    if draw < 0.7:
        return random.choice(GOOD.get(option, ("1", "2", "16", "64")))
    if option in ("json", "plot", "figure"):
        names = ("out.json", "out.png", "out.svg", ".", "no/such/a.png", "trace", "\0", "-", "a" * 300)
        name = random.choice(names)
        return name if name == "-" else str(folder / name)
    return random.choice(NUMBERS + WORDS)


def outputs(random: Random, command: str, folder: Path) -> list[str]:
    found = []
    if command != "tree" and random.random() < 0.2:
        option = random.choice(("json", "figure" if command == "simulate" else "plot"))
        found += [f"--{option}", value(random, option, folder)]
    return found


def drawn(random: Random, folder: Path) -> list[str]:
    """Return a command line."""
    command = random.choice([*OPTIONS, "replay", "info", "", "nothing"])
    if command not in OPTIONS:
        return [command, *random.choices(WORDS, k=random.randint(0, 2))]
    found = [command]
    if random.random() < 0.5:
        found.append(random.choice((str(folder / "trace"), str(folder), str(folder / "none"), *WORDS[1:5])))
    elif random.random() < 0.9:
        found += few(command)
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        option = random.choice(OPTIONS[command])
        found += [f"--{option}", value(random, option, folder)]
    found += outputs(random, command, folder)
    if random.random() < 0.05:
        found.insert(random.randrange(len(found)), random.choice(WORDS))
    return found


def on_trace(random: Random, path: Path) -> list[str]:
    """Return a command line that reads a trace."""
    command = random.choice([*OPTIONS])
    found = [command, str(path), "--limit", random.choice(FEW)]
    if random.random() < 0.3:
        option = random.choice(("page-size", "capacity"))
        found += [f"--{option}", value(random, option, path.parent)]
    return found


def run_one(arguments: list[str], folder: Path) -> str:
    """Make a call of the command line in this process; return what came of it. Raises AssertionError at a fault."""
    (folder / "arguments").write_text(json.dumps(arguments))
    result: Any = RUNNER.invoke(cli.app, arguments, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{arguments} raises {result.exception!r}") from result.exception
    assert result.exit_code in (0, 2), f"{arguments} ends with {result.exit_code}: {result.stderr}"
    assert "Traceback" not in result.stderr, f"{arguments}: {result.stderr}"
    if result.exit_code == 2:
        assert result.stderr.strip(), f"{arguments} is refused without a reason"
        return "refused"
    return "done"


def run(seed: int, number: int, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    random = Random(f"{seed}/{number}")
    (folder / "trace").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    warm_up()
    for _ in range(COMMANDS):
        with limits.memory(MEMORY), limits.seconds(SECONDS_A_COMMAND):
            counts[run_one(drawn(random, folder), folder)] += 1
        counts["commands"] += 1
    return counts
