"""The slot pool of an index in host memory. A token and its slot have the same index in their pools."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.host.outputs import Outputs
from flatradix.inputs.ragged import Ragged, read_batch
from flatradix.inputs.sequences import Batch, Buffer, read_one
from flatradix.kernels import cpu
from flatradix.layout.state import committed, untouched

NO_RANGES = np.empty(0, np.int32)


class SlotBatch(NamedTuple):
    """Slots of B queries. addresses, counts: int64 [B]. owner: keeps the memory alive, or holds the slots."""

    addresses: np.ndarray
    counts: np.ndarray
    wide: bool
    owner: Any


class EvictionMemory(ABC):
    """Memory for the slots that an eviction may free. It is allocated before the index changes, so no slot is lost.

    starts, lengths, target: arguments of the kernel: arrays for pool ranges, and the address for slots.
    """

    starts: np.ndarray = NO_RANGES
    lengths: np.ndarray = NO_RANGES
    target: int = 0

    @abstractmethod
    def slots(self, tokens: int, ranges: int) -> torch.Tensor:
        """Return the slots of `before`, then those of the pool ranges that the kernel freed, [before + tokens]."""


class SlotPool(ABC):
    """The slots of an index in host memory, and the operations that the index needs on them.

    values: the pool, [units]. pool: its address for kernels, 0 if it is not in host memory; kernels then ignore `wide`
    (whether slots are int64) and `limit` (the greatest slot). Methods that take places return a reason if they refuse
    one.
    """

    values: torch.Tensor
    pool: int
    wide: bool
    limit: int

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def refuse_capture(self) -> None:
        """Raise RuntimeError while a CUDA graph is captured, if the slots are on a GPU."""
        return

    @abstractmethod
    def read_one(self, slots: Any, check: bool) -> Buffer:
        """Return the slots of one query."""

    @abstractmethod
    def read(self, slots: Any, check: bool) -> SlotBatch:
        """Return the slots of a batch."""

    @abstractmethod
    def store_one(self, source: Buffer, begin: int, end: int, start: int) -> None:
        """Write slots `begin` to `end` of a query to the pool from `start` on. In host memory the kernel did that."""

    @abstractmethod
    def store(self, source: SlotBatch, begins: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> None:
        """Write `counts` slots of each query, from `begins` on, to the pool from `starts` on. See `store_one`."""

    @abstractmethod
    def enlarged(self, units: int) -> torch.Tensor:
        """Return a larger pool with the slots of this one."""

    def move_to(self, values: torch.Tensor) -> None:
        """Use what `enlarged` returned. May be called again."""
        self.values = values

    @abstractmethod
    def of_place(self, handle: int, length: int) -> torch.Tensor | int:
        """Return the slots of one place, [length] of the pool's dtype."""

    @abstractmethod
    def of_places(self, handles: np.ndarray, lengths: np.ndarray) -> Ragged | int:
        """Return the slots of a batch of places."""

    @abstractmethod
    def write_rows(self, handles: np.ndarray, lengths: np.ndarray, table: torch.Tensor, rows: np.ndarray) -> int:
        """Write the slots of checked places to rows of an engine's table; return 0, or the reason."""

    @abstractmethod
    def allocate_eviction(self, before: torch.Tensor | None, most: int, most_ranges: int) -> EvictionMemory:
        """Allocate memory for `before`, which is copied there, and then for `most` slots of `most_ranges` ranges."""

    @abstractmethod
    def compact(self, call: int, nodes: int) -> None:
        """Slide all `nodes` edges and their slots to the front of the pools, under the call number `call`."""

    @abstractmethod
    def finish_compaction(self) -> None:
        """Do what `compact` does after its kernel, if it was interrupted there. May be called again."""


class HostEvictionMemory(EvictionMemory):
    def __init__(self, out: np.ndarray, address: int, before: torch.Tensor | None) -> None:
        self._out = out
        self._before = 0
        self.target = address
        if before is not None:
            self._before = len(before)
            out[: self._before] = before.numpy()
            self.target = address + before.nbytes

    def slots(self, tokens: int, ranges: int) -> torch.Tensor:
        return torch.from_numpy(self._out[: self._before + tokens])


class HostSlots(SlotPool):
    """Slots in host memory, int32 or int64 [units]. Kernels read, check and write them."""

    def __init__(self, units: int, dtype: torch.dtype, addresses: int) -> None:
        """addresses: the address of the index's address table."""
        self._addresses = addresses
        self.values = committed(units, dtype)
        self.pool = self.values.data_ptr()
        self.wide = dtype == torch.int64
        self.limit = int(torch.iinfo(dtype).max)
        self._outputs = Outputs(dtype)

    def read_one(self, slots: Any, check: bool) -> Buffer:
        return read_one(slots, "slots")

    def read(self, slots: Any, check: bool) -> SlotBatch:
        batch: Batch = read_batch(slots, "slots")
        return SlotBatch(*batch)

    def store_one(self, source: Buffer, begin: int, end: int, start: int) -> None:
        return

    def store(self, source: SlotBatch, begins: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> None:
        return

    def enlarged(self, units: int) -> torch.Tensor:
        values = untouched(units, self.values.dtype)
        values.numpy()[: len(self.values)] = self.values.numpy()
        return values

    def move_to(self, values: torch.Tensor) -> None:
        super().move_to(values)
        self.pool = values.data_ptr()

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

    def allocate_eviction(self, before: torch.Tensor | None, most: int, most_ranges: int) -> EvictionMemory:
        out, address = self._outputs.take(most if before is None else most + len(before))
        return HostEvictionMemory(out, address, before)

    def compact(self, call: int, nodes: int) -> None:
        cpu.compact(self._addresses, call, self.pool, self.wide)

    def finish_compaction(self) -> None:
        return
