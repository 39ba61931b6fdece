"""How `TreeState.created` also says which nodes were dropped.

`RadixTree.drop` frees what is not locked. A dropped node that stays is marked by negative `created`: the time at which
it was made, less DROPPED. Every node below it is dropped, too. The top node of a dropped subtree, which no look-up may
find, is detached: its `created` is the time less DETACHED, and the tag of its entry in the child table is inverted. A
look-up compares the tag, then the parent, then the first page. Where the first page is equal, the tag of the key is not
the inverted one, so the entry is never taken, while everything else treats it as any entry.

Plain functions over int64 that call no other function, so that numba and Triton can compile them unchanged.
"""

from __future__ import annotations

DROPPED = 1 << 60  # above all times
DETACHED = 1 << 61
LOWEST = -(2**63)  # the score of dropped nodes, with any policy


def time_of(created: int) -> int:
    """Return the time at which a node was made, dropped or not."""
    return created & 0x0FFFFFFFFFFFFFFF


def made_below(created: int, time: int) -> int:
    """Return `created` of a node that is made at `time` below one with `created`, or within its edge."""
    return time | ((created >> 63) & -0x1000000000000000)


def made_above(created: int, time: int) -> int:
    """Return `created` of the first part of a node's edge, which is cut off at `time` and takes over its entry."""
    return time | (created & -0x1000000000000000)


def left_below(created: int) -> int:
    """Return `created` of what is left of a node after that: dropped if it was detached."""
    return created | ((created >> 63) & 0x1000000000000000)
