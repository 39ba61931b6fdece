"""Launch the GPU kernels. Each is compiled once for each set of constants, then launched with raw addresses.

A JIT launch with 16 arguments costs 19 us of Python. The launcher of the compiled kernel costs 4.4 us, most of it to
convert Python integers to C (H200 host, Triton 3.6). Our kernels have about 50 parameters, most of which never change.
So all parameters are kept as C values, from which the CUDA driver reads them; a call writes only its own arguments, and
machine code calls the driver (`kernels/native`). If the driver or Triton is not as expected, launches go through
Triton's launcher or its public interface. Kernels never specialise on integer arguments, because a launcher that was
compiled for a 1 goes on using 1.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
import triton
import triton.language as tl

from flatradix.kernels import native
from flatradix.layout import scratch
from flatradix.layout.scratch import Scratch
from flatradix.layout.state import TreeState

# Under TRITON_INTERPRET=1 kernels run in Python, one program after the other, on tensors in host memory.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_DTYPES = {"*i32": torch.int32, "*i64": torch.int64}
_CTYPES = {"*i32": ctypes.c_int32, "*i64": ctypes.c_int64}
_C: Any = torch._C
Constants = tuple[int | bool, ...]


def device_function(function: Callable[..., Any]) -> Any:
    """Return a plain function of `flatradix.layout` as a function that kernels can call."""
    return function if INTERPRETED else triton.jit(function)


class DirectLaunch:
    """A compiled kernel and its parameters for one tree as C values; a call launches it through the CUDA driver.

    record: address of its `native.Record`, for functions of machine code that fill in the parameters themselves.
    """

    def __init__(self, compiled: Any, fixed: Sequence[int], changing: int, threads: int, cooperative: bool) -> None:
        """fixed: the first parameters, which never change. changing: how many parameters follow."""
        driver = _driver()
        # Triton adds two pointers to scratch memory as the last parameters. Our kernels use none: they stay null.
        count = len(fixed) + changing + 2
        begin = 8 * len(native.Record._fields)
        places = begin + 8 * count
        # One block of memory holds the record, the parameters, and the addresses of the parameters.
        self._memory = np.zeros(places // 8 + count, np.int64)
        self.record = address = self._memory.ctypes.data
        cells = begin + 8 * len(fixed)
        self._memory[: begin // 8] = native.Record(
            _address_of(driver.cuLaunchKernel), _address_of(driver.cuLaunchCooperativeKernel), cooperative,
            compiled.function, threads, compiled.metadata.shared, address + places, address + cells,
        )  # fmt: skip
        self._memory[begin // 8 : begin // 8 + len(fixed)] = fixed
        self._memory[places // 8 :] = address + begin + 8 * np.arange(count)
        self._fill = struct.Struct(f"={changing}q").pack_into
        self._cells = memoryview(self._memory.data)[cells // 8 : cells // 8 + changing]

    def __call__(self, programs: int, stream: int, arguments: Sequence[int]) -> None:
        self._fill(self._cells, 0, *arguments)
        code = native.launch.call(self.record, programs, stream)
        if code:
            raise_driver(code)


def raise_driver(code: int) -> NoReturn:
    """Raise the error of a launch that the driver has refused with `code`."""
    raise RuntimeError(f"the CUDA driver refused to launch a kernel: error {code}")


def _address_of(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


@functools.cache
def _driver() -> Any:
    """Return the CUDA driver's library. OSError or AttributeError if it is missing or lacks a function."""
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuFuncGetParamInfo.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    return driver


def _has_parameters(function: int, count: int) -> bool:
    """Return whether a kernel has exactly `count` parameters, each of at most 8 bytes."""
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()

    def at(index: int) -> bool:
        return bool(_driver().cuFuncGetParamInfo(function, index, ctypes.byref(offset), ctypes.byref(size)) == 0)

    return all(at(index) and size.value <= 8 for index in range(count)) and not at(count)


def _direct_launch(compiled: Any, arrays: Arrays, changing: int, warps: int, cooperative: bool) -> DirectLaunch | None:
    """Return the direct launch of a kernel, or None if the kernel or the driver is not as expected."""
    fixed = [address for part in arrays.addresses for address in part]
    try:
        plain = compiled.metadata.num_ctas == 1 and not compiled.metadata.global_scratch_size
        if torch.version.hip is not None or not plain or not isinstance(compiled.function, int):
            return None
        if not _has_parameters(compiled.function, len(fixed) + changing + 2):
            return None
        return DirectLaunch(compiled, fixed, changing, 32 * warps, cooperative)
    except (AttributeError, OSError):
        return None


