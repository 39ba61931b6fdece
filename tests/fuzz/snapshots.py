"""Mutated snapshot files: each is refused with a reason, or holds a sound tree (tests/tree/mutate_snapshots.py)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.fuzz import limits
from tests.tree.mutate_snapshots import BASES, MEMORY_OF_A_FILE, SECONDS_A_FILE, good, load_one, mutated

FILES = 100


def run(seed: int, number: int, folder: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    for base in range(BASES):
        good(base)  # they take memory once
    mutated(seed, 0)
    with limits.memory(MEMORY_OF_A_FILE):
        for file in range(number * FILES, (number + 1) * FILES):
            with limits.seconds(SECONDS_A_FILE):
                counts[load_one(seed, file, folder / "tree")] += 1
            counts["files"] += 1
    return counts
