"""What the launchers of GPU kernels take: where the parts of a batch lie on the device, as addresses."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Values(NamedTuple):
    """A batch of sequences on the device.

    address: of int64 (`wide`) or int32 values. offsets: address of int64 [B + 1], 0 for a single sequence.
    counts: int64 [B] on the host, None where only the device knows them.
    owner: keeps the memory alive until the kernels are enqueued.
    """

    address: int
    wide: bool
    offsets: int
    total: int
    batch: int
    counts: np.ndarray | None
    owner: Any


class PerQuery(NamedTuple):
    """A number for each query: the address of int64 [B], or 0 and one number for all. owner: as of Values."""

    address: int
    number: int
    owner: Any = None


class Places(NamedTuple):
    """Addresses of int64 [B] handles and int32 [B] lengths, 0 where there are none. owner: as of Values."""

    handles: int
    lengths: int
    batch: int
    owner: Any = None


class Output(NamedTuple):
    """Where results go: addresses of int64 [B] handles, int32 [B] lengths and, for inserts, prefix lengths."""

    handles: int
    lengths: int
    prefix_lengths: int = 0


class Table(NamedTuple):
    """A table of an engine: `height` rows of `width` elements, int64 (`wide`) or int32, `stride` apart."""

    address: int
    wide: bool
    stride: int
    height: int
    width: int


NO_PLACES = Places(0, 0, 0)
