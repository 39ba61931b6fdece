"""The most locks, and the most soft pins, that a node of a tree on a GPU can have.

The host counts what calls add, and not what calls take away. So no call waits for the device until 2**30 were added;
then the host looks up the largest count of any node.
"""

from __future__ import annotations

from flatradix.errors import QueryError
from flatradix.layout.numbers import MAX_LOCKS


class Bound:
    """At least the largest count of any node.

    column: the name of the counts in TreeState. kind, cure: what is counted, and the call that takes one away.
    """

    __slots__ = ("column", "cure", "kind", "most")

    def __init__(self, column: str, kind: str, cure: str) -> None:
        self.column = column
        self.kind = kind
        self.cure = cure
        self.most = 0

    def add(self, count: int) -> bool:
        """Count what a call may add to a node. Return whether the bound is above the limit, and must be looked up."""
        self.most += count
        return self.most > MAX_LOCKS

    def look_up(self, most: int, count: int, operation: str) -> None:
        """Replace the bound by `most`, the largest count now, and what a call may add. Raises QueryError."""
        self.most = most
        if most + count > MAX_LOCKS:
            raise QueryError(
                f"{operation}: a node has {most} {self.kind}, and {count} more may exceed {MAX_LOCKS}, the most there "
                f"can be; {self.cure} once for each",
                0,
            )
        self.most += count
