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
    """Return the parameters of a kernel that change from launch to launch, int64, to be filled in."""
    return int64_at(int64_at(record)[_CELLS])


@fixed_types("(int64, int64, int64)", nogil=True)
def launch(record, programs, stream):
    """Launch a kernel whose cells are filled in. Return the driver's code, 0 for success."""
    return start(record, programs, stream)


@fixed_types("(int64, int64, int64, int64, int64)", nogil=True)
def start_lock(record, stream, handles, lengths, call):
    """Launch a lock or unlock of one place. Return the driver's code. handles, lengths: addresses of the place."""
    cells = cells_of(record)
    cells[0] = handles
    cells[1] = lengths
    cells[2] = call
    return start(record, 1, stream)


@fixed_types("(int64, int64, int64, int64, int64, boolean, int64, int64, int64, int64, int64)", nogil=True)
def start_match(record, stream, desk, key, tokens, wide, name, rows, call, lengths, handles):
    """Copy a key to a pinned buffer and launch its match. Return the driver's code; -1 if no buffer is free.

    desk: address of the tree's `desk`. key, wide: as for `put`. lengths, handles: addresses of the results.
    """
    staged = put(desk, 0, key, tokens, wide)
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


@fixed_types(
    "(int64, int64, int64, int64, int64, int64, boolean, int64, int64, int64, int64, int64, int64)", nogil=True
)
def start_long(record, share, stream, desk, key, tokens, wide, name, rows, call, lengths, handles, mask):
    """Do what `start_match` does for a long key, with `share` programs. mask: as for the kernel."""
    staged = put(desk, 0, key, tokens, wide)
    if staged == 0:
        return -1
    cells = cells_of(record)
    cells[0] = staged
    cells[1] = 0
    cells[2] = 0
    cells[3] = lengths
    cells[4] = handles
    cells[5] = int64_at(desk)[STAGING]
    cells[6] = tokens
    cells[7] = name
    cells[8] = 1
    cells[9] = rows
    cells[10] = call
    cells[11] = -1
    cells[12] = 0
    cells[13] = share
    cells[14] = mask
    code = start(record, share, stream)
    if code == 0:
        reserve(desk, call)
    return code


@fixed_types(f"({'int64, ' * 17})", nogil=True)
def start_matches(
    record, programs, stream, values, offsets, names, start_handles, start_lengths, lengths, handles, total, name,
    batch, rows, call, told, left_out,
):  # fmt: skip
    """Launch a match of keys on the device. Return the driver's code. The other arguments are those of the kernel."""
    cells = cells_of(record)
    cells[0] = values
    cells[1] = offsets
    cells[2] = names
    cells[3] = start_handles
    cells[4] = start_lengths
    cells[5] = lengths
    cells[6] = handles
    cells[7] = 0
    cells[8] = total
    cells[9] = name
    cells[10] = batch
    cells[11] = rows
    cells[12] = call
    cells[13] = told
    cells[14] = left_out
    return start(record, programs, stream)


@fixed_types(f"({'int64, ' * 14})", nogil=True)
def start_slots(
    record, programs, stream, handles, lengths, rows, pool, target, stride, height, width, batch, call, parts
):  # fmt: skip
    """Launch a copy of the slots of places. Return the driver's code. The other arguments are those of the kernel."""
    cells = cells_of(record)
    cells[0] = handles
    cells[1] = lengths
    cells[2] = rows
    cells[3] = pool
    cells[4] = target
    cells[5] = stride
    cells[6] = height
    cells[7] = width
    cells[8] = batch
    cells[9] = call
    cells[10] = parts
    return start(record, programs, stream)
