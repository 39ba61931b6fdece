"""The error messages for the reasons with which kernels refuse a call."""

from __future__ import annotations

from typing import NoReturn

from flatradix.errors import CapacityError, QueryError, StaleHandleError
from flatradix.layout import reasons
from flatradix.layout.numbers import MAX_LOCKS

_MESSAGES = {
    reasons.STALE: "its handle names a node that was evicted, or a part of one that was, or a node of another tree; "
    "match the key again",
    reasons.NOT_THERE: "length {value} is no page boundary on the path of its handle; pass both as they came",
    reasons.NOT_LOCKED: "no lock ends at its length {value}: unlock once for each lock, with the object that was "
    "locked",
    reasons.NOT_WANTED: "no want ends at its length {value}: unwant once for each want, with the object that was "
    "wanted",
    reasons.TOO_MANY_LOCKS: f"a node on its path has {MAX_LOCKS} locks, the most there can be; unlock "
    "once for each lock",
    reasons.TOO_MANY_WANTS: f"a node on its path has {MAX_LOCKS} wants, the most there can be; unwant "
    "once for each want",
    reasons.BAD_TOKEN: "the token at position {value} is outside [0, 2**31 - 1]",
    reasons.OTHER_NAMESPACE: "its start is in another namespace; give that one, or None",
    reasons.OTHER_TOKEN: "with bigrams a key begins with the last token of its start (number {value}); it differs",
    reasons.BAD_OFFSETS: "its offsets fall, or do not begin at 0 and end at len(values)",
    reasons.BAD_ROW: "the table has no row {value}",
    reasons.WHOLE_TREE: "its length is 0, which names no prefix; drop a namespace, or reset the tree",
    reasons.TOO_LONG: "its {value} slots are more than a row of the table holds",
}


def refuse(operation: str, reason: int, query: int, value: int) -> NoReturn:
    """Raise the error of a reason. value: a length, position, row, or two counts of 32 bits, as the reason needs."""
    if reason == reasons.UNEQUAL:
        refuse_unequal(query, value >> 32, value & 0xFFFFFFFF)
    if reason == reasons.NO_ROOM:
        refuse_out(value >> 32, value & 0xFFFFFFFF)
    if reason == reasons.NEGATIVE:
        refuse_negative(value)
    if reason == reasons.NO_POOL_SPACE:
        raise AssertionError(f"{operation}: the pools have no room for {value} units, and were not to be compacted")
    if reason not in _MESSAGES:
        raise AssertionError(f"{operation}: unknown reason {reason}")
    kind = StaleHandleError if reason == reasons.STALE else QueryError
    raise kind(f"{operation}: query {query}: {_MESSAGES[reason].format(value=value)}", query)


def refuse_out(slots: int, space: int) -> NoReturn:
    """Raise ValueError for an eviction whose slots do not fit into the caller's tensor."""
    raise ValueError(
        f"evict: {slots} slots do not fit into out [{space}]: nothing was evicted; make out larger by the "
        "longest node, or evict less at once"
    )


def refuse_negative(count: int) -> NoReturn:
    raise ValueError(f"evict: {count} tokens; give a number >= 0")


def refuse_unequal(query: int, tokens: int, slots: int) -> NoReturn:
    raise QueryError(f"insert: query {query}: it has {tokens} tokens, but {slots} slots; give one slot a token", query)


def refuse_slot(value: int, query: int, position: int, dtype: object) -> NoReturn:
    """Raise QueryError for a slot that is negative, or too large for the pool."""
    where = f"slots of query {query}: {value} at position {position}"
    if value < 0:
        raise QueryError(f"{where} is negative", query)
    raise QueryError(f"{where} does not fit the pool's {dtype}; make the tree with slot_dtype=torch.int64", query)


def refuse_unseen_slot(position: int, query: int, dtype: object, largest: int) -> NoReturn:
    """Raise QueryError for a slot out of range, if only the device knows the slot."""
    raise QueryError(
        f"slots of query {query}: the slot at position {position} is negative, or does not fit the pool's {dtype} "
        f"(at most {largest})",
        query,
    )


def refuse_capacity(needed: int, free: int, evictable: int, max_tokens: int) -> NoReturn:
    missing = needed - free
    if missing <= evictable:
        cure = f"evict({missing}) first ({evictable} tokens are evictable)"
    elif needed > max_tokens:
        cure = "no eviction makes such room: insert less at once, or make a tree with a larger max_tokens"
    else:
        cure = f"an eviction frees only {evictable}, the other tokens are locked: unlock some first, or insert less"
    raise CapacityError(
        f"insert: {needed} new tokens, but {free} of {max_tokens} are free: {missing} too few; {cure}", needed, free
    )
