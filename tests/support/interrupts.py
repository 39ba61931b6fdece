"""Interrupts calls: at any bytecode of flatradix's own Python code, at any allocation, or by a timer."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import flatradix
from tests.support.devices import interpreted

OURS = Path(flatradix.__file__).resolve().parent
KERNELS = (OURS / "kernels").resolve()
# Kernels are launched here. Triton's interpreter runs behind it, or a GPU.
LAUNCH = KERNELS / "gpu" / "launch.py"


@cache
def is_ours(name: str) -> bool:
    """Return whether a file belongs to flatradix and holds no numba kernels."""
    path = Path(name).resolve()
    return path.is_relative_to(OURS) or path.is_relative_to(KERNELS / "gpu")


@cache
def is_launch(name: str) -> bool:
    return Path(name).resolve() == LAUNCH


class Interrupt(BaseException):
    """The exception that interrupts a call. A BaseException, as a signal handler may raise any exception."""


class Tracer:
    """Counts the bytecodes that run in flatradix's files, and raises Interrupt before bytecode number `at`.

    Interpreted kernels and the code of numba and Triton do not count. folder: the one folder of flatradix/ that counts.
    """

    def __init__(self, at: int, folder: str) -> None:
        self.at = at
        self.folder = OURS / folder
        self.count = 0
        self.where = ""
        self._launching = 0

    def __call__(self, frame: FrameType, event: str, _argument: Any) -> Any:
        code = frame.f_code
        if self._launching or not is_ours(code.co_filename):
            return None
        if code.co_name == "_first" and is_launch(code.co_filename):
            self._launching += 1
            return self._leaving
        if self.folder != OURS and self.folder not in Path(code.co_filename).parents:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self._local

    def _leaving(self, _frame: FrameType, event: str, _argument: Any) -> Any:
        self._launching -= event == "return"
        return self._leaving

    def _local(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "opcode":
            if self.count == self.at:
                self.at = -1
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
                raise Interrupt(self.where)
            self.count += 1
        return self._local


class Outcome(NamedTuple):
    """How a call ended: with a result, or interrupted at a source line, `where`. ran: how many bytecodes it ran."""

    result: Any
    where: str
    ran: int


def interrupt_at(at: int, call: Callable[[], Any], folder: str = "") -> Outcome:
    """Run a call and interrupt it before its bytecode number `at`. `where` is empty if it has fewer bytecodes."""
    tracer = Tracer(at, folder)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        return Outcome(call(), "", tracer.count)
    except Interrupt as cut:
        return Outcome(None, str(cut), tracer.count)
    finally:
        sys.settrace(before)


def bytecodes(call: Callable[[], Any], folder: str = "") -> int:
    """Run a call; return its number of bytecodes."""
    tracer = Tracer(-1, folder)
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
    return tracer.count


def skip_if_slow(device: str) -> None:
    """Skip the test with interpreted kernels, where the cuts at bytecodes take long enough."""
    if interpreted(device):
        pytest.skip("kernels in Python: calls are cut short at bytecodes alone")


ALLOCATORS = {
    torch: ("empty", "zeros", "tensor", "arange", "empty_like", "full_like", "cat", "from_numpy", "cumsum"),
    torch.Tensor: ("clone", "contiguous", "to", "cpu", "tolist", "flip"),
    np: ("empty", "zeros", "array", "arange", "flatnonzero", "concatenate", "diff"),
}


class Allocations:
    """Counts the allocations of flatradix, and makes allocation number `at` fail."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0
        self.failed = False

    def wrap(self, allocator: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(*arguments: Any, **options: Any) -> Any:
            if is_ours(sys._getframe(1).f_code.co_filename):
                self.count += 1
                if self.count == self.at + 1:
                    self.failed = True
                    raise torch.OutOfMemoryError("no memory left")
            return allocator(*arguments, **options)

        return allocate


@cache
def _compile_kernels() -> None:
    """Compile all kernels: a compiler whose allocations fail remembers a wrong error."""
    flatradix.warm_up("cpu")


def fails_at(at: int, call: Callable[[], Any]) -> bool:
    """Run a call whose allocation number `at` fails; return False if it has fewer allocations."""
    _compile_kernels()
    allocations = Allocations(at)
    with pytest.MonkeyPatch.context() as patch:
        for home, names in ALLOCATORS.items():
            for name in names:
                patch.setattr(home, name, allocations.wrap(getattr(home, name)))
        try:
            call()
        except torch.OutOfMemoryError:
            assert allocations.failed
    return allocations.failed


def _may_be_interrupted(frame: FrameType | None) -> bool:
    """Return whether a frame is in a call of flatradix, but in no interpreted kernel: a GPU completes its kernels."""
    in_ours = False
    while frame is not None:
        name = frame.f_code.co_filename
        if interpreted() and is_launch(name) and frame.f_code.co_name == "_first":
            return False
        in_ours |= is_ours(name)
        frame = frame.f_back
    return in_ours


def interrupt_now() -> None:
    raise Interrupt("the timer")


@contextmanager
def timer(seconds: float, handler: Callable[[], None] = interrupt_now) -> Iterator[None]:
    """Call `handler` after `seconds` of this block, as soon as the main thread is in a call of flatradix."""

    over = False

    def ring(_number: int, frame: FrameType | None) -> None:
        if _may_be_interrupted(frame):
            handler()
        elif not over:
            signal.setitimer(signal.ITIMER_REAL, 20e-6)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
