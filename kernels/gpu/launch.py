"""How the GPU kernels are started: compiled once for each set of constants, then launched with raw addresses.

A JIT launch with 16 arguments costs 19 us of Python, the same through the compiled kernel's own launcher 4.4 us (H200
host, Triton 3.6). The launcher is not a public interface of Triton: where it is not as expected, every launch goes the
public way. Integer arguments are never specialised on, because a launcher that was compiled for a 1 goes on using 1.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from flatradix import meta
from flatradix.layout import TreeState, Workspace

# Under TRITON_INTERPRET=1 kernels run in Python, one program after the other, on tensors in host memory.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_DTYPES = {"*i32": torch.int32, "*i64": torch.int64}
_CTYPES = {"*i32": ctypes.c_int32, "*i64": ctypes.c_int64}


class Bound(NamedTuple):
    """A tree's tensors as kernels take them: addresses for launches, tensors for the compiler and the interpreter."""

    device: int  # CUDA index, -1 interpreted
    state: TreeState
    workspace: Workspace
    state_addresses: TreeState
    workspace_addresses: Workspace


def bind(state: TreeState, workspace: Workspace) -> Bound:
    """The tensors must outlive what is returned; a tensor that is replaced needs a new one."""
    device = state.meta.device
    return Bound(
        device.index if device.type == "cuda" else -1,
        state,
        workspace,
        TreeState._make(tensor.data_ptr() for tensor in state),
        Workspace._make(tensor.data_ptr() for tensor in workspace),
    )


class Pointer:
    """An address with a type, in the place of a tensor."""

    def __init__(self, address: int, kind: str) -> None:
        self._address = address
        self.dtype = _DTYPES[kind]

    def data_ptr(self) -> int:
        return self._address


def _typed(address: int, kind: str) -> Any:
    if not INTERPRETED:
        return Pointer(address, kind)
    if address == 0:
        return torch.empty(1, dtype=_DTYPES[kind])
    view = (_CTYPES[kind] * 1).from_address(address)
    return torch.frombuffer(view, dtype=_DTYPES[kind])


def current_stream(device: int) -> int:
    """The handle of torch's current stream; 0.1 us."""
    return int(torch._C._cuda_getCurrentRawStream(device))


class Kernel:
    """A Triton function `(state, workspace, *arguments, *constants)` and its compiled forms.

    kinds: what each argument is: "*i32" or "*i64" (an address), "*w" (int64 where the call's `wide` says so, in order,
        else int32), "i32" or "i64" (a number; the function must not specialise on it).
    warps: the default. cooperative: all programs of a launch run at once, so that they may wait for one another.
    """

    made: list[Kernel] = []

    def __init__(self, function: Any, kinds: Sequence[str], warps: int = 4, cooperative: bool = False) -> None:
        self.function = function
        self.kinds = tuple(kinds)
        self.warps = warps
        self.cooperative = cooperative
        self._compiled: dict[Any, Any] = {}
        Kernel.made.append(self)

    def __call__(
        self,
        bound: Bound,
        programs: int,
        arguments: Sequence[int],
        constants: tuple[int | bool, ...] = (),
        wide: tuple[bool, ...] = (),
        warps: int = 0,
    ) -> None:
        """Enqueue on torch's current stream of the tree's device. `arguments` are addresses and numbers."""
        found = self._compiled.get((bound.device, constants, wide, warps))
        if found is None:
            self._first(bound, programs, arguments, constants, wide, warps)
            return
        if torch._C._cuda_getDevice() != bound.device:
            with torch.cuda.device(bound.device):
                self(bound, programs, arguments, constants, wide, warps)
            return
        run, function, metadata = found
        run(
            programs, 1, 1, current_stream(bound.device), function, metadata, None, None, None,
            bound.state_addresses, bound.workspace_addresses, *arguments, *constants,
        )  # fmt: skip

    def types(self, wide: tuple[bool, ...]) -> list[str]:
        """The type of each argument, "*w" resolved."""
        widths = iter(wide)
        return [("*i64" if next(widths) else "*i32") if kind == "*w" else kind for kind in self.kinds]

    def _first(
        self,
        bound: Bound,
        programs: int,
        arguments: Sequence[int],
        constants: tuple[int | bool, ...],
        wide: tuple[bool, ...],
        warps: int,
    ) -> None:
        """Launch the public way, and keep the launcher that this made."""
        pairs = zip(arguments, self.types(wide), strict=True)
        typed = [_typed(value, kind) if kind[0] == "*" else value for value, kind in pairs]
        options: dict[str, Any] = {"num_warps": warps or self.warps}
        if self.cooperative:
            options["launch_cooperative_grid"] = True
        if INTERPRETED:
            self.function[(programs,)](bound.state, bound.workspace, *typed, *constants, **options)
            return
        with torch.cuda.device(bound.device):
            compiled = self.function[(programs,)](bound.state, bound.workspace, *typed, *constants, **options)
        launcher = _launcher(compiled)
        if launcher is not None:
            self._compiled[(bound.device, constants, wide, warps)] = launcher


def _launcher(compiled: Any) -> tuple[Callable[..., Any], Any, Any] | None:
    """What starts a compiled kernel directly, or None where this Triton has it otherwise."""
    try:
        found = compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:
        return None
    return found if callable(found[0]) and found[1] is not None else None


@functools.cache
def multi_processors(device: int) -> int:
    """Of a CUDA device; 1 where kernels are interpreted."""
    return 1 if device < 0 else int(torch.cuda.get_device_properties(device).multi_processor_count)


def resident(bound: Bound, wanted: int) -> int:
    """How many programs of a cooperative launch to start: at most 4 a multiprocessor, which always fit; one, where
    they are interpreted one after the other."""
    if INTERPRETED:
        return 1
    return max(1, min(wanted, 4 * multi_processors(bound.device), meta.MOST_PROGRAMS))


@triton.jit
def _probe_kernel(out):
    tl.store(out, 1)


def probe() -> None:
    """Compile and run one kernel; raises whatever stands in the way."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    _probe_kernel[(1,)](out)
    if int(out) != 1:
        raise RuntimeError("a kernel ran and had no effect")
