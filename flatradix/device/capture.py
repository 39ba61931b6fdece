"""Running a function of tree calls as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

import torch

T = TypeVar("T")
_EAGER = 2  # runs that compile the kernels and load them: neither is possible during a capture


class Home(Protocol):
    """The index whose calls the function makes."""

    device: torch.device

    def rehearse(self, function: Callable[[], T]) -> T: ...

    @property
    def noted_locks(self) -> int: ...

    def replay(self, graph: torch.cuda.CUDAGraph, locks: int) -> None: ...

    def in_graphs(self) -> tuple[bool, bool]: ...

    def only_in_graphs(self, before: tuple[bool, bool]) -> None: ...


class Step(Generic[T]):
    """Runs a function once in each call. The first calls run its Python; from the third on, a CUDA graph runs.

    The index must outlive the graph, and does: the step holds it.

    A call that raises an error of the capture has run nothing. Later calls then try again.
    """

    def __init__(self, home: Home, function: Callable[[], T]) -> None:
        self._home = home
        self._function = function
        self._runs = 0
        self._captured: tuple[torch.cuda.CUDAGraph, T, int] | None = None

    def __call__(self) -> T:
        if torch.cuda.is_current_stream_capturing():
            return self._function()  # a graph of the caller is to hold the step
        if self._captured is None:
            if self._runs < _EAGER:
                result = self._home.rehearse(self._function)
                self._runs += 1
                return result
            before, locks = self._home.in_graphs(), self._home.noted_locks
            try:
                self._captured = *_capture(self._function, self._home.device), self._home.noted_locks - locks
            except BaseException:
                self._home.only_in_graphs(before)
                raise
        graph, result, locks = self._captured
        self._home.replay(graph, locks)
        return result


def _capture(function: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return a graph of what `function` enqueues, and its result. An error of the function is raised as it is.

    `torch.cuda.graph` would replace this error by one about the capture that it leaves, and leave its stream current.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")  # other threads may use the GPU meanwhile
        try:
            result = function()
        except BaseException:
            with suppress(RuntimeError):  # if the error is one of CUDA, the capture cannot be ended without another
                graph.capture_end()
            raise
        graph.capture_end()
    return graph, result
