"""Targets: what a unit does, in some seconds. Its seed and number decide all but where a timer strikes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

Run = Callable[[int, int, Path], Counter[str]]


class Target(NamedTuple):
    """what: one line. run: makes unit `number` of a seed, and may leave files in the folder that it gets."""

    what: str
    run: Run


def late(module: str, function: str = "run", *first: str) -> Run:
    """Return a function of a module, imported when it is called. first: names in the module, its first arguments."""

    def call(seed: int, number: int, folder: Path) -> Counter[str]:
        home: Any = import_module(f"tests.fuzz.{module}")
        arguments = [getattr(home, name) for name in first]
        counts: Counter[str] = getattr(home, function)(*arguments, seed, number, folder)
        return counts

    return call


def tree_cuts(seed: int, number: int, folder: Path, with_queue: bool) -> Counter[str]:
    from tests.fuzz import tree_cuts

    return tree_cuts.run(seed, number, folder, with_queue)


TARGETS = {
    "tree": Target("programs of a RadixTree beside the oracle", late("machines", "run", "tree")),
    "queue": Target("programs of a WaitingQueue beside plain Python", late("machines", "run", "queue")),
    "cache": Target("programs of a PrefixCache, by the KV that slots hold", late("machines", "run", "cache")),
    "model": Target("programs of a PrefixCache beside its model", late("machines", "run_model")),
    "tree-cuts": Target("interrupted calls of a RadixTree", partial(tree_cuts, with_queue=False)),
    "queue-cuts": Target("interrupted calls of a WaitingQueue and its tree", partial(tree_cuts, with_queue=True)),
    "cache-cuts": Target("interrupted calls of a PrefixCache and its queue", late("cache_cuts")),
    "sglang-cuts": Target("interrupted calls of the SGLang backend", late("sglang_cuts")),
    "snapshots": Target("mutated snapshot files", late("snapshots")),
    "traces": Target("mutated traces", late("traces")),
    "commands": Target("random command lines", late("commands")),
}
