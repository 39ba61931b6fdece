"""Where ranks have parted: the first call after which the entries of their journals differ."""

from __future__ import annotations

from typing import NamedTuple

from flatradix.layout.journal import KEPT, UNKNOWN
from flatradix.ranks.journal import NAMES, Entry

_NUMBERS = ("the clock at", "evictable tokens:", "protected tokens:", "nodes:", "the digest at")


class Rank(NamedTuple):
    """The entries that a rank has kept. number: of entries ever written. first: the number of the first one kept.

    knows: 0 if the entries hold the calls alone, 1 if also numbers, 2 if also digests.
    """

    rank: int
    knows: int
    number: int
    first: int
    entries: list[Entry]


class Parting(NamedTuple):
    """A call, counted from 1, after which two ranks differ. operation: its name, None if it is not known."""

    call: int
    what: str
    operation: str | None


def first_parting(ranks: list[Rank]) -> Parting | None:
    """Return the first call after which two ranks differ: in calls, or in numbers where both know as much."""
    pairs = [(ranks[0], other) for other in ranks[1:]]
    for knows in (1, 2):
        alike = [one for one in ranks if one.knows == knows]
        pairs += [(alike[0], other) for other in alike[1:]]
    found = [one for one in (_parted(*pair) for pair in pairs) if one is not None]
    return min(found, key=lambda one: one.call, default=None)


def _parted(a: Rank, b: Rank) -> Parting | None:
    """Return the first call after which two ranks differ, None if they agree."""
    begin, end = max(a.first, b.first), min(a.number, b.number)
    alike = a.knows == b.knows > 0
    for number in range(begin, end):
        one, other = a.entries[number - a.first], b.entries[number - b.first]
        if (one.by_numbers, one.by_calls) == (other.by_numbers, other.by_calls):
            continue
        if not alike and one.by_calls == other.by_calls:
            continue
        text = _difference(a.rank, one, b.rank, other)
        if text is None or number == begin > 0:  # the first that both have kept: they may have parted before
            what = f"at call {number + 1} or before; only the last {KEPT} calls are kept, so compare more often"
            return Parting(number + 1, what, None)
        return Parting(number + 1, f"after call {number + 1}, {text}", NAMES[one.name])
    if a.number == b.number:
        return None
    less, more = (a, b) if a.number < b.number else (b, a)
    if not 0 <= end - more.first < len(more.entries):
        return Parting(end + 1, f"rank {less.rank} made {less.number} calls, rank {more.rank} made {more.number}", None)
    name = NAMES[more.entries[end - more.first].name]
    text = f"after call {end + 1}, {name}: rank {more.rank} made it, and rank {less.rank} did not"
    return Parting(end + 1, text, name)


def _difference(a: int, one: Entry, b: int, other: Entry) -> str | None:
    """Return how two entries differ, or None if they are equal."""
    names = NAMES[one.name], NAMES[other.name]
    if names[0] != names[1]:
        return f"{names[0]} on rank {a}, but {names[1]} on rank {b}"
    if one.queries != other.queries:
        return f"{names[0]}: of {one.queries} on rank {a}, but of {other.queries} on rank {b}"
    for what, left, right in zip(_NUMBERS, one.known, other.known, strict=True):
        if left != right and UNKNOWN not in (left, right):
            shown = [f"{half & (1 << 64) - 1:016x}" if what == _NUMBERS[-1] else str(half) for half in (left, right)]
            return f"{names[0]}: {what} {shown[0]} on rank {a}, but {shown[1]} on rank {b}"
    return None
