"""A process that makes units: each in a folder of its own, which stays where the unit fails, or ends the process."""

from __future__ import annotations

import faulthandler
import shutil
import signal
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import flatradix
from tests.fuzz.targets import TARGETS

FAULTS = (Exception, pytest.fail.Exception)  # the latter is a BaseException
SKIPPED = pytest.skip.Exception


class Unit(NamedTuple):
    """One unit of a target."""

    name: str
    seed: int
    number: int

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.seed}-{self.number}"

    @property
    def again(self) -> str:
        return f"python -m tests.fuzz --only {self.name} --seed {self.seed} --first {self.number} --units 1"


class Result(NamedTuple):
    """What a unit counted. fault: the traceback of a failure. skipped: why the target cannot run here."""

    unit: Unit
    counts: Counter[str]
    fault: str = ""
    skipped: str = ""


def prepare() -> None:
    """Prepare a process. Ctrl-C is for the parent. numba does not survive an interruption while it compiles."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    torch.set_num_threads(1)
    flatradix.warm_up("cpu")


def make(unit: Unit, keep: Path) -> Result:
    folder = keep / unit.folder
    is_new = not folder.exists()  # else it holds a fault that is being repeated
    folder.mkdir(parents=True, exist_ok=True)
    result = _run(unit, folder)
    if result.fault:
        (folder / "fault.txt").write_text(f"{result.fault}\nagain: {unit.again}\n")
    elif is_new:
        shutil.rmtree(folder)
    return result


def _run(unit: Unit, folder: Path) -> Result:
    try:
        return Result(unit, TARGETS[unit.name].run(unit.seed, unit.number, folder))
    except SKIPPED as reason:
        return Result(unit, Counter(), skipped=str(reason))
    except FAULTS:
        return Result(unit, Counter(), traceback.format_exc())
