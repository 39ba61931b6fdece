"""How handles and the entries of the child table are packed.

Plain functions over int64 that call no other function, so that numba and Triton can compile them unchanged.
"""

from __future__ import annotations

ROW_BITS = 28
ROW_MASK = (1 << ROW_BITS) - 1
GENERATION_BITS = 35
GENERATION_MASK = (1 << GENERATION_BITS) - 1
LOW32 = 0xFFFFFFFF

NO_HANDLE = -1


def pack_handle(row: int, generation: int) -> int:
    """Return a handle: 35 bits of generation above 28 bits of row. It is never negative."""
    return ((generation & 0x7FFFFFFFF) << 28) | row


def next_generation(generation: int) -> int:
    """Return the generation of a row that is freed. It is negative while the row holds a node that was loaded."""
    return (generation + 1) & ~(generation >> 63)


def pack_entry(tag: int, row: int) -> int:
    """Return an entry of the child table: the tag in the upper half, the row in the lower. Zero means empty.

    No entry has row 0, as that is the root.
    """
    return (tag << 32) | row
