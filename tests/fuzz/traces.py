"""Mutated traces: each is read, or refused with one line that names the file; the command line replays some."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from flatradix.replay import traces
from tests.fuzz import commands, limits
from tests.tree.mutate_snapshots import changed_bytes

FILES = 40
SECONDS_A_FILE = 60
MEMORY = 2 << 30
PACKERS = (bytes, bytes, bytes, gzip.compress, bz2.compress, lzma.compress)
VALUES: tuple[Any, ...] = (
    0, 1, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, 1e308, -0.0, float("nan"), float("inf"), None, True, "", "7",
    [], [1], [[]], {}, [None], [2**64, 10**400], "\ud800", "\0", [0] * 2000,
)  # fmt: skip
FIELDS = ("timestamp", "input_length", "output_length", "hash_ids", "more", "")


def good(random: Random) -> list[dict[str, Any]]:
    """Return the requests of a trace that is right."""
    size, timed, now = random.choice((512, 512, 16, 64)), random.random() < 0.8, 0.0
    found = []
    for _ in range(random.choice((0, 1, 2, 11, 30))):
        tokens = random.randint(0, 6 * size)
        now += random.choice((0, 1, 0.5, 1000))
        ids = [random.randint(0, 5) for _ in range(-(-tokens // size))]
        line = {"timestamp": now, "input_length": tokens, "output_length": random.randint(0, 99), "hash_ids": ids}
        if not timed:
            del line["timestamp"]
        found.append(line)
    return found


def changed_lines(random: Random, lines: list[dict[str, Any]]) -> None:
    for _ in range(random.choice((1, 1, 2))):
        if lines:
            line = random.choice(lines)
            if random.random() < 0.2:
                line.pop(random.choice(FIELDS), None)
            else:
                line[random.choice(FIELDS)] = random.choice(VALUES)


def joined(random: Random, lines: list[dict[str, Any]]) -> bytes:
    end = random.choice(("\n", "\n", "\r\n", "\n\n", " \n"))
    text = end.join(json.dumps(line, ensure_ascii=random.random() < 0.5) for line in lines) + random.choice(("", end))
    if random.random() < 0.05:
        text = random.choice(("\ufeff", "[" * 100_000, "9" * 10_000, "{", '"', "[1,")) + text
    return text.encode("utf-8", "surrogatepass")


def mutated(random: Random) -> bytes:
    lines = good(random)
    if random.random() < 0.5:
        changed_lines(random, lines)
    data = joined(random, lines)
    if random.random() < 0.3 and data:
        data = changed_bytes(random, data)
    packed: bytes = random.choice(PACKERS)(data)
    return changed_bytes(random, packed) if random.random() < 0.2 and packed else packed


def read_one(path: Path, random: Random) -> str:
    """Read a trace; return what came of it. Raises AssertionError at a fault."""
    size = random.choice((*[None] * 9, 1, 16, 512, 10**9))
    try:
        found = traces.read_trace(path, random.choice((None, None, 1, 3)), size)
    except traces.TraceError as error:
        if not str(error).startswith(f"{path}") or len(str(error).splitlines()) != 1:
            raise AssertionError("the message does not name the file, or has several lines") from error
        return "refused"
    for request in found:
        assert request.input_length >= 0, "a negative length"
        if request.input_length <= 1 << 16:
            prompt = traces.expand(request)
            assert len(prompt) == request.input_length, "a prompt of another length"
            assert prompt.min(initial=0) >= 0, "a negative token"
    return "read"


def run(seed: int, number: int, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    random, path = Random(f"{seed}/{number}"), folder / "trace"
    commands.warm_up()
    for _ in range(FILES):
        path.write_bytes(mutated(random))
        with limits.memory(MEMORY), limits.seconds(SECONDS_A_FILE):
            what = read_one(path, random)
            if random.random() < 0.15:
                commands.run_one(commands.on_trace(random, path), folder)
                counts["commands"] += 1
        counts[what] += 1
        counts["files"] += 1
    return counts
