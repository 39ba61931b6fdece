"""Why a kernel refuses a call. Used as `reasons.STALE` on every floor; the messages are in `inputs/refuse.py`."""

from __future__ import annotations

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

# A refusal for want of capacity on a GPU says how much is needed, above, and how much is free, in so many bits below.
FREE_BITS = 30
