"""TableCopy: the page table of a KV cache on a GPU, a copy of that in host memory. A change is one small upload."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flatradix.inputs.devices import interpreted, why_not_cuda
from flatradix.inputs.sequences import address_of
from flatradix.kernels import cpu


class TableCopy:
    """The page table on a device, int32 [R, W].

    On a GPU, one kernel copies all changes of a call to their places. Without Triton, torch does.
    """

    def __init__(self, cache: int, pages: np.ndarray, page_size: int, table: torch.Tensor) -> None:
        """cache: the address of the table of a `Running`. pages: its page table in host memory."""
        self._cache = cache
        self._pages = pages
        self._page_size = page_size
        self._table = table.view(-1)
        self._device = table.device
        self._copy_ranges: Any = None
        if self._device.type == ("cpu" if interpreted() else "cuda") and not why_not_cuda():
            from flatradix.kernels import gpu

            self._copy_ranges = gpu.copy_ranges
            self._arrays = gpu.no_arrays(self._device)
            one = torch.tensor([1, 0, 0], device=self._device)  # compiles now rather than in a later call
            self._scatter(one.view(torch.int32), 1, torch.zeros(1, dtype=torch.int32, device=self._device))

    def send(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        """Copy the pages of tokens `begins` to `ends` of some rows, int64 [B]. Does not wait for the device."""
        if len(rows) == 1:
            self._send_one(int(rows[0]), int(begins[0]), int(ends[0]))
            return
        count, many = cpu.count_changes.call(self._cache, rows, begins, ends), len(rows)
        if count == 0:
            return
        packed = self._pinned(6 * many + count)  # the ranges, then the pages
        address = packed.data_ptr()
        cpu.pack_changes.call(self._cache, rows, begins, ends, address, address + 24 * many)
        sent = packed.to(self._device, non_blocking=True)
        self._scatter(sent[: 6 * many], many, sent[6 * many :])

    def _send_one(self, row: int, begin: int, end: int) -> None:
        first, last = -(-begin // self._page_size), -(-end // self._page_size)
        if first < last:
            packed = self._pinned(last - first)
            packed.numpy()[:] = self._pages[row, first:last]
            at = row * self._pages.shape[1]
            self._table[at + first : at + last].copy_(packed, non_blocking=True)

    def _pinned(self, count: int) -> torch.Tensor:
        """Return int32 [count]. torch uses pinned memory again only when its copy is done."""
        return torch.empty(count, dtype=torch.int32, device="cpu", pin_memory=self._device.type == "cuda")

    def _scatter(self, ranges: torch.Tensor, many: int, pages: torch.Tensor) -> None:
        """Write pages to their ranges of the table. ranges: int32 [6 * B], the halves of what `pack_changes` gives."""
        if self._copy_ranges is None:
            self._table[places_of(ranges.view(torch.int64), len(pages))] = pages
        else:
            addresses = pages.data_ptr(), False, self._table.data_ptr(), False
            self._copy_ranges(self._arrays, ranges.data_ptr(), many, len(pages), *addresses)


def changed_places(cache: int, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the places in the page table of tokens `begins` to `ends` of some rows, int64."""
    count = cpu.count_changes.call(cache, rows, begins, ends)
    ranges, pages = np.empty((3, len(rows)), np.int64), np.empty(count, np.int32)
    cpu.pack_changes.call(cache, rows, begins, ends, address_of(ranges), address_of(pages))
    at, _, shifts = ranges
    return np.arange(count) + np.repeat(shifts, np.diff(at, prepend=0))


def places_of(ranges: torch.Tensor, count: int) -> torch.Tensor:
    """Return where `count` values of ranges go, int64 [count]. ranges: int64 [3 * B], as `copy_ranges` reads them."""
    ends, _, shifts = ranges.view(3, -1)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return torch.arange(count, device=ranges.device) + torch.repeat_interleave(shifts, counts, output_size=count)
