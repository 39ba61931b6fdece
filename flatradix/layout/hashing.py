"""Hash arithmetic that every backend shares. None of it may decide a result: hashes steer, tokens are compared.

Plain functions over int64 that wrap around, without calls to one another, so that each compiler can take them as they
are.
"""

from __future__ import annotations


def mix(value: int) -> int:
    """Finaliser of 64-bit splitmix (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


def page_tag(total: int, parent: int) -> int:
    """The 32-bit tag of a child: `total` is the multilinear sum over its first page, `parent` its parent code.

    The multiplication spreads what differs in low bits; the upper half is kept, where all of it meets.
    """
    value = (total ^ (parent * -7046029254386353131)) * -4417276706812531889
    value = value ^ ((value >> 29) & 0x7FFFFFFFF)
    return ((value * -4658895280553007687) >> 32) & 0xFFFFFFFF
