"""A CUDA driver of Python functions: it records each launch, and can run the kernel in Triton's interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from flatradix.device.calls import Calls
from flatradix.kernels.gpu import launch
from flatradix.kernels.gpu.launch import Arrays, DirectLaunch, Kernel, Variant

_COMMON = [ctypes.c_size_t, *[ctypes.c_uint] * 7, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)]
_PLAIN = ctypes.CFUNCTYPE(ctypes.c_int, *_COMMON, ctypes.c_size_t)
_COOPERATIVE = ctypes.CFUNCTYPE(ctypes.c_int, *_COMMON)
STREAM = 7


class Launched(NamedTuple):
    """A launch as the driver saw it. grid: programs and threads along each axis, then bytes of shared memory.

    extra: the last argument of a plain launch, None for a cooperative one.
    """

    function: int
    grid: tuple[int, ...]
    stream: int
    cells: tuple[int, ...]
    extra: int | None


class FakeDriver:
    """Stands in for the CUDA driver while `patch` lasts.

    code: what launches return, 0 for success. good: how many launches succeed before any returns `code`.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launches: list[Launched] = []
        self.code = self.good = 0
        self._counts: dict[int, int] = {}
        self._runs: dict[int, Callable[[Launched], None]] = {}
        library = SimpleNamespace(cuLaunchKernel=_PLAIN(self._plain), cuLaunchCooperativeKernel=_COOPERATIVE(self._all))
        patch.setattr(launch, "_driver", lambda: library)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)

    def ready(
        self, arrays: Arrays, kernel: Kernel, variant: Variant, run: Callable[[Launched], None] = lambda launched: None
    ) -> DirectLaunch:
        """Return a direct launch of a kernel, as if it were compiled."""
        fixed = [address for part in arrays.addresses for address in part]
        function = 1000 + len(self._counts)
        self._counts[function] = len(fixed) + len(kernel.kinds) + 2
        self._runs[function] = run
        compiled = SimpleNamespace(function=function, metadata=SimpleNamespace(shared=77))
        return DirectLaunch(compiled, fixed, len(kernel.kinds), 32 * variant.warps, kernel.cooperative)

    def _plain(self, *arguments: Any) -> int:
        return self._launched(arguments[:-1], int(arguments[-1]))

    def _all(self, *arguments: Any) -> int:
        return self._launched(arguments, None)

    def _launched(self, arguments: Any, extra: int | None) -> int:
        function, *grid, stream, parameters = arguments
        cells = (ctypes.c_int64.from_address(parameters[i]).value for i in range(self._counts[function]))
        found = Launched(function, tuple(grid), stream, tuple(cells), extra)
        self.launches.append(found)
        if self.code and self.good <= 0:
            return self.code
        self.good -= 1
        self._runs[function](found)
        return 0


def record_launches(patch: pytest.MonkeyPatch) -> FakeDriver:
    """Have kernels start as on a GPU, but run none: all launches are direct, the first of each variant from Python."""
    driver = FakeDriver(patch)

    def start(kernel: Kernel, arrays: Arrays, programs: int, arguments: Any, variant: Variant) -> None:
        arrays.direct[variant] = driver.ready(arrays, kernel, variant)
        arrays.direct[variant](programs, STREAM, arguments)

    patch.setattr(Kernel, "_start", start)
    return driver


def interpret_launches(patch: pytest.MonkeyPatch) -> FakeDriver:
    """Have interpreted kernels start as on a GPU: the second launch of each variant and all later ones are direct."""
    driver = FakeDriver(patch)
    start, first = Kernel._start, Kernel._first

    def start_and_prepare(kernel: Kernel, arrays: Arrays, programs: int, arguments: Any, variant: Variant) -> None:
        start(kernel, arrays, programs, arguments, variant)
        before = sum(len(part) for part in arrays.addresses)

        def run(launched: Launched) -> None:
            first(kernel, arrays, launched.grid[0], launched.cells[before:-2], variant)

        arrays.direct[variant] = driver.ready(arrays, kernel, variant, run)

    patch.setattr(Kernel, "_start", start_and_prepare)
    patch.setattr(Calls, "begin", lambda calls: (calls.next(), STREAM, False))
    return driver
