"""Hash arithmetic that both devices share. No hash decides a result: it narrows a search, then tokens are compared.

Plain functions over int64 that wrap around and call no other function, so that numba and Triton can compile them
unchanged.
"""

from __future__ import annotations


def mix(value: int) -> int:
    """Return the 64-bit splitmix finaliser (Steele, Lea, Flood 2014): every input bit affects every output bit."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


def page_tag(total: int, parent: int) -> int:
    """Return the 32-bit tag of a child. total: the multilinear sum over its first page. parent: a code of its parent.

    The multiplications carry differences in low bits upward, so the upper half is kept: it depends on all bits.
    """
    value = (total ^ (parent * -7046029254386353131)) * -4417276706812531889
    value = value ^ ((value >> 29) & 0x7FFFFFFFF)
    return ((value * -4658895280553007687) >> 32) & 0xFFFFFFFF
