"""The slot pool: the KV slot of each cached token, at the place that the token has in the token pool.

`HostSlots` lies beside the index in host memory and is worked on by kernels. `DeviceSlots` lies where the engine keeps
its slots; their values never come to the index, which deals in ranges only.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from flatradix import backend
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

    def gather(self, ranges: Ranges, room: Room | None = None) -> torch.Tensor:
        """The slots of the ranges one after another, int64 [total]."""
        out = self._outputs.take(ranges.total)
        self._kernels.gather_slots(self._pool, self._wide, ranges.starts, ranges.lengths, out)
        return torch.from_numpy(out)


RangeTable = tuple[torch.Tensor, ...]  # int64 [3, N], of what a kernel is told of N ranges: pinned, and uploaded


class Room(NamedTuple):
    """Memory on the slot device: int64 [N] for slots, and a table for ranges, None where torch copies one by one."""

    out: torch.Tensor
    table: RangeTable | None


class DeviceBatch(NamedTuple):
    """Slots of a batch, one after another on the slot device; host counts and offsets. In the place of a `Batch`.

    table: for the ranges that will be written, one a query; None where torch writes them.
    """

    addresses: np.ndarray
    counts: np.ndarray
    wide: bool
    values: torch.Tensor
    offsets: np.ndarray
    table: RangeTable | None


class DeviceSlots:
    """Slots on a device of their own, int32 or int64 [units], worked on once the index has changed.

    On a GPU a kernel copies all ranges of a call at once, where there are several. Torch copies single ranges, and all
    of them elsewhere and where Triton is missing, with a dozen launches to gather, one a query to write, one a node to
    evict.
    """

    arguments = (0, False, 0)
    longest = 0  # units that an insert has written for one query: no node has more

    def __init__(self, units: int, dtype: torch.dtype, device: torch.device) -> None:
        self.values = torch.zeros(units, dtype=dtype, device=device)
        self.device = self.values.device  # with its index: torch.device("cuda") is not torch.device("cuda:0")
        self._limit = _limit(dtype)
        self._kernels: Any = None
        if self.device.type == ("cpu" if backend.interpreted() else "cuda") and not backend.why_not_cuda():
            self._kernels = backend.kernels_for(torch.device("cuda"))
            self._bound = self._kernels.bind_no_tree(self.device)
            self._compile()

    def _compile(self) -> None:
        """Launch every variant, now: later the index has changed before it would turn out that one does not compile."""
        one = Ranges(np.zeros(1, np.int32), np.ones(1, np.int32), 1)
        for kind in (torch.int32, torch.int64):
            other = torch.zeros(1, dtype=kind, device=self.device)
            self._copy(other, one, self.values, 0, self._range_table(1))
            if kind in (torch.int64, self.values.dtype):
                self._copy(self.values, one, other, 0, self._range_table(1))

    def refuse_capture(self) -> None:
        """RuntimeError while a CUDA graph is captured, which would hold memory that is used for this call only."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph cannot hold a call of a tree on the CPU: the tree would not change on replay"
            )

    def _batch(self, values: torch.Tensor, counts: np.ndarray, check: bool) -> DeviceBatch:
        """With `check`, raise ValueError if a slot is out of range, which synchronises with the slot device."""
        self.refuse_capture()
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        if check and len(values):
            low, high = values.aminmax()
            if int(low) < 0 or int(high) > self._limit:
                values = values.to(torch.int64)  # int32 cannot be compared with the limit of int64
                bad = int(((values < 0) | (values > self._limit)).nonzero()[0])
                query = int(np.searchsorted(offsets, bad, side="right")) - 1
                refuse_slot(int(values[bad]), query, bad - int(offsets[query]), self.values.dtype)
        table = None if self._kernels is None or len(counts) == 1 else self._range_table(len(counts))
        return DeviceBatch(np.zeros(len(counts), np.int64), counts, True, values.contiguous(), offsets, table)

    def _is_here(self, slots: Any) -> bool:
        """Whether these slots are on the slot device already, and must not visit the host."""
        if not isinstance(slots, torch.Tensor) or slots.device.type == "cpu":
            return False
        return slots.device == self.device and slots.dtype in (torch.int32, torch.int64) and slots.dim() == 1

    def read_one(self, slots: Any, check: bool = True) -> Buffer:
        """One query's slots; waits for the slot device with `check`."""
        source = self.read(slots if self._is_here(slots) else [slots], check)
        return 0, len(source.values), True, source

    def read(self, slots: Any, check: bool = True) -> DeviceBatch:
        """The slots of a batch. Waits for the slot device with `check`, and where they come as a Ragged there."""
        if self._is_here(slots):
            return self._batch(slots, np.array([len(slots)]), check)
        if isinstance(slots, Ragged) and self._is_here(slots.values):
            slots.validate()
            return self._batch(slots.values, np.diff(slots.offsets.cpu().numpy()), check)
        if isinstance(slots, list | tuple) and slots and all(self._is_here(part) for part in slots):
            counts = np.array([len(part) for part in slots], dtype=np.int64)
            return self._batch(torch.cat(tuple(slots)), counts, check)
        ragged = (
            slots
            if isinstance(slots, Ragged)
            else Ragged.from_sequences([slots] if is_single(slots) else slots, "slots")
        )
        return self._batch(ragged.values.to(self.device, torch.int64), np.diff(ragged.offsets.cpu().numpy()), check)

    def write_one(self, place: int, source: Buffer, skip: int, count: int) -> None:
        self.longest = max(self.longest, count)
        self.values[place : place + count].copy_(source[3].values[skip : skip + count])

    def write(self, places: np.ndarray, source: DeviceBatch, skips: np.ndarray, counts: np.ndarray) -> None:
        # Nothing is allocated or compiled that could fail, now that the index has changed.
        self.longest = max(self.longest, int(counts.max(initial=0)))
        starts = source.offsets[:-1] + skips
        if source.table is None:
            for place, start, count in zip(places.tolist(), starts.tolist(), counts.tolist(), strict=True):
                self.values[place : place + count].copy_(source.values[start : start + count])
            return
        new = counts > 0
        before = np.cumsum(counts[new], dtype=np.int64) - counts[new]
        ranges = Ranges(starts[new], counts[new], int(np.sum(counts, dtype=np.int64)))
        self._copy(source.values, ranges, self.values, places[new] - before, source.table)

    def _indices(self, starts: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """int64: every unit of the ranges, in order."""
        counts = upload_numbers(lengths, self.device)
        total = int(np.sum(lengths, dtype=np.int64))
        first = upload_numbers(starts, self.device) - counts.cumsum(0) + counts
        shift = torch.repeat_interleave(first, counts, output_size=total)
        return torch.arange(total, device=self.device) + shift

    def _range_table(self, ranges: int) -> RangeTable:
        pinned = torch.empty((3, ranges), dtype=torch.int64, device="cpu", pin_memory=self.device.type == "cuda")
        return pinned, torch.empty((3, ranges), dtype=torch.int64, device=self.device)

    def _copy(
        self, source: torch.Tensor, ranges: Ranges, target: torch.Tensor, shifts: np.ndarray | int, table: RangeTable
    ) -> None:
        """Ranges of `source`, one after another into the memory of `target`, each `shifts` [N] further on than that."""
        count = len(ranges.starts)
        if count == 0:
            return
        if count < table[0].shape[1]:  # a table for more; a view costs a microsecond or two
            table = tuple(part.view(-1)[: 3 * count].view(3, count) for part in table)
        pinned, uploaded = table
        ends, starts, places = pinned.numpy()
        np.cumsum(ranges.lengths, out=ends)
        np.subtract(ranges.starts, ends - ranges.lengths, out=starts)
        places[:] = shifts
        uploaded.copy_(pinned, non_blocking=True)
        self._kernels.copy_ranges(
            self._bound, uploaded.data_ptr(), count, ranges.total, source.data_ptr(), source.dtype == torch.int64,
            target.data_ptr(), target.dtype == torch.int64,
        )  # fmt: skip

    def room_for(self, wanted: int, evictable: int, nodes: int) -> Room:
        """What an eviction needs of memory here, at most, before it changes the index: its slots must not be lost.

        It frees less than one node more than is wanted.
        """
        out = torch.empty(min(wanted + self.longest, evictable), dtype=torch.int64, device=self.device)
        return Room(out, None if self._kernels is None or nodes < 2 else self._range_table(nodes))

    def _gather_into(self, ranges: Ranges, room: Room) -> torch.Tensor:
        """Without asking for memory."""
        assert ranges.total <= len(room.out)
        out = room.out[: ranges.total]
        if room.table is not None:
            self._copy(self.values, ranges, out, 0, room.table)
            return out
        places = np.cumsum(ranges.lengths) - ranges.lengths
        for place, start, count in zip(places.tolist(), ranges.starts.tolist(), ranges.lengths.tolist(), strict=True):
            out[place : place + count].copy_(self.values[start : start + count])
        return out

    def gather(self, ranges: Ranges, room: Room | None = None) -> torch.Tensor:
        """The slots of the ranges one after another, int64 [total], in the memory of `room` if there is one."""
        if room is not None:
            return self._gather_into(ranges, room)
        self.refuse_capture()
        if len(ranges.starts) == 1:
            start = int(ranges.starts[0])
            return self.values[start : start + ranges.total].to(torch.int64, copy=True)
        if self._kernels is None:
            return self.values[self._indices(ranges.starts, ranges.lengths)].to(torch.int64)
        out = torch.empty(ranges.total, dtype=torch.int64, device=self.device)
        self._copy(self.values, ranges, out, 0, self._range_table(len(ranges.starts)))
        return out

    def write_rows(self, ranges: Ranges, offsets: np.ndarray, table: torch.Tensor, rows: np.ndarray) -> None:
        """Write slots into rows of a table: those of query i, `offsets[i]` to `offsets[i + 1]`, from the left on."""
        self.refuse_capture()
        if self._kernels is None:
            parts = self.gather(ranges).split(np.diff(offsets).tolist())
            for row, part in zip(rows.tolist(), parts, strict=True):
                table[row, : len(part)] = part
        else:
            begins = np.cumsum(ranges.lengths, dtype=np.int64) - ranges.lengths
            query = np.searchsorted(offsets, begins, side="right") - 1
            shifts = rows[query] * table.stride(0) - offsets[query]
            self._copy(self.values, ranges, table, shifts, self._range_table(len(begins)))

    def move(self, sources: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> None:
        """Ahead of a compaction, all ranges in ascending order; they end up without gaps."""
        moved = self.gather(Ranges(sources, lengths, int(np.sum(lengths, dtype=np.int64))))
        self.values[: len(moved)] = moved
