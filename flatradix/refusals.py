"""What the kernels' reasons for refusal mean to a caller."""

from __future__ import annotations

from typing import NoReturn

from flatradix.errors import CapacityError, StaleHandleError

STALE = -1
NOT_THERE = -2
NOT_LOCKED = -3
BAD_TOKEN = -4
NO_CAPACITY = -5
NO_ROOM = -6
OTHER_NAMESPACE = -7
OTHER_TOKEN = -8
BAD_SLOT = -9
BAD_OFFSETS = -10
BAD_ROW = -11
TOO_LONG = -12
UNEQUAL = -13

# A refusal for want of room on a GPU says how much is needed, above, and how much is free, in so many bits below.
FREE_BITS = 30


def refuse(operation: str, reason: int, query: int, value: int) -> NoReturn:
    """Raise the error of a reason; `value` is a length, or the position of a token."""
    where = f"{operation}: query {query}: "
    if reason == STALE:
        raise StaleHandleError(
            f"{where}its handle names a node that was evicted, or a node of another tree; match the key again"
        )
    if reason == NOT_THERE:
        raise ValueError(f"{where}length {value} is no page boundary on the path of its handle; pass both as they came")
    if reason == NOT_LOCKED:
        raise ValueError(
            f"{where}no lock ends at its length {value}: unlock once for each lock, with the object that was locked"
        )
    if reason == BAD_TOKEN:
        raise ValueError(f"{where}the token at position {value} is outside [0, 2**31 - 1]")
    if reason == OTHER_NAMESPACE:
        raise ValueError(f"{where}its start is in another namespace; give that one, or None")
    if reason == OTHER_TOKEN:
        raise ValueError(
            f"{where}with bigrams a key begins with the last token of its start (number {value}); it differs"
        )
    if reason == BAD_OFFSETS:
        raise ValueError(f"{where}its offsets fall, or do not begin at 0 and end at len(values)")
    if reason == UNEQUAL:
        raise ValueError(f"{where}it has {value >> 32} tokens, but {value & 0xFFFFFFFF} slots; give one slot a token")
    if reason == BAD_ROW:
        raise ValueError(f"{where}the table has no row {value}")
    if reason == TOO_LONG:
        raise ValueError(f"{where}its {value} slots are more than a row of the table holds")
    if reason == NO_ROOM:
        raise AssertionError(f"{operation}: the pools have no room for {value} units, and were not to be compacted")
    raise AssertionError(f"{operation}: unknown reason {reason}")


def refuse_bad_slot(value: int, query: int, dtype: object, largest: int) -> NoReturn:
    """Where only the device knows the slot; `value` is its position."""
    raise ValueError(
        f"slots of query {query}: the slot at position {value} is negative, or does not fit the pool's {dtype} "
        f"(at most {largest})"
    )


def refuse_capacity(needed: int, free: int, evictable: int, max_tokens: int) -> NoReturn:
    raise CapacityError(
        f"insert: {needed} new tokens, but {free} of {max_tokens} are free: {needed - free} too few; "
        f"evict({needed - free}) first ({evictable} tokens are evictable)",
        needed,
        free,
    )
