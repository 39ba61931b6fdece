"""The errors that flatradix raises on purpose. All of them leave the tree unchanged."""

from __future__ import annotations


class QueryError(ValueError):
    """One query of a batch is wrong. `query` is its index in the batch; a single sequence is query 0."""

    def __init__(self, message: str, query: int) -> None:
        super().__init__(message)
        self.query = query

    def __reduce__(self) -> tuple[type[QueryError], tuple[str, int]]:
        return type(self), (self.args[0], self.query)


class StaleHandleError(QueryError):
    """A place has been evicted, with its whole node or with its last pages, or its handle is of another tree.

    `query` is the index of its query.
    """


class CapacityError(RuntimeError):
    """An insert needs more tokens than are free, or soft pins more than are left of a pin budget.

    `needed` and `free` are counts of tokens.
    """

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free

    def __reduce__(self) -> tuple[type[CapacityError], tuple[str, int, int]]:
        return type(self), (self.args[0], self.needed, self.free)


class DeviceUnavailableError(RuntimeError):
    """The device that was asked for cannot be used here; the message says why and what to do."""


class TooLargeForDeviceError(ValueError):
    """A tree of this capacity fits into host memory only."""


class RanksDifferError(RuntimeError):
    """The trees of two ranks of a process group differ.

    call: the number of the first call after which they do, counted from 1 since `watch_ranks`. operation: its name.
    None where they are not known.
    """

    def __init__(self, message: str, call: int | None = None, operation: str | None = None) -> None:
        super().__init__(message)
        self.call = call
        self.operation = operation

    def __reduce__(self) -> tuple[type[RanksDifferError], tuple[str, int | None, str | None]]:
        return type(self), (self.args[0], self.call, self.operation)
