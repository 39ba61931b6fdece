"""Errors travel: a worker of a pool sends an error to its parent, and a debugger copies it."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import pkgutil
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import flatradix
from flatradix.replay import traces

VALUES = {
    "message": "a reason",
    "query": 3,
    "needed": 7,
    "free": 2,
    "file": "t.jsonl",
    "line": 4,
    "reason": "bad",
    "head": b"PK",
    "call": 5,
    "operation": "insert",
}


def modules() -> list[Any]:
    """Return all modules of the package that can be imported here; kernels raise nothing of their own."""
    names = [module.name for module in pkgutil.walk_packages(flatradix.__path__, "flatradix.")]
    found = []
    for name in names:
        if ".kernels" in name or name.endswith("__main__"):
            continue
        try:
            found.append(importlib.import_module(name))
        except ImportError:  # of an optional package
            continue
    return found


def errors() -> list[type[BaseException]]:
    found = {
        kind
        for module in modules()
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, BaseException) and kind.__module__.startswith("flatradix")
    }
    return sorted(found, key=lambda kind: kind.__name__)


def made(kind: type[BaseException]) -> BaseException:
    """Make an error from the arguments that its class declares."""
    own = "__init__" in vars(kind) or any("__init__" in vars(base) for base in kind.__mro__ if base in errors())
    if not own:
        return kind("a reason")
    return kind(*(VALUES[name] for name in inspect.signature(kind).parameters))


def test_all_are_found() -> None:
    names = {kind.__name__ for kind in errors()}
    assert {"CapacityError", "PeerMissingError", "PlotUnavailableError", "StaleHandleError", "TraceError"} <= names


@pytest.mark.parametrize("kind", errors(), ids=lambda kind: kind.__name__)
def test_an_error_can_be_pickled_and_copied(kind: type[BaseException]) -> None:
    error = made(kind)
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is kind
        assert str(other) == str(error)
        assert vars(other) == vars(error)


def test_a_pool_that_reads_a_damaged_trace_raises(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("[]\n")
    with get_context("spawn").Pool(1) as pool:
        waiting = pool.apply_async(traces.read_trace, (path,))
        with pytest.raises(traces.TraceError, match=r"t\.jsonl:1: ") as raised:
            waiting.get(timeout=120)
    assert (raised.value.file, raised.value.line) == (str(path), 1)
