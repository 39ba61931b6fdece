"""How the CPU kernels are compiled and called, and how they access the arrays.

A numba call costs about 80 ns for each array argument. A kernel therefore takes one address, that of a table of the
addresses of all arrays (`address_table`), and opens the state itself (`open_state`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic

from flatradix.kernels.cpu.keep import keep
from flatradix.layout import running
from flatradix.layout.running import Running
from flatradix.layout.state import FIELDS, TreeState
from flatradix.layout.waiting import DTYPES, Waiting

# C calls no kernel, and neither C nor Python calls a helper. Wrappers for them would take a fifth of the compile time.
_KERNELS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False, "no_cfunc_wrapper": True}
_HELPERS: dict[str, Any] = {**_KERNELS, "no_cpython_wrapper": True}


if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise RuntimeError(
        "NUMBA_DISABLE_JIT is set, but kernels that are not compiled cannot run: they read memory by its address. "
        "Unset NUMBA_DISABLE_JIT for this program"
    )


def kernel(function: Callable[..., Any], nogil: bool = False) -> Any:
    """Compile at the first call and keep the machine code on disk for later processes.

    Each version of the sources has its own files, so two versions can run side by side with one cache folder. nogil:
    whether each call releases the GIL.
    """
    dispatcher = numba.njit(nogil=nogil, **_KERNELS)(function)
    keep(dispatcher)
    return dispatcher


class FixedTypes:
    """A kernel whose arguments have the same types in every call: integers, booleans and contiguous arrays.

    call: from the second call on, it bypasses numba's dispatcher, whose type check takes longer than a short match.
        Types are not checked: an array of another dtype or layout would be read, and written, as garbage.
    """

    def __init__(self, function: Callable[..., Any], signature: str, nogil: bool) -> None:
        self.dispatcher = kernel(function, nogil)
        self.call: Callable[..., Any] = self._first
        self._arguments, _result = normalize_signature(signature)

    def prepare(self) -> None:
        """Compile the kernel, or load it from disk."""
        self.dispatcher.compile(self._arguments)
        self.call = self.dispatcher.overloads[self._arguments].entry_point

    def _first(self, *arguments: Any) -> Any:
        self.prepare()
        return self.call(*arguments)


def fixed_types(signature: str, nogil: bool = False) -> Callable[[Callable[..., Any]], FixedTypes]:
    """Return a decorator that makes a `FixedTypes` with these argument types, in numba's notation: "(int64, int64)"."""
    return lambda function: FixedTypes(function, signature, nogil)


def helper(function: Callable[..., Any]) -> Any:
    """Compile a function that kernels call. Its machine code becomes a part of each of them."""
    return numba.njit(**_HELPERS)(function)


def _pointer_to(element: Any) -> Any:
    """Return a function from an address to a typed pointer. Indexing has no bound check; -1 is not the last element.

    A pointer is one LLVM value. An array is seven, which the compiler has to carry through every call.
    """

    def at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return intrinsic(at)


int32_at = _pointer_to(types.int32)
int64_at = _pointer_to(types.int64)


def address_table(state: TreeState) -> np.ndarray:
    """Return int64 [len(TreeState)]: the address of each tensor of the state. The state must outlive the table."""
    return np.array([tensor.data_ptr() for tensor in state], dtype=np.int64)


def waiting_table(arrays: Waiting) -> np.ndarray:
    """Return int64 [len(Waiting)]: the address of each array. The arrays must outlive the table."""
    return np.array([array.ctypes.data for array in arrays], dtype=np.int64)


def running_table(arrays: Running) -> np.ndarray:
    """Return int64 [len(Running)]: the address of each array. The arrays must outlive the table."""
    return np.array([array.ctypes.data for array in arrays], dtype=np.int64)


def _opener(opened: Any) -> Any:
    """Return a function from the address of an address table to a tuple of pointers, and of plain addresses."""

    def open_table(typingctx, addresses):
        def codegen(context, builder, signature, args):
            word = context.get_value_type(types.int64)
            table = builder.inttoptr(args[0], word.as_pointer())
            values = []
            for place, kind in enumerate(opened.types):
                address = builder.load(builder.gep(table, [context.get_constant(types.int64, place)]))
                pointer = isinstance(kind, types.CPointer)
                values.append(builder.inttoptr(address, context.get_value_type(kind)) if pointer else address)
            return context.make_tuple(builder, opened, values)

        return opened(types.int64), codegen

    return intrinsic(open_table)


_NUMBA = {torch.int8: types.int8, torch.int32: types.int32, torch.int64: types.int64}
# `tokens` and `seconds` are plain addresses: kernels calculate with them.
open_state: Any = _opener(
    types.NamedTuple(
        [types.int64 if array.address else types.CPointer(_NUMBA[array.dtype]) for array in FIELDS.values()], TreeState
    )
)
open_waiting: Any = _opener(
    types.NamedTuple([types.CPointer(numba.from_dtype(np.dtype(kind))) for kind in DTYPES.values()], Waiting)
)
# `tokens` is a plain address.
open_running: Any = _opener(
    types.NamedTuple(
        [
            types.int64 if name == "tokens" else types.CPointer(numba.from_dtype(np.dtype(kind)))
            for name, kind in running.DTYPES.items()
        ],
        Running,
    )
)
