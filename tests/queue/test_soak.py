"""The soak of the queue runs on the CPU, and repeats a difference that it finds."""

from __future__ import annotations

import shlex

import pytest

from tests.gpu.soak_queue import DRAWS, DRAWS_OF_START, RULES, START, Totals, parse, soak
from tests.support.waiting import WaitingOracle


def run(*arguments: str) -> tuple[int, Totals]:
    totals = Totals()
    return soak(parse(["--device", "cpu", *arguments]), totals), totals


def test_every_argument_can_be_drawn() -> None:
    assert {name for names in RULES.values() for name in names} <= DRAWS.keys()
    assert set(START) <= DRAWS_OF_START.keys()


def test_a_short_soak(capsys: pytest.CaptureFixture[str]) -> None:
    code, totals = run("--operations", "300")
    assert code == 0
    assert totals.operations >= 300
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"ok: {totals}, configuration page 1 tokens")


def test_time_is_up() -> None:
    code, totals = run("--seconds", "0")
    assert (code, totals.operations) == (0, 0)


def test_a_difference_is_repeated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed command finds the same difference after the same rules."""
    shared = WaitingOracle.shared
    monkeypatch.setattr(WaitingOracle, "shared", lambda self, one: shared(self, one) + (one.id == 40))
    assert run("--operations", "5000")[0] == 1
    found = capsys.readouterr().out.splitlines()[-2]
    assert found.startswith("DIFFERENCE in round ")
    arguments = shlex.split(found.partition("again: python3 -m tests.gpu.soak_queue ")[2])
    assert soak(parse(arguments), Totals()) == 1
    assert capsys.readouterr().out.splitlines()[-2].partition("; again")[0] == found.partition("; again")[0]
