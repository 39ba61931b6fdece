"""The state machines of the tests, with fresh seeds: random programs beside an oracle or a model."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.cache import soak
from tests.cache.test_machine import Machine as CacheMachine
from tests.queue.test_machine import QueueMachine
from tests.tree.test_machine import Machine as TreeMachine

PROGRAMS, STEPS = 6, 40
CALLS = 400


def tree(random: Random) -> Any:
    return TreeMachine("cpu", random.choice((1, 2, 16)), random.random() < 0.5)


def queue(random: Random) -> Any:
    return QueueMachine("cpu", random.choice((1, 2, 16, 64)), random.random() < 0.5)


def cache(_random: Random) -> Any:
    return CacheMachine({"device": "cpu", "kv_device": "cpu"})


def run(make: Callable[[Random], Any], first: int, number: int, _folder: Path) -> Counter[str]:
    """Run a few programs of one kind. Hypothesis draws them from the seed, and shows a shrunk program if one fails."""
    logging.disable(logging.WARNING)  # which `auto` device was taken
    kind = Random(f"{first}/{number}/{make.__name__}")
    drawn = kind.getrandbits(64)

    def machine() -> Any:
        return make(Random(drawn))

    few = settings(
        max_examples=PROGRAMS,
        stateful_step_count=STEPS,
        derandomize=False,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    run_state_machine_as_test(seed(drawn)(machine), settings=few)
    return Counter(programs=PROGRAMS)


def run_model(first: int, number: int, _folder: Path) -> Counter[str]:
    """Run a program of a PrefixCache beside its model."""
    found = soak.run_round(first, number, CALLS)
    assert not found.fault, found.fault
    return Counter(programs=1, calls=found.counts["calls"])