class Arrays(NamedTuple):
    """The arrays of one tree as kernels take them: tensors to compile and interpret with, addresses to launch with.

    device: CUDA index, -1 where kernels are interpreted. rows: row capacity. batch: the largest batch. pool: address of
    the slot pool, [2 P] of int64 (`pool_wide`) or int32. tensors, addresses: state and scratch. direct: the direct
    launches so far, which hold these addresses; of a kernel that a tree needs in one variant, also by the kernel. The
    tensors must outlive the Arrays.
    """

    device: int
    rows: int
    batch: int
    page: int
    bigram: bool
    pool: int
    pool_wide: bool
    state: TreeState
    scratch: Scratch
    tensors: tuple[Any, ...]
    addresses: tuple[Any, ...]
    direct: dict[Variant | Kernel, DirectLaunch]


def _index(device: torch.device) -> int:
    return int(device.index) if device.type == "cuda" else -1


def arrays_of(state: TreeState, scratch: Scratch, pool: torch.Tensor, page: int, bigram: bool) -> Arrays:
    addresses = (
        TreeState._make(tensor.data_ptr() for tensor in state),
        Scratch._make(tensor.data_ptr() for tensor in scratch),
    )
    return Arrays(
        _index(state.numbers.device), len(state.parent), scratch.batch, page, bigram, pool.data_ptr(),
        pool.dtype == torch.int64, state, scratch, (state, scratch), addresses, {},
    )  # fmt: skip


def no_arrays(device: torch.device) -> Arrays:
    """Return the Arrays for kernels that take neither state nor scratch."""
    nothing: Any = None
    return Arrays(_index(device), 0, 0, 1, False, 0, False, nothing, nothing, (), (), {})


class Pointer:
    """An address and its dtype, which Triton takes instead of a tensor."""

    def __init__(self, address: int, kind: str) -> None:
        self._address = address
        self.dtype = _DTYPES[kind]

    def data_ptr(self) -> int:
        return self._address


def _typed(address: int, kind: str, arrays: Arrays) -> Any:
    if not INTERPRETED:
        return Pointer(address, kind)
    if address == 0:
        return torch.empty(1, dtype=_DTYPES[kind], device="cpu")
    for tensor in (tensor for part in arrays.tensors for tensor in part):
        if tensor.data_ptr() == address:
            return tensor  # the interpreter copies each tensor once, so it must know that they are the same
    view = (_CTYPES[kind] * 1).from_address(address)
    return torch.frombuffer(view, dtype=_DTYPES[kind])


def current_stream(device: int) -> int:
    """Return the handle of torch's current stream; takes 0.1 us."""
    return _C._cuda_getCurrentRawStream(device)


def direct_stream(device: int) -> int:
    """Return what `current_stream` does, or -1 if the device is not torch's current one, as direct launches need."""
    return _C._cuda_getCurrentRawStream(device) if _C._cuda_getDevice() == device else -1


class Variant:
    """One set of constants of a kernel, which is compiled once for a device. Compared by identity: make each once.

    wide: one for each "*w" of the kernel. registers: the most registers for a thread, 0 for no limit.
    """

    __slots__ = ("compiled", "constants", "registers", "warps", "wide")

    def __init__(self, constants: Constants, wide: tuple[bool, ...], warps: int, registers: int) -> None:
        self.constants = constants
        self.wide = wide
        self.warps = warps
        self.registers = registers
        self.compiled: dict[int, Any] = {}  # by device: (compiled kernel, launcher, function, metadata)


