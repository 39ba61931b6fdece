"""How the CPU kernels are compiled, and how they reach the arrays.

A numba call pays about 80 ns for each array argument, so a kernel gets one int64 array with the addresses of the
state's tensors (`address_table`) and opens them itself (`open_state`): 0.14 us instead of 1.2 us a call.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

import flatradix.layout
import flatradix.meta
import flatradix.refusals
from flatradix.layout import TreeState

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}


def _source_stamp() -> str:
    """A digest of every file that is compiled into a kernel.

    numba looks at the kernel's own file alone and would go on using machine code with an old helper inside.
    """
    here = Path(__file__).parent
    shared = [flatradix.layout, flatradix.meta, flatradix.refusals]
    files = [*sorted(here.glob("*.py")), here.parent / "scalar.py", *(Path(str(module.__file__)) for module in shared)]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


_STAMP = _source_stamp()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call and keep the machine code on disk for later processes."""
    dispatcher = numba.njit(cache=True, **_OPTIONS)(function)
    # A numba that keeps it elsewhere goes by its own stamp, the time and size of the kernel's file.
    with contextlib.suppress(AttributeError):
        dispatcher._cache._cache_file._source_stamp = _STAMP
    return dispatcher


def helper(function: Callable[..., Any]) -> Any:
    """A function that kernels call: compiled into each of them."""
    return numba.njit(**_OPTIONS)(function)


def _pointer_to(element: Any) -> Any:
    """A function from an address to a typed pointer: indexed without a bound, and never from the end.

    One LLVM value where an array has seven, which the compiler has to carry through every call.
    """

    def at(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), codegen

    return intrinsic(at)


int8_at = _pointer_to(types.int8)
int32_at = _pointer_to(types.int32)
int64_at = _pointer_to(types.int64)


def address_table(state: TreeState) -> np.ndarray:
    """int64 [len(TreeState)]: where each tensor of the state begins. The state must outlive it."""
    return np.array([tensor.data_ptr() for tensor in state], dtype=np.int64)


@helper
def open_state(table):
    """The state with a pointer in the place of each array; `tokens` and `seconds` as plain addresses."""
    return TreeState(
        int32_at(table[0]),
        int32_at(table[1]),
        int32_at(table[2]),
        int32_at(table[3]),
        int32_at(table[4]),
        int32_at(table[5]),
        int32_at(table[6]),
        int32_at(table[7]),
        int32_at(table[8]),
        int8_at(table[9]),
        int64_at(table[10]),
        int64_at(table[11]),
        int64_at(table[12]),
        int64_at(table[13]),
        int32_at(table[14]),
        int64_at(table[15]),
        int64_at(table[16]),
        int32_at(table[17]),
        int64_at(table[18]),
        table[19],
        table[20],
        int64_at(table[21]),
        int32_at(table[22]),
        int64_at(table[23]),
        int32_at(table[24]),
        int64_at(table[25]),
        int64_at(table[26]),
    )
