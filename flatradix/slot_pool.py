"""The slot pool: the KV slot of each cached token, at the place that the token has in the token pool.

`HostSlots` lies beside the index in host memory and is worked on by kernels. `DeviceSlots` lies where the engine keeps
its slots; their values never come to the index, which deals in ranges only.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from flatradix.buffers import Batch, Buffer, is_single, read_batch, read_one
from flatradix.device_input import upload_numbers
from flatradix.layout import committed
from flatradix.outputs import Outputs
from flatradix.ragged import Ragged


class Ranges(NamedTuple):
    """Ranges of the pool: int32 [N] starts and lengths in units, and the sum of the lengths."""

    starts: np.ndarray
    lengths: np.ndarray
    total: int


def _limit(dtype: torch.dtype) -> int:
    return int(torch.iinfo(dtype).max)


def refuse_slot(value: int, query: int, position: int, dtype: torch.dtype) -> NoReturn:
    if value < 0:
        raise ValueError(f"slots of query {query}: {value} at position {position} is negative")
    raise ValueError(
        f"slots of query {query}: {value} at position {position} does not fit the pool's {dtype}; "
        "make the tree with slot_dtype=torch.int64"
    )


class HostSlots:
    """Slots in host memory, int32 or int64 [units]. The insert kernel checks and writes them itself.

    arguments: what that kernel wants to know of the pool: its address, whether it is int64, and the greatest slot.
    """

    def __init__(self, units: int, dtype: torch.dtype, kernels: Any) -> None:
        self._kernels = kernels
        self.values = committed(units, np.int64 if dtype == torch.int64 else np.int32)
        self.device = self.values.device
        self._pool = self.values.data_ptr()
        self._wide = dtype == torch.int64
        self._outputs = Outputs()
        self.arguments = (self._pool, self._wide, _limit(dtype))

    def read_one(self, slots: Any, check: bool = True) -> Buffer:
        """One query's slots; the kernel checks them."""
        return read_one(slots, "slots")

    def read(self, slots: Any, check: bool = True) -> Batch:
        """The slots of a batch; the kernel checks them."""
        return read_batch(slots, "slots")

    def gather(self, ranges: Ranges) -> torch.Tensor:
        """The slots of the ranges one after another, int64 [total]."""
        out = self._outputs.take(ranges.total)
        self._kernels.gather_slots(self._pool, self._wide, ranges.starts, ranges.lengths, out)
        return torch.from_numpy(out)


class DeviceBatch(NamedTuple):
    """Slots of a batch, one after another on the slot device; host counts and offsets. In the place of a `Batch`."""

    addresses: np.ndarray
    counts: np.ndarray
    wide: bool
    values: torch.Tensor
    offsets: np.ndarray


class DeviceSlots:
    """Slots on a device of their own, int32 or int64 [units], worked on by torch once the index has changed."""

    arguments = (0, False, 0)

    def __init__(self, units: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(units, dtype=dtype, device=device)
        self.device = self.values.device  # with its index: torch.device("cuda") is not torch.device("cuda:0")
        self._limit = _limit(dtype)

    def _batch(self, values: torch.Tensor, counts: np.ndarray, check: bool) -> DeviceBatch:
        """With `check`, raise ValueError if a slot is out of range, which synchronises with the slot device."""
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        if check and len(values):
            low, high = values.aminmax()
            if int(low) < 0 or int(high) > self._limit:
                bad = int(((values < 0) | (values > self._limit)).nonzero()[0])
                query = int(np.searchsorted(offsets, bad, side="right")) - 1
                refuse_slot(int(values[bad]), query, bad - int(offsets[query]), self.values.dtype)
        return DeviceBatch(np.zeros(len(counts), np.int64), counts, True, values, offsets)

    def _is_here(self, slots: Any) -> bool:
        """Whether these slots are on the slot device already, and must not visit the host."""
        if not isinstance(slots, torch.Tensor) or slots.device.type == "cpu":
            return False
        return slots.device == self.device and slots.dtype in (torch.int32, torch.int64) and slots.dim() == 1

    def read_one(self, slots: Any, check: bool = True) -> Buffer:
        """One query's slots."""
        source = self.read([slots], check)
        return 0, len(source.values), True, source

    def read(self, slots: Any, check: bool = True) -> DeviceBatch:
        """The slots of a batch. Waits for the slot device with `check`, and where they come as a Ragged there."""
        if isinstance(slots, Ragged) and self._is_here(slots.values):
            slots.validate()
            return self._batch(slots.values.to(torch.int64), np.diff(slots.offsets.cpu().numpy()), check)
        if isinstance(slots, list | tuple) and slots and all(self._is_here(part) for part in slots):
            counts = np.array([len(part) for part in slots], dtype=np.int64)
            return self._batch(torch.cat(tuple(slots)).to(torch.int64), counts, check)
        ragged = (
            slots
            if isinstance(slots, Ragged)
            else Ragged.from_sequences([slots] if is_single(slots) else slots, "slots")
        )
        return self._batch(ragged.values.to(self.device, torch.int64), np.diff(ragged.offsets.cpu().numpy()), check)

    def write_one(self, place: int, source: Buffer, skip: int, count: int) -> None:
        self.values[place : place + count].copy_(source[3].values[skip : skip + count])

    def write(self, places: np.ndarray, source: DeviceBatch, skips: np.ndarray, counts: np.ndarray) -> None:
        # Range by range: nothing is allocated that could fail, now that the index has changed.
        for place, offset, count in zip(places.tolist(), (source.offsets[:-1] + skips).tolist(), counts, strict=True):
            self.values[place : place + count].copy_(source.values[offset : offset + count])

    def _indices(self, starts: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """int64: every unit of the ranges, in order."""
        counts = upload_numbers(lengths, self.device)
        total = int(np.sum(lengths, dtype=np.int64))
        first = upload_numbers(starts, self.device) - counts.cumsum(0) + counts
        shift = torch.repeat_interleave(first, counts, output_size=total)
        return torch.arange(total, device=self.device) + shift

    def gather(self, ranges: Ranges) -> torch.Tensor:
        return self.values[self._indices(ranges.starts, ranges.lengths)].to(torch.int64)

    def move(self, sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> None:
        """Ahead of a compaction, all ranges in ascending order; they end up without gaps."""
        moved = self.values[self._indices(sources, lengths)]
        self.values[: len(moved)] = moved