class Kernel:
    """A Triton function `(state, scratch, *arguments, *constants)` and its compiled variants.

    Kernels without a tree take neither state nor scratch.
    kinds: the type of each argument: "*i32" or "*i64" (an address), "*w" (an address of int64 where the next of the
        call's `wide` is true, else of int32), "i32" or "i64" (a number; the function must not specialise on it).
    warps: the default. cooperative: all programs of a launch run at once, so that they may wait for one another.
    """

    all_kernels: ClassVar[list[Kernel]] = []

    def __init__(self, function: Any, kinds: Sequence[str], warps: int = 4, cooperative: bool = False) -> None:
        self.function = function
        self.kinds = tuple(kinds)
        self.warps = warps
        self.cooperative = cooperative
        self._variants: dict[Any, Variant] = {}
        Kernel.all_kernels.append(self)

    @property
    def variants(self) -> list[Variant]:
        """The variants that were asked for so far."""
        return list(self._variants.values())

    def variant(
        self, constants: Constants = (), wide: tuple[bool, ...] = (), warps: int = 0, registers: int = 0
    ) -> Variant:
        """Return the variant with these constants. warps: 0 for the kernel's default."""
        key = constants, wide, warps, registers
        found = self._variants.get(key)
        if found is None:
            found = self._variants.setdefault(key, Variant(constants, wide, warps or self.warps, registers))
        return found

    def __call__(
        self,
        arrays: Arrays,
        programs: int,
        arguments: Sequence[int],
        constants: Constants = (),
        wide: tuple[bool, ...] = (),
        warps: int = 0,
        registers: int = 0,
    ) -> None:
        """Enqueue a launch on torch's current stream of the tree's device.

        arguments: addresses and numbers. wide: one for each "*w". registers: the most registers for a thread (CUDA
        only), 0 for no limit.
        """
        variant = self.variant(constants, wide, warps, registers)
        direct = arrays.direct.get(variant)
        if direct is None:
            self._start(arrays, programs, arguments, variant)
        elif (stream := direct_stream(arrays.device)) >= 0:
            direct(programs, stream, arguments)
        else:
            with torch.cuda.device(arrays.device):
                direct(programs, current_stream(arrays.device), arguments)

    def only(self, arrays: Arrays, programs: int, arguments: Sequence[int], constants: Constants) -> None:
        """Do what a call does, for a kernel whose constants follow from the tree. Makes `arrays.direct[self]` valid."""
        self(arrays, programs, arguments, constants)
        direct = arrays.direct.get(self.variant(constants))
        if direct is not None:
            arrays.direct[self] = direct

    def _start(self, arrays: Arrays, programs: int, arguments: Sequence[int], variant: Variant) -> None:
        """Launch through Triton: the first launches, and all where there is no direct launch."""
        launcher = variant.compiled.get(arrays.device)
        if launcher is None:
            compiled = self._first(arrays, programs, arguments, variant)
            launcher = None if compiled is None else _launcher(compiled)
            if launcher is not None:
                variant.compiled[arrays.device] = compiled, *launcher
            return
        compiled, run, function, metadata = launcher
        with torch.cuda.device(arrays.device):
            run(
                programs, 1, 1, current_stream(arrays.device), function, metadata, None, None, None,
                *arrays.addresses, *arguments, *variant.constants,
            )  # fmt: skip
            direct = _direct_launch(compiled, arrays, len(arguments), variant.warps, self.cooperative)
        if direct is not None:
            arrays.direct[variant] = direct

    def types(self, wide: tuple[bool, ...]) -> list[str]:
        """Return the type of each argument, with "*w" resolved."""
        widths = iter(wide)
        return [("*i64" if next(widths) else "*i32") if kind == "*w" else kind for kind in self.kinds]

    def _first(self, arrays: Arrays, programs: int, arguments: Sequence[int], variant: Variant) -> Any:
        """Launch through Triton's public interface. Return the compiled kernel, None where kernels are interpreted."""
        pairs = zip(arguments, self.types(variant.wide), strict=True)
        typed = [_typed(value, kind, arrays) if kind[0] == "*" else value for value, kind in pairs]
        options: dict[str, Any] = {"num_warps": variant.warps}
        if self.cooperative:
            options["launch_cooperative_grid"] = True
        if variant.registers and torch.version.hip is None:
            options["maxnreg"] = variant.registers
        if INTERPRETED:
            options.pop("maxnreg", None)
            self.function[(programs,)](*arrays.tensors, *typed, *variant.constants, **options)
            return None
        with torch.cuda.device(arrays.device):
            return self.function[(programs,)](*arrays.tensors, *typed, *variant.constants, **options)


def _launcher(compiled: Any) -> tuple[Callable[..., Any], Any, Any] | None:
    """Return (launcher, function, metadata) of a compiled kernel, or None if this Triton does not provide them."""
    try:
        found = compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:
        return None
    return found if callable(found[0]) and found[1] is not None else None


@functools.cache
def multi_processors(device: int) -> int:
    """Return the number of multiprocessors of a CUDA device; 1 where kernels are interpreted."""
    return 1 if device < 0 else int(torch.cuda.get_device_properties(device).multi_processor_count)


def cooperative_programs(arrays: Arrays, wanted: int, most: int = 4) -> int:
    """Return how many programs a cooperative launch has, at most `wanted`; 1 where kernels are interpreted.

    most: how many programs certainly fit on a multiprocessor. With 4 warps a program, 4 programs leave each thread 128
    registers, 8 programs leave 64. Interpreted programs run one after the other, so none could wait for another.
    """
    if wanted <= 1 or INTERPRETED:
        return 1
    return min(wanted, most * multi_processors(arrays.device), scratch.MOST_PROGRAMS)


@triton.jit
def _probe_kernel(out):
    tl.store(out, 1)


def probe() -> None:
    """Compile and run one kernel. Raises what fails."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    _probe_kernel[(1,)](out)
    if int(out) != 1:
        raise RuntimeError("a kernel ran and had no effect")
