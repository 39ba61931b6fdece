"""Fill in the parameters of a GPU kernel and launch it through the CUDA driver."""

from __future__ import annotations

from typing import NamedTuple

from flatradix.kernels.cpu.jit import fixed_types, helper, int64_at
from flatradix.kernels.native.memory import call_cooperative, call_launch
from flatradix.kernels.native.stage import put, reserve
from flatradix.layout.desk import STAGING


class Record(NamedTuple):
    """A kernel that is ready to be launched, int64: what the functions below read by its address.

    launch, launch_cooperative: addresses of the driver's functions. cooperative: whether programs wait for one another;
    one program alone is launched as any other, which is faster. function: the kernel. shared: bytes. parameters:
    address of the address of each parameter. cells: address of the first parameter that changes from launch to launch,
    int64 each.
    """

    launch: int
    launch_cooperative: int
    cooperative: int
    function: int
    threads: int
    shared: int
    parameters: int
    cells: int


_LAUNCH, _LAUNCH_COOPERATIVE, _COOPERATIVE, _FUNCTION, _THREADS, _SHARED, _PARAMETERS, _CELLS = range(
    len(Record._fields)
)


@helper
def start(record, programs, stream):
    """Launch a kernel whose cells are filled in. Return the driver's code, 0 for success."""
    r = int64_at(record)
    if r[_COOPERATIVE] and programs > 1:
        return call_cooperative(
            r[_LAUNCH_COOPERATIVE], r[_FUNCTION], programs, r[_THREADS], r[_SHARED], stream, r[_PARAMETERS]
        )
    return call_launch(r[_LAUNCH], r[_FUNCTION], programs, r[_THREADS], r[_SHARED], stream, r[_PARAMETERS])


@helper
def cells_of(record):
    """Return the parameters of a kernel that change from launch to launch, to be filled in."""
    return int64_at(int64_at(record)[_CELLS])


@fixed_types("(int64, int64, int64)", nogil=True)
def launch(record, programs, stream):
    """Launch a kernel whose cells are filled in. Return the driver's code, 0 for success."""
    return start(record, programs, stream)


@fixed_types("(int64, int64, int64, int64, int64, boolean, int64, int64, int64, int64, int64)", nogil=True)
def start_match(record, stream, desk, key, tokens, wide, name, rows, call, lengths, handles):
    """Copy a key to a pinned buffer and launch its match. Return the driver's code; -1 if no buffer is free.

    desk: address of the tree's `desk`. key, wide: as for `put`. lengths, handles: addresses of the results.
    """
    staged = put(desk, key, tokens, wide)
    if staged == 0:
        return -1
    cells = cells_of(record)
    cells[0] = staged
    for cell in range(1, 5):
        cells[cell] = 0
    cells[5] = lengths
    cells[6] = handles
    cells[7] = int64_at(desk)[STAGING]
    cells[8] = tokens
    cells[9] = name
    cells[10] = 1
    cells[11] = rows
    cells[12] = call
    cells[13] = -1
    cells[14] = 0
    code = start(record, 1, stream)
    if code == 0:
        reserve(desk, call)
    return code
