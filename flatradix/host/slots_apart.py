"""The slot pool of an index in host memory when the engine keeps its slots on another device.

The index handles only ranges of the pool, never the values of slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.host.slots import EvictionMemory, SlotBatch, SlotPool
from flatradix.inputs.devices import interpreted, why_not_cuda
from flatradix.inputs.ragged import Ragged
from flatradix.inputs.refuse import refuse_slot
from flatradix.inputs.sequences import Buffer, is_batch
from flatradix.inputs.upload import upload_numbers
from flatradix.kernels import cpu

_FEW_RANGES = 64


class Ranges(NamedTuple):
    """Ranges of the pool: int32 [N] starts and lengths in units, and the sum of the lengths."""

    starts: np.ndarray
    lengths: np.ndarray
    total: int


class RangeList(NamedTuple):
    """Memory for the description of N ranges that the copying kernel reads: int64 [3, N], pinned and on the device."""

    pinned: torch.Tensor
    uploaded: torch.Tensor


class ApartBatch(NamedTuple):
    """The slots of a batch, concatenated on the slot device. offsets: int64 [B + 1], where those of each query begin.

    ranges: memory for the ranges that a store writes, one per query; None if torch writes them.
    """

    values: torch.Tensor
    offsets: np.ndarray
    ranges: RangeList | None


class ApartEvictionMemory(EvictionMemory):
    def __init__(self, pool: SlotsApart, before: torch.Tensor | None, most: int, most_ranges: int) -> None:
        self.starts, self.lengths = np.empty((2, most_ranges), np.int32)
        self._slots = pool
        self._before = 0 if before is None else len(before)
        self._out = torch.empty(self._before + most, dtype=pool.values.dtype, device=pool.device)
        self._ranges = pool.range_list(most_ranges) if most_ranges > 1 else None
        if before is not None:
            self._out[: self._before] = before

    def slots(self, tokens: int, ranges: int) -> torch.Tensor:
        out = self._out[: self._before + tokens]
        self._slots.gather_into(
            out[self._before :], Ranges(self.starts[:ranges], self.lengths[:ranges], tokens), self._ranges
        )
        return out


class SlotsApart(SlotPool):
    """Slots on a device of their own, int32 or int64 [units].

    On a GPU, one kernel copies all ranges of a call if there are several. Torch copies a single range. Without a GPU or
    without Triton, torch copies all ranges: a dozen launches to gather, one per query to write, one per node to evict.
    """

    pool = 0
    wide = False
    limit = 0

    def __init__(self, units: int, dtype: torch.dtype, device: torch.device, addresses: int) -> None:
        self._addresses = addresses
        self.values = torch.zeros(units, dtype=dtype, device=device)
        self._limit = int(torch.iinfo(dtype).max)
        self._moved: torch.Tensor | None = None
        self._copy_ranges: Any = None
        if self.device.type == ("cpu" if interpreted() else "cuda") and not why_not_cuda():
            from flatradix.kernels import gpu

            self._copy_ranges = gpu.copy_ranges
            self._arrays = gpu.no_arrays(self.device)
            self._compile()

    def _compile(self) -> None:
        """Launch every variant now. In a later call, the index would have changed before a variant fails to compile."""
        one = Ranges(np.zeros(1, np.int32), np.ones(1, np.int32), 1)
        for kind in (torch.int32, torch.int64):
            other = torch.zeros(1, dtype=kind, device=self.device)
            self._copy(other, one, self.values, 0, self.range_list(1))
            self._copy(self.values, one, other, 0, self.range_list(1))

    def refuse_capture(self) -> None:
        """Raise RuntimeError while a CUDA graph is captured: the graph would hold memory of this call only."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a CUDA graph cannot hold a call of a tree on the CPU: the tree would not change on replay"
            )

    # Reading

    def _batch(self, values: torch.Tensor, counts: np.ndarray, check: bool) -> SlotBatch:
        """Return a batch. With `check`, wait for the slot device and raise QueryError if a slot is out of range."""
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        if check and len(values):
            low, high = values.aminmax()
            if int(low) < 0 or int(high) > self._limit:
                values = values.to(torch.int64)  # int32 cannot be compared with the limit of int64
                bad = int(((values < 0) | (values > self._limit)).nonzero()[0])
                query = int(np.searchsorted(offsets, bad, side="right")) - 1
                refuse_slot(int(values[bad]), query, bad - int(offsets[query]), self.values.dtype)
        ranges = None if self._copy_ranges is None or len(counts) == 1 else self.range_list(len(counts))
        owner = ApartBatch(values.contiguous(), offsets, ranges)
        return SlotBatch(np.zeros(len(counts), np.int64), counts, True, owner)

    def _is_here(self, slots: Any) -> bool:
        """Return whether slots are on the slot device already, and must not pass through the host."""
        if not isinstance(slots, torch.Tensor) or slots.device.type == "cpu":
            return False
        return slots.device == self.device and slots.dtype in (torch.int32, torch.int64) and slots.dim() == 1

    def read_one(self, slots: Any, check: bool) -> Buffer:
        """Return the slots of one query. With `check`, wait for the slot device."""
        owner = self.read(slots if self._is_here(slots) else [slots], check).owner
        return 0, len(owner.values), True, owner

    def read(self, slots: Any, check: bool) -> SlotBatch:
        """Return the slots of a batch. Wait for the slot device with `check`, and for a Ragged on that device."""
        self.refuse_capture()
        if self._is_here(slots):
            return self._batch(slots, np.array([len(slots)]), check)
        if isinstance(slots, Ragged) and self._is_here(slots.values):
            slots.validate()
            return self._batch(slots.values, np.diff(slots.offsets.cpu().numpy()), check)
        if isinstance(slots, list | tuple) and slots and all(self._is_here(part) for part in slots):
            counts = np.array([len(part) for part in slots], dtype=np.int64)
            return self._batch(torch.cat(tuple(slots)), counts, check)
        ragged = slots
        if not isinstance(slots, Ragged):
            ragged = Ragged.from_sequences(slots if is_batch(slots) else [slots], "slots")
        return self._batch(ragged.values.to(self.device, torch.int64), np.diff(ragged.offsets.cpu().numpy()), check)

    # Storing, after the index has changed

    def store_one(self, source: Buffer, begin: int, end: int, start: int) -> None:
        self.values[start : start + end - begin].copy_(source[3].values[begin:end])

    def store(self, source: SlotBatch, begins: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> None:
        batch: ApartBatch = source.owner
        sources = batch.offsets[:-1] + begins
        if batch.ranges is None:
            for start, place, count in zip(starts.tolist(), sources.tolist(), counts.tolist(), strict=True):
                self.values[start : start + count].copy_(batch.values[place : place + count])
            return
        new = counts > 0
        before = np.cumsum(counts[new], dtype=np.int64) - counts[new]
        ranges = Ranges(sources[new], counts[new], int(np.sum(counts, dtype=np.int64)))
        self._copy(batch.values, ranges, self.values, starts[new] - before, batch.ranges)

    # Copying ranges

    def _indices(self, ranges: Ranges) -> torch.Tensor:
        """Return int64 [total]: the pool index of every unit of the ranges, in order."""
        counts = upload_numbers(ranges.lengths, self.device)
        first = upload_numbers(ranges.starts, self.device) - counts.cumsum(0) + counts
        shift = torch.repeat_interleave(first, counts, output_size=ranges.total)
        return torch.arange(ranges.total, device=self.device) + shift

    def range_list(self, ranges: int) -> RangeList:
        pinned = torch.empty((3, ranges), dtype=torch.int64, device="cpu", pin_memory=self.device.type == "cuda")
        return RangeList(pinned, torch.empty((3, ranges), dtype=torch.int64, device=self.device))

    def _copy(
        self, source: torch.Tensor, ranges: Ranges, target: torch.Tensor, shifts: np.ndarray | int, memory: RangeList
    ) -> None:
        """Copy ranges of `source` to `target`, one after another, but each range further on by its shift.

        shifts: one for all ranges, or one per range, [N].
        """
        count = len(ranges.starts)
        if count == 0:
            return
        if count < memory.pinned.shape[1]:  # memory for more ranges; a view costs 1 or 2 us
            memory = RangeList(*(part.view(-1)[: 3 * count].view(3, count) for part in memory))
        ends, starts, places = memory.pinned.numpy()
        np.cumsum(ranges.lengths, out=ends)
        np.subtract(ranges.starts, ends - ranges.lengths, out=starts)
        places[:] = shifts
        memory.uploaded.copy_(memory.pinned, non_blocking=True)
        self._copy_ranges(
            self._arrays, memory.uploaded.data_ptr(), count, ranges.total, source.data_ptr(),
            source.dtype == torch.int64, target.data_ptr(), target.dtype == torch.int64,
        )  # fmt: skip

    def gather_into(self, out: torch.Tensor, ranges: Ranges, memory: RangeList | None) -> None:
        """Copy the slots of the ranges to `out`, one after another.

        Allocates no device memory: `memory` is for at least as many ranges.
        """
        assert ranges.total == len(out)
        if memory is not None and self._copy_ranges is not None:
            self._copy(self.values, ranges, out, 0, memory)
            return
        places = np.cumsum(ranges.lengths) - ranges.lengths
        for place, start, count in zip(places.tolist(), ranges.starts.tolist(), ranges.lengths.tolist(), strict=True):
            out[place : place + count].copy_(self.values[start : start + count])

    def gather(self, ranges: Ranges) -> torch.Tensor:
        """Return the slots of the ranges, one after another, [total]."""
        self.refuse_capture()
        if len(ranges.starts) == 1:
            start = int(ranges.starts[0])
            return self.values[start : start + ranges.total].clone()
        if self._copy_ranges is None:
            return self.values[self._indices(ranges)]
        out = torch.empty(ranges.total, dtype=self.values.dtype, device=self.device)
        self._copy(self.values, ranges, out, 0, self.range_list(len(ranges.starts)))
        return out

    def enlarged(self, units: int) -> torch.Tensor:
        self.refuse_capture()
        values = torch.zeros(units, dtype=self.values.dtype, device=self.device)
        values[: len(self.values)] = self.values
        return values

    # Paths

    def of_place(self, handle: int, length: int) -> torch.Tensor | int:
        starts, lengths = np.empty((2, _FEW_RANGES), np.int32)
        nodes: int = cpu.path_ranges_one.call(self._addresses, handle, length, starts, lengths)
        if nodes > len(starts):
            starts, lengths = np.empty((2, nodes), np.int32)
            nodes = cpu.path_ranges_one.call(self._addresses, handle, length, starts, lengths)
        return nodes if nodes < 0 else self.gather(Ranges(starts[:nodes], lengths[:nodes], length))

    def _of_paths(self, handles: np.ndarray, lengths: np.ndarray) -> tuple[Ranges, np.ndarray] | int:
        """Return the pool ranges of the paths to places, and int64 [B + 1] offsets of their slots; or the reason."""
        total, nodes = cpu.count_paths(self._addresses, handles, lengths)
        if total < 0:
            return int(total)
        starts, counts = np.empty((2, nodes), np.int32)
        cpu.path_ranges(self._addresses, handles, lengths, starts, counts)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Ranges(starts, counts, total), offsets

    def of_places(self, handles: np.ndarray, lengths: np.ndarray) -> Ragged | int:
        found = self._of_paths(handles, lengths)
        if isinstance(found, int):
            return found
        ranges, offsets = found
        return Ragged.trusted(self.gather(ranges), upload_numbers(offsets, self.device))

    def write_rows(self, handles: np.ndarray, lengths: np.ndarray, table: torch.Tensor, rows: np.ndarray) -> int:
        self.refuse_capture()
        found = self._of_paths(handles, lengths)
        if isinstance(found, int):
            return found
        self.write_ranges(*found, table, rows)
        return 0

    def write_ranges(self, ranges: Ranges, offsets: np.ndarray, table: torch.Tensor, rows: np.ndarray) -> None:
        """Write the slots of the ranges to rows of an engine's table. offsets: where the slots of each row begin."""
        if self._copy_ranges is None:
            parts = self.gather(ranges).split(np.diff(offsets).tolist())
            for row, part in zip(rows.tolist(), parts, strict=True):
                table[row, : len(part)] = part
        else:
            begins = np.cumsum(ranges.lengths, dtype=np.int64) - ranges.lengths
            query = np.searchsorted(offsets, begins, side="right") - 1
            shifts = rows[query] * table.stride(0) - offsets[query]
            self._copy(self.values, ranges, table, shifts, self.range_list(len(begins)))

    # EvictionMemory and compaction

    def allocate_eviction(self, before: torch.Tensor | None, most: int, most_ranges: int) -> EvictionMemory:
        self.refuse_capture()
        return ApartEvictionMemory(self, before, most, most_ranges)

    def compact(self, call: int, nodes: int) -> None:
        sources, targets, lengths = np.empty((3, nodes), np.int32)
        cpu.plan_compaction(self._addresses, sources, targets, lengths)
        # Copy all slots aside: the pool may change only after the index has.
        self._moved = self.gather(Ranges(sources, lengths, int(np.sum(lengths, dtype=np.int64))))
        cpu.compact(self._addresses, call, 0, False)
        self.finish_compaction()

    def finish_compaction(self) -> None:
        if self._moved is not None:
            self.values[: len(self._moved)] = self._moved
            self._moved = None
