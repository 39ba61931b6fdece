"""How deep a test goes: `make test` samples the long ones, `make test-all` (THOROUGH=1) goes about ten times deeper."""

from __future__ import annotations

import os
from random import Random
from typing import TypeVar

import pytest

from tests.support.devices import interpreted

T = TypeVar("T")

THOROUGH = os.environ.get("THOROUGH") == "1"


def examples(few: T, many: T) -> T:
    """Return `few`, or `many` in `make test-all`."""
    return many if THOROUGH else few


def cuts(total: int, device: str, name: str, most: int = 60) -> range:
    """Return at which of the `total` bytecodes of a call a test interrupts it: at most about `most`, evenly spaced.

    With interpreted kernels, where a call takes a second, it is one. name: decides the first.
    """
    wanted = examples(1, 4) if interpreted(device) else examples(most, 10 * most)
    step = max(1, -(-total // wanted))
    return range(Random(name).randrange(min(step, max(1, total))), total, step)


def skip_unless_thorough(device: str) -> None:
    """Skip the test with interpreted kernels, where it takes half a minute, but not in `make test-all`."""
    if interpreted(device) and not THOROUGH:
        pytest.skip("kernels in Python: make test-all runs it")
