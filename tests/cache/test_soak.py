"""The soak of PrefixCache: short rounds with each page size, and faults that it finds and repeats."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from flatradix.cache.host_pages import HostPages
from flatradix.cache.state import State
from flatradix.inputs.devices import interpreted
from flatradix.layout import running
from tests.cache import soak
from tests.cache.soak import PAGES, Round, Soak, main, parse, run_round


@pytest.mark.parametrize("number", range(2 * len(PAGES)), ids=lambda number: f"{number}-page{PAGES[number % 4]}")
def test_a_round(number: int, device: str) -> None:
    slow = device == "cuda" and interpreted()
    if slow and number >= len(PAGES):
        pytest.skip("too slow with interpreted kernels")
    found = run_round(0, number, 6 if slow else 400, device, "cpu" if slow else device)
    assert not found.fault, found.fault
    assert found.counts["programs"] == 1


def lose_a_page(release: Callable[..., None]) -> Callable[..., None]:
    def broken(self: HostPages, tree: Any, rows: np.ndarray, begins: np.ndarray | None) -> None:
        release(self, tree, rows, begins)
        self.columns.counts[running.FREE_PAGES] -= 1

    return broken


def evict_too_much(make_space: Callable[..., None]) -> Callable[..., None]:
    return lambda self, slots: make_space(self, slots + self.page_size)


def exchange_pages(admit: Callable[..., None]) -> Callable[..., None]:
    def broken(self: HostPages, prompts: Any, place: Any, grant: Any) -> None:
        admit(self, prompts, place, grant)
        self.page_table[grant.rows, :2] = self.page_table[grant.rows, :2].flip(1)

    return broken


def inherit_nothing(_: Callable[..., None]) -> Callable[..., None]:
    return lambda self, ending: self.set_loans(ending.loans)


@pytest.mark.parametrize(
    ("home", "name", "fault", "message"),
    [
        (HostPages, "release", lose_a_page, "slots in all"),
        (State, "make_space", evict_too_much, "pages were evicted"),
        (HostPages, "admit", exchange_pages, "pages of row"),
        (State, "inherit", inherit_nothing, "cached_lengths of the running requests"),
    ],
)
def test_faults_are_found_and_repeated(
    monkeypatch: pytest.MonkeyPatch, home: type, name: str, fault: Callable[..., Any], message: str
) -> None:
    """The printed command makes the same calls up to the same fault."""
    monkeypatch.setattr(home, name, fault(getattr(home, name)))
    found = next(found for found in (run_round(0, number, 600) for number in range(16)) if found.fault)
    assert message in found.fault
    options = parse(shlex.split(found.fault.partition("again: python3 -m tests.cache.soak ")[2]))
    assert options.operations == found.counts["calls"]
    again = run_round(options.seed, options.round, options.operations, options.device, options.kv)
    assert again.fault.splitlines()[-1] == found.fault.splitlines()[-1]


def test_rounds_in_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--operations", "150", "--processes", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok, no difference: 150 calls in 1 programs (")
    assert out.endswith("index on cpu, KV on cpu, seed 0, rounds 0-0\n")


def test_no_time() -> None:
    this = Soak(parse(["--seconds", "0"]))
    this.run(print)
    assert (this.counts["calls"], this.faults) == (0, [])


def fail(seed: int, number: int, calls: int, device: str, kv: str) -> Round:
    return Round(number, soak.Counter(calls=3), f"DIFFERENCE in round {number}")


def die(*_: Any) -> Round:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.parametrize(
    ("instead", "line"),
    [(fail, "DIFFERENCE in round 7"), (die, "A PROCESS DIED in one of the rounds 7; again, each of them: ")],
)
def test_a_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], instead: Callable[..., Round], line: str
) -> None:
    monkeypatch.setattr(soak, "run_round", instead)
    assert main(["--round", "7", "--operations", "9000"]) == 1
    found = capsys.readouterr().out.splitlines()
    assert found[0].startswith(line)
    assert found[1].startswith("FAILED: ")


@pytest.mark.parametrize("arguments", [["--operations", "0"], ["--device", "cuda", "--kv", "cpu"]])
def test_bad_arguments_are_refused(arguments: list[str]) -> None:
    if interpreted():
        pytest.skip("an interpreter has one device")
    with pytest.raises(SystemExit) as error:
        parse(arguments)
    assert error.value.code == 2
