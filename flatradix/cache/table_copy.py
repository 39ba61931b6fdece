"""TableCopy: the page table of a KV cache on a GPU, a copy of that in host memory. Each change is one small upload."""

from __future__ import annotations

import numpy as np
import torch

from flatradix.inputs.upload import upload
from flatradix.kernels import cpu

# CUDA copies so many bytes of pageable memory aside before the call returns, so they need no pinned memory.
_STAGED = 1 << 16


def pack(
    cache: int, page: int, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the places in the page table, int64 [K], and the pages there, int32 [K], of tokens of some rows.

    cache: the address of the table of a `Running`.
    """
    most = int((ends - begins).sum()) // page + 2 * len(rows)
    where, pages = np.empty(most, np.int64), np.empty(most, np.int32)
    count = cpu.pack_changes(cache, rows, begins, ends, where, pages)
    return where[:count], pages[:count]


class TableCopy:
    """The page table on a device. source: int32 [R, W] in host memory. target: its copy."""

    def __init__(self, source: np.ndarray, target: torch.Tensor) -> None:
        self._source, self._target = torch.from_numpy(source).view(-1), target.view(-1)
        self._width = source.shape[1]

    def send(self, cache: int, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray, page: int) -> None:
        """Copy the pages of tokens of some rows. `cache`, `rows`, `begins`, `ends`, `page`: as for `pack`."""
        if len(rows) == 1:
            first = int(rows[0]) * self._width
            begin, end = first - (-int(begins[0]) // page), first - (-int(ends[0]) // page)
            if end - begin <= _STAGED // 4:
                self._target[begin:end].copy_(self._source[begin:end], non_blocking=True)
                return
        where, pages = pack(cache, page, rows, begins, ends)
        if len(where) == 0:
            return
        count = len(where)
        both = np.empty(3 * count, np.int32)
        both[: 2 * count] = where.view(np.int32)
        both[2 * count :] = pages
        values = torch.from_numpy(both)
        device = self._target.device
        sent = values.to(device, non_blocking=True) if values.nbytes <= _STAGED else upload(values, device)
        self._target.index_copy_(0, sent[: 2 * count].view(torch.int64), sent[2 * count :])
