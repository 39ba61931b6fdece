"""The slot pool of an index in host memory: the slot of each cached token, where the token is in the token pool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.host.outputs import Outputs
from flatradix.inputs.ragged import Ragged, read_batch
from flatradix.inputs.sequences import Batch, Buffer, read_one
from flatradix.kernels import cpu
from flatradix.layout.state import committed

NO_RANGES = np.empty(0, np.int32)


class SlotBatch(NamedTuple):
    """Slots of B queries. addresses, counts: int64 [B]. owner: keeps the memory alive, or holds the slots."""

    addresses: np.ndarray
    counts: np.ndarray
    wide: bool
    owner: Any


class Eviction(ABC):
    """Memory for what an eviction may free, taken before the index changes: its slots must not be lost.

    starts, lengths, target: what the kernel is told of it.
    """

    starts: np.ndarray = NO_RANGES
    lengths: np.ndarray = NO_RANGES
    target: int = 0

    @abstractmethod
    def slots(self, tokens: int, nodes: int) -> torch.Tensor:
        """The slots of before and those that the kernel freed, [before + tokens]."""


class SlotPool(ABC):
    """Where the slots of an index in host memory are, and what the index wants of them.

    values: the pool, [units]. pool: its address for kernels, 0 where it is not in host memory; wide: int64; limit: the
    greatest slot. Methods that take places return a reason instead where one of them is refused.
    """

    values: torch.Tensor
    pool: int
    wide: bool
    limit: int

    @property
    def device(self) -> torch.device:
        return self.values.device

    @abstractmethod
    def refuse_capture(self) -> None:
        """RuntimeError while a CUDA graph is captured, where a call would not be the same on replay."""

    @abstractmethod
    def read_one(self, slots: Any, check: bool) -> Buffer:
        """The slots of one query."""

    @abstractmethod
    def read(self, slots: Any, check: bool) -> SlotBatch:
        """The slots of a batch."""

    @abstractmethod
    def store_one(self, source: Buffer, begin: int, end: int, start: int) -> None:
        """Bring slots `begin` to `end` of a query to the pool, from `start` on; kernels have done it in host memory."""

    @abstractmethod
    def store(self, source: SlotBatch, begins: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> None:
        """The same for each query of a batch."""

    @abstractmethod
    def of_place(self, handle: int, length: int) -> torch.Tensor | int:
        """The slots of one place, [length] of the pool's type."""

    @abstractmethod
    def of_places(self, handles: np.ndarray, lengths: np.ndarray) -> Ragged | int:
        """The slots of a batch of places."""

    @abstractmethod
    def write_rows(self, handles: np.ndarray, lengths: np.ndarray, table: torch.Tensor, rows: np.ndarray) -> int:
        """Write the slots of places that were checked into the rows of a table. 0, or the reason."""

    @abstractmethod
    def evict_into(self, before: torch.Tensor | None, most: int, most_nodes: int) -> Eviction:
        """Memory for `before`, which is copied there, and behind it for `most` slots of `most_nodes` nodes."""

    @abstractmethod
    def compact(self, call: int, nodes: int) -> None:
        """Slide index and slots to the front of the pools, under the number of a call."""

    @abstractmethod
    def finish_compaction(self) -> None:
        """What `compact` does after its kernel, where it was cut short; may be called again."""


class HostEviction(Eviction):
    def __init__(self, out: np.ndarray, address: int, before: torch.Tensor | None) -> None:
        self._out = out
        self._before = 0
        self.target = address
        if before is not None:
            self._before = len(before)
            out[: self._before] = before.numpy()
            self.target = address + before.nbytes

    def slots(self, tokens: int, nodes: int) -> torch.Tensor:
        return torch.from_numpy(self._out[: self._before + tokens])


class HostSlots(SlotPool):
    """Slots in host memory, int32 or int64 [units]. Kernels read, check and write them."""

    def __init__(self, units: int, dtype: torch.dtype, addresses: int) -> None:
        """addresses: where the index's table of addresses is."""
        self._addresses = addresses
        self.values = committed(units, dtype)
        self.pool = self.values.data_ptr()
        self.wide = dtype == torch.int64
        self.limit = int(torch.iinfo(dtype).max)
        self._outputs = Outputs(dtype)

    def refuse_capture(self) -> None:
        return

    def read_one(self, slots: Any, check: bool) -> Buffer:
        return read_one(slots, "slots")

    def read(self, slots: Any, check: bool) -> SlotBatch:
        batch: Batch = read_batch(slots, "slots")
        return SlotBatch(*batch)

    def store_one(self, source: Buffer, begin: int, end: int, start: int) -> None:
        return

    def store(self, source: SlotBatch, begins: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> None:
        return

    def of_place(self, handle: int, length: int) -> torch.Tensor | int:
        out, address = self._outputs.take(length)
        reason: int = cpu.path_slots_one.call(self._addresses, handle, length, self.pool, self.wide, address)
        return reason if reason < 0 else torch.from_numpy(out)

    def of_places(self, handles: np.ndarray, lengths: np.ndarray) -> Ragged | int:
        total, _nodes = cpu.count_paths(self._addresses, handles, lengths)
        if total < 0:
            return int(total)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        out, address = self._outputs.take(total)
        cpu.path_slots(self._addresses, handles, lengths, self.pool, self.wide, address)
        return Ragged.trusted(torch.from_numpy(out), torch.from_numpy(offsets))

    def write_rows(self, handles: np.ndarray, lengths: np.ndarray, table: torch.Tensor, rows: np.ndarray) -> int:
        return 0

    def evict_into(self, before: torch.Tensor | None, most: int, most_nodes: int) -> Eviction:
        out, address = self._outputs.take(most if before is None else most + len(before))
        return HostEviction(out, address, before)

    def compact(self, call: int, nodes: int) -> None:
        cpu.compact(self._addresses, call, self.pool, self.wide)

    def finish_compaction(self) -> None:
        return
