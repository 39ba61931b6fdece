"""Reasons why a kernel refuses a call. Used as `reasons.STALE`; `inputs/refuse.py` has the messages."""

from __future__ import annotations

STALE = -1
NOT_THERE = -2
NOT_LOCKED = -3
BAD_TOKEN = -4
NO_CAPACITY = -5
NO_POOL_SPACE = -6
OTHER_NAMESPACE = -7
OTHER_TOKEN = -8
BAD_SLOT = -9
BAD_OFFSETS = -10
BAD_ROW = -11
TOO_LONG = -12
UNEQUAL = -13
NOT_WANTED = -14
NO_ROOM = -15
NEGATIVE = -16
TOO_MANY_LOCKS = -17
TOO_MANY_WANTS = -18
WHOLE_TREE = -19

# The value of a NO_ROOM refusal is (slots << 32 | slots for which there is space).
# On a GPU, the value of a NO_CAPACITY refusal is (units needed << FREE_BITS | units free).
FREE_BITS = 30
