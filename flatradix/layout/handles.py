"""How handles and the entries of the child table are packed.

Plain functions over int64 without calls to one another, so that each compiler can take them as they are.
"""

from __future__ import annotations

ROW_BITS = 28
ROW_MASK = (1 << ROW_BITS) - 1
GENERATION_BITS = 35
GENERATION_MASK = (1 << GENERATION_BITS) - 1
LOW32 = 0xFFFFFFFF

NO_HANDLE = -1


def pack_handle(row: int, generation: int) -> int:
    """A handle: 28 bits of row, 35 bits of generation; never negative."""
    return ((generation & 0x7FFFFFFFF) << 28) | row


def pack_entry(tag: int, row: int) -> int:
    """An entry of the child table: the tag above, the row below. Zero is an empty entry, since row 0 is the root."""
    return (tag << 32) | row
