"""How the CPU kernels are compiled, called, and how they reach the arrays.

A numba call pays about 80 ns for each array argument, so a kernel gets one address, that of a table of all addresses
(`address_table`), and opens the state itself (`open_state`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core.caching import IndexDataCacheFile
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic

from flatradix import layout
from flatradix.layout.state import FIELDS, TreeState

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}


def _source_stamp() -> str:
    """A digest of every file that is compiled into a kernel.

    numba looks at the kernel's own file alone and would go on using machine code with an old helper inside.
    """
    folders = [Path(__file__).parent, Path(str(layout.__file__)).parent]
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(file for folder in folders for file in folder.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


_STAMP = _source_stamp()


def kernel(function: Callable[..., Any]) -> Any:
    """Compile at the first call and keep the machine code on disk for later processes.

    Each version of the sources has files of its own: two of them may run side by side with one cache folder.
    """
    dispatcher = numba.njit(cache=True, **_OPTIONS)(function)
    # A numba that keeps it elsewhere goes by its own stamp, the time and size of the kernel's file.
    with contextlib.suppress(AttributeError):
        cache = dispatcher._cache
        name = f"{cache._impl.filename_base}-{_STAMP}"
        cache._cache_file = IndexDataCacheFile(cache._cache_path, name, _STAMP)
    return dispatcher


class Single:
    """A kernel whose arguments have the same types in every call: integers, booleans and arrays without gaps.

    call: from the second time on it goes past numba's dispatcher, whose look at the types takes longer than a short
        match (bench/RESULTS.md). Types are converted, not looked at: whoever calls must pass the right ones.
    """

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self.dispatcher = kernel(function)
        self.call: Callable[..., Any] = self._first
        self._arguments, _result = normalize_signature(signature)

    def _first(self, *arguments: Any) -> Any:
        self.dispatcher.compile(self._arguments)
        self.call = self.dispatcher.overloads[self._arguments].entry_point
        return self.call(*arguments)


def single(signature: str) -> Callable[[Callable[..., Any]], Single]:
    """Decorator of a `Single` with these types, in numba's notation: "(int64, boolean)"."""
    return lambda function: Single(function, signature)


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


int32_at = _pointer_to(types.int32)
int64_at = _pointer_to(types.int64)


def address_table(state: TreeState) -> np.ndarray:
    """int64 [len(TreeState)]: where each tensor of the state begins. The state must outlive it."""
    return np.array([tensor.data_ptr() for tensor in state], dtype=np.int64)


_NUMBA = {torch.int8: types.int8, torch.int32: types.int32, torch.int64: types.int64}
_OPENED = types.NamedTuple(
    [types.int64 if array.address else types.CPointer(_NUMBA[array.dtype]) for array in FIELDS.values()], TreeState
)


def _open_state(typingctx, addresses):
    """The state with a pointer in the place of each tensor, from the address of an address table.

    `tokens` and `seconds` are plain addresses: kernels calculate with them.
    """

    def codegen(context, builder, signature, args):
        word = context.get_value_type(types.int64)
        table = builder.inttoptr(args[0], word.as_pointer())
        values = []
        for place, kind in enumerate(_OPENED.types):
            address = builder.load(builder.gep(table, [context.get_constant(types.int64, place)]))
            pointer = isinstance(kind, types.CPointer)
            values.append(builder.inttoptr(address, context.get_value_type(kind)) if pointer else address)
        return context.make_tuple(builder, _OPENED, values)

    return _OPENED(types.int64), codegen


open_state: Any = intrinsic(_open_state)
