"""The slot pool: the KV slot of each cached token, at the place that the token has in the token pool.

`HostSlots` lies beside the index in host memory and is worked on by kernels. `DeviceSlots` lies where the engine keeps
its slots; their values never come to the index, which deals in ranges only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.buffers import Batch, Buffer, is_single, read_batch, read_one
from flatradix.ragged import Ragged


class Ranges(NamedTuple):
    """Ranges of the pool: int32 [N] starts and lengths in units, and the sum of the lengths."""

    starts: np.ndarray
    lengths: np.ndarray
    total: int


def _limit(dtype: torch.dtype) -> int:
    return int(torch.iinfo(dtype).max)


def _refuse(value: int, query: int, position: int, dtype: torch.dtype) -> None:
    if value < 0:
        raise ValueError(f"slots of query {query}: {value} at position {position} is negative")
    raise ValueError(
        f"slots of query {query}: {value} at position {position} does not fit the pool's {dtype}; "
        "make the tree with slot_dtype=torch.int64"
    )


class HostSlots:
    """Slots in host memory, int32 or int64 [units]."""

    def __init__(self, units: int, dtype: torch.dtype, kernels: Any) -> None:
        self._kernels = kernels
        self._limit = _limit(dtype)
        self.values = torch.from_numpy(np.zeros(units, np.int64 if dtype == torch.int64 else np.int32))
        self.device = self.values.device
        self._pool = self.values.data_ptr()
        self._wide = dtype == torch.int64

    def read_one(self, slots: Any) -> Buffer:
        """One query's slots, checked."""
        source = read_one(slots, "slots")
        address, count, wide, _ = source
        bad = self._kernels.check_slots_one(address, wide, count, self._limit)
        if bad >= 0:
            _refuse(int(np.asarray(source[3])[bad]), 0, bad, self.values.dtype)
        return source

    def read(self, slots: Any) -> Batch:
        """The slots of a batch, checked."""
        source = read_batch(slots, "slots")
        query, bad = self._kernels.check_slots(source.addresses, source.wide, source.counts, self._limit)
        if query >= 0:
            _refuse(_value_at(slots, query, bad), query, bad, self.values.dtype)
        return source

    def write_one(self, place: int, source: Buffer, skip: int, count: int) -> None:
        self._kernels.write_slots_one(self._pool, self._wide, place, source[0], source[2], skip, count)

    def write(self, places: np.ndarray, source: Batch, skips: np.ndarray, counts: np.ndarray) -> None:
        self._kernels.write_slots(self._pool, self._wide, places, source.addresses, source.wide, skips, counts)

    def gather(self, ranges: Ranges) -> torch.Tensor:
        """The slots of the ranges one after another, int64 [total]."""
        out = np.empty(ranges.total, np.int64)
        self._kernels.gather_slots(self._pool, self._wide, ranges.starts, ranges.lengths, out)
        return torch.from_numpy(out)

    def move(self, sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> None:
        """Follow a compaction: ranges in ascending order, each to a place not above its own."""
        self._kernels.move_slots(self._pool, self._wide, sources, targets, lengths)


def _value_at(slots: Any, query: int, position: int) -> int:
    if isinstance(slots, Ragged):
        return int(slots[query][position])
    return int(slots[query][position]) if not isinstance(slots[0], int | np.integer) else int(slots[position])


class _DeviceSource(NamedTuple):
    """Slots of a batch, one after another on the slot device, and host counts and offsets."""

    values: torch.Tensor
    counts: np.ndarray
    offsets: np.ndarray


class DeviceSlots:
    """Slots on a device of their own, int32 or int64 [units], worked on by torch."""

    def __init__(self, units: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(units, dtype=dtype, device=device)
        self.device = device
        self._limit = _limit(dtype)

    def _checked(self, values: torch.Tensor, counts: np.ndarray) -> _DeviceSource:
        """Raise ValueError if a slot is out of range. Synchronises with the slot device."""
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        if len(values):
            low, high = values.aminmax()
            if int(low) < 0 or int(high) > self._limit:
                bad = int(((values < 0) | (values > self._limit)).nonzero()[0])
                query = int(np.searchsorted(offsets, bad, side="right")) - 1
                _refuse(int(values[bad]), query, bad - int(offsets[query]), self.values.dtype)
        return _DeviceSource(values, counts, offsets)

    def _is_here(self, slots: Any) -> bool:
        """Whether these slots are on the slot device already, and must not visit the host."""
        if not isinstance(slots, torch.Tensor) or slots.device.type == "cpu":
            return False
        return slots.device == self.device and slots.dtype in (torch.int32, torch.int64) and slots.dim() == 1

    def read_one(self, slots: Any) -> tuple[Any, int, bool, _DeviceSource]:
        """One query's slots, checked."""
        source = self.read([slots])
        return None, len(source.values), True, source

    def read(self, slots: Any) -> _DeviceSource:
        """The slots of a batch, checked."""
        if isinstance(slots, Ragged) and self._is_here(slots.values):
            slots.validate()
            return self._checked(slots.values.to(torch.int64), np.diff(slots.offsets.cpu().numpy()))
        if isinstance(slots, list | tuple) and slots and all(self._is_here(part) for part in slots):
            counts = np.array([len(part) for part in slots], dtype=np.int64)
            return self._checked(torch.cat(tuple(slots)).to(torch.int64), counts)
        ragged = (
            slots
            if isinstance(slots, Ragged)
            else Ragged.from_sequences([slots] if is_single(slots) else slots, "slots")
        )
        return self._checked(ragged.values.to(self.device, torch.int64), np.diff(ragged.offsets.cpu().numpy()))

    def write_one(self, place: int, source: tuple[Any, int, bool, _DeviceSource], skip: int, count: int) -> None:
        self.values[place : place + count] = source[3].values[skip : skip + count].to(self.values.dtype)

    def write(self, places: np.ndarray, source: _DeviceSource, skips: np.ndarray, counts: np.ndarray) -> None:
        target = self._indices(places, counts)
        self.values[target] = source.values[self._indices(source.offsets[:-1] + skips, counts)].to(self.values.dtype)

    def _indices(self, starts: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """int64: every unit of the ranges, in order."""
        counts = torch.from_numpy(np.asarray(lengths, np.int64)).to(self.device)
        total = int(np.sum(lengths, dtype=np.int64))
        first = torch.from_numpy(np.asarray(starts, np.int64)).to(self.device) - counts.cumsum(0) + counts
        shift = torch.repeat_interleave(first, counts, output_size=total)
        return torch.arange(total, device=self.device) + shift

    def gather(self, ranges: Ranges) -> torch.Tensor:
        return self.values[self._indices(ranges.starts, ranges.lengths)].to(torch.int64)

    def move(self, sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> None:
        moved = self.values[self._indices(sources, lengths)]
        self.values[: len(moved)] = moved
