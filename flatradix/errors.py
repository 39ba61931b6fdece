"""The errors that flatradix raises on purpose. All leave the tree as it was."""

from __future__ import annotations


class StaleHandleError(ValueError):
    """A handle names a node that has been evicted, or a node of another tree."""


class CapacityError(RuntimeError):
    """An insert needs more tokens than are free. `needed` and `free` are counts of tokens."""

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.free = free

    def __reduce__(self) -> tuple[type[CapacityError], tuple[str, int, int]]:
        return type(self), (self.args[0], self.needed, self.free)


class DeviceUnavailableError(RuntimeError):
    """The device that was asked for cannot be used here; the message says why and what to do."""


class TooLargeForDeviceError(ValueError):
    """A tree of this capacity can live in host memory only."""
