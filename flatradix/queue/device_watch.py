"""DeviceWatch: the places of waiting prompts in a tree on a GPU. One launch looks at all of them again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.device.index import DeviceIndex
from flatradix.device.mailbox import abandon
from flatradix.kernels import cpu
from flatradix.layout import waiting
from flatradix.layout.handles import NO_HANDLE
from flatradix.layout.queries import PromptAddresses, Wants
from flatradix.queue.prompts import Prompts
from flatradix.queue.watch import Watch


class Columns(NamedTuple):
    """What the device knows of each entry of a queue, [W] or [2, W]: as `PromptAddresses`, in tensors."""

    begins: torch.Tensor
    units: torch.Tensor
    names: torch.Tensor
    handles: torch.Tensor
    lengths: torch.Tensor
    rows: torch.Tensor
    told: torch.Tensor


def _columns(entries: int, device: torch.device) -> Columns:
    """Return columns for so many entries. Every prompt is matched from the root next."""
    wide = torch.zeros(entries, dtype=torch.int64, device=device)
    units, rows = (torch.zeros(entries, dtype=torch.int32, device=device) for _ in range(2))
    handles = torch.full((2, entries), NO_HANDLE, dtype=torch.int64, device=device)
    lengths = torch.zeros(2, entries, dtype=torch.int32, device=device)
    told = torch.zeros(2, entries, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
    return Columns(wide, units, wide - 1, handles, lengths, rows, told)


class DeviceWatch(Watch):
    """Keeps a copy of the prompts on the device, and there the place of each.

    A look matches every prompt from its place in one launch, which writes what has changed to pinned memory.
    """

    def __init__(self, index: DeviceIndex, keep: bool, left: int) -> None:
        self._index = index
        options = index.options
        self.prompts = Prompts(options.page_size, options.bigram, 0, left)
        self._names_seen = -1, -1
        self._pool = torch.empty(0, dtype=torch.int32, device=index.device)
        self._entries = _columns(0, index.device)
        self._addresses = PromptAddresses(0, 0, 0, 0, 0, 0, 0, 0, 0)
        self._order: torch.Tensor | None = None  # the queue's order on the device
        self._read_at: int | None = None  # the index's last call when the host last read the places
        if keep:
            index.keep_for(self)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing() and hasattr(self, "_entries"):
            abandon(self._index.mailbox, self._entries.told)

    def order_changed(self) -> None:
        self._order = None

    def close(self) -> None:
        self._index.keep_no_longer(self)

    # Copying prompts to the device

    def _upload(self) -> None:
        """Copy what was added since the last look, and forget what has left. What is cut short is done again."""
        arrays = self.prompts.arrays
        fresh = arrays.todo[: arrays.counts[waiting.TODO]].astype(np.int64)
        pool, entries = self.prompts.tokens_on_host(), self._entries
        if len(arrays.id) != len(entries.begins):
            entries, fresh = _columns(len(arrays.id), self._index.device), self.prompts.entries()
        if len(pool) != len(self._pool):
            self._pool = pool.to(self._index.device)
        else:
            self._copy_tokens(pool, fresh[arrays.id[fresh] >= 0])
        if len(fresh):
            self._copy_columns(fresh, entries)
            self._order = None
        if entries is not self._entries:
            abandon(self._index.mailbox, self._entries.told)
            self._entries = entries
        begins, units, names, handles, lengths, rows, told = (column.data_ptr() for column in entries)
        self._addresses = PromptAddresses(
            self._pool.data_ptr(), begins, units, names, handles, lengths, rows, told, len(entries.begins)
        )
        cpu.clear_todo(self.prompts.address)

    def _copy_tokens(self, pool: torch.Tensor, entries: np.ndarray) -> None:
        """Copy the tokens of some prompts. Prompts that were added together mostly lie one behind the other."""
        entries = entries[np.argsort(self.prompts.arrays.start[entries])]
        begins, counts = self.prompts.columns(entries, "start", "tokens")
        page = self._index.options.page_size
        ends = begins + -(-counts.astype(np.int64) // page) * page
        apart = np.flatnonzero(begins[1:] != ends[:-1]) + 1
        for part in np.split(np.arange(len(entries)), apart) if len(entries) else ():
            begin, end = int(begins[part[0]]), int(ends[part[-1]])
            self._pool[begin:end].copy_(pool[begin:end], non_blocking=True)

    def _copy_columns(self, entries: np.ndarray, target: Columns) -> None:
        begins, units, spaces, ids = self.prompts.columns(entries, "start", "units", "space", "id")
        units = np.where(ids >= 0, units, 0)  # of an entry that has left, nothing is matched
        packed = np.stack([entries, begins, units, self.prompts.arrays.codes[spaces]])
        where, begin, unit, name = torch.from_numpy(packed).to(self._index.device)
        target.begins[where] = begin
        target.units[where] = unit.to(torch.int32)
        target.names[where] = name
        target.handles[:, where] = NO_HANDLE

    def _read_codes(self) -> None:
        """Read the tree's code of each namespace. A place in a namespace that lost its code is stale."""
        names, prompts = self._index.names(), self.prompts
        seen, arrays = (names.version, prompts.names_version), prompts.arrays
        for space, name in prompts.names().items():
            arrays.codes[space] = names.find(name)
        if len(self._entries.names) == len(arrays.id):
            self._entries.names.copy_(torch.from_numpy(arrays.codes[arrays.space]))
        self._names_seen = seen

    # Looking

    def _follow(self) -> None:
        if (self._index.names().version, self.prompts.names_version) != self._names_seen:
            self._read_codes()
            self._read_at = None
        arrays = self.prompts.arrays
        if arrays.counts[waiting.TODO] or len(arrays.id) != self._addresses.capacity:
            self._upload()
        self._index.follow(self._addresses, int(arrays.counts[waiting.ENTRIES]))

    def look(self) -> None:
        known = (self._index.names().version, self.prompts.names_version) == self._names_seen
        arrays: Any = self.prompts.arrays
        if known and arrays.counts[waiting.TODO] == 0 and self._read_at == self._index.last_call is not None:
            return
        self._follow()
        call = self._index.last_call
        self._index.wait()
        used = int(arrays.counts[waiting.ENTRIES])
        arrays.length[:used], arrays.row[:used] = self._entries.told[:, :used].numpy()
        self._read_at = call

    def wanted(self) -> Wants:
        """Bring the places up to date within an eviction, on the device alone; return what waiting prompts want."""
        self._follow()
        if self._order is None:
            self._order = torch.from_numpy(self.prompts.in_order()).to(self._index.device)
        return Wants(self._entries.rows.data_ptr(), self._order.data_ptr(), len(self._order))

    def remove(self, ids: np.ndarray) -> None:
        self._order = None
        self.prompts.remove(ids, 0)

    def remove_one(self, number: int) -> bool:
        self._order = None
        return self.prompts.remove_one(number, 0)
