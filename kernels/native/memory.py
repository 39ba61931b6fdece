"""What the compiled functions are made of: loads in order, copies, and a call of the CUDA driver by its address."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WORD, _INT = ir.IntType(64), ir.IntType(32)


def _load_acquire(typingctx: Any, address: Any) -> Any:
    """Load int64 from an address. The loads after this one see what was written before the word."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(args[0], _WORD.as_pointer()), "acquire", 8)

    return types.int64(types.int64), codegen


def _copy(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
    """Copy `size` bytes from one address to another."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        to, start = (builder.inttoptr(address, byte) for address in args[:2])
        cgutils.raw_memcpy(builder, to, start, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _driver_call(end: int) -> Any:
    """Return a function that calls cuLaunchKernel or cuLaunchCooperativeKernel at an address, on a grid of one axis.

    end: how many null pointers follow the parameters. The function takes (address, kernel, programs, threads a program,
    bytes of shared memory, stream, address of the parameters' addresses), and returns the driver's code, 0 for success.
    """

    def call(typingctx, address, kernel, programs, threads, shared, stream, parameters):
        def codegen(_context, builder, _signature, args):
            kind = ir.FunctionType(_INT, [_WORD, *[_INT] * 7, _WORD, _WORD, *[_WORD] * end])
            function = builder.inttoptr(args[0], kind.as_pointer())
            numbers = [builder.trunc(value, _INT) for value in args[2:5]]
            one = ir.Constant(_INT, 1)
            code = builder.call(
                function,
                [
                    args[1], numbers[0], one, one, numbers[1], one, one, numbers[2], args[5], args[6],
                    *[ir.Constant(_WORD, 0)] * end,
                ],
            )  # fmt: skip
            return builder.zext(code, _WORD)

        return types.int64(*[types.int64] * 7), codegen

    return intrinsic(call)


# `Any`: mypy would count the first parameter, which numba passes.
load_acquire: Any = intrinsic(_load_acquire)
copy: Any = intrinsic(_copy)
call_launch: Any = _driver_call(1)
call_cooperative: Any = _driver_call(0)
