"""DeviceWatch: the places of waiting prompts in a tree on a GPU. One launch looks at all of them again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flatradix.device.index import DeviceIndex
from flatradix.layout import waiting
from flatradix.layout.handles import NO_HANDLE
from flatradix.layout.queries import PlaceAddresses, PromptAddresses, Wants
from flatradix.queue.prompts import Prompts
from flatradix.queue.watch import Watch


class DeviceWatch(Watch):
    """Keeps a copy of the prompts on the device, and there the place of each.

    A look matches every prompt from its place: 10,000 take about 20 us on an H200, and most change nothing.
    """

    def __init__(self, index: DeviceIndex, keep: bool, left: int) -> None:
        self._index = index
        options = index.options
        self.prompts = Prompts(options.page_size, options.bigram, 0, left)
        self._names_seen = -1
        self._pool = torch.empty(0, dtype=torch.int32, device=index.device)
        self._set_entries(0)
        self._order: torch.Tensor | None = None  # the queue's order on the device
        self._read_at: int | None = None  # the index's last call when the host last read the places
        if keep:
            index.keep_for(self)

    def _set_entries(self, entries: int) -> None:
        """Allocate columns for so many entries. Every prompt is matched from the root next."""
        device = self._index.device
        self._begins = torch.zeros(entries, dtype=torch.int64, device=device)
        self._units = torch.zeros(entries, dtype=torch.int32, device=device)
        self._names = torch.full((entries,), -2, dtype=torch.int64, device=device)
        self._handles = torch.full((entries,), NO_HANDLE, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(entries, dtype=torch.int32, device=device)
        self._rows = torch.zeros(entries, dtype=torch.int32, device=device)

    def names_changed(self) -> None:
        self._names_seen = -1

    def close(self) -> None:
        self._index.keep_no_longer(self)

    def order_changed(self) -> None:
        self._order = None

    # Copying prompts to the device

    def _upload(self) -> None:
        """Copy what was added since the last look, and forget what has left."""
        arrays = self.prompts.arrays
        noted = arrays.todo[: arrays.counts[waiting.TODO]].astype(np.int64)
        fresh = noted
        pool = self.prompts.tokens_on_host()
        if len(arrays.id) != len(self._begins):
            self._set_entries(len(arrays.id))
            fresh = self.prompts.entries()
        if len(pool) != len(self._pool):
            self._pool = pool.to(self._index.device)
        else:
            self._copy_tokens(pool, fresh[arrays.id[fresh] >= 0])
        if len(fresh):
            self._copy_columns(fresh)
            self._order = None
        arrays.dirty[noted] = 0
        arrays.counts[waiting.TODO] = 0

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

    def _copy_columns(self, entries: np.ndarray) -> None:
        begins, units, spaces, ids = self.prompts.columns(entries, "start", "units", "space", "id")
        units = np.where(ids >= 0, units, 0)  # of an entry that has left, nothing is matched
        packed = np.stack([entries, begins, units, 2 * self.prompts.arrays.codes[spaces]])
        where, begin, unit, name = torch.from_numpy(packed).to(self._index.device)
        self._begins[where] = begin
        self._units[where] = unit.to(torch.int32)
        self._names[where] = name
        self._handles[where] = NO_HANDLE
        self._lengths[where] = 0

    def _read_codes(self) -> None:
        """Read the tree's code of each namespace. A place in a namespace that lost its code is stale."""
        names = self._index.names()
        version, arrays = names.version, self.prompts.arrays
        for name, space in self.prompts.spaces.items():
            arrays.codes[space] = names.find(name)
        if len(self._names) == len(arrays.id):
            self._names.copy_(torch.from_numpy(2 * arrays.codes[arrays.space]))
        self._names_seen = version

    # Looking

    def _follow(self) -> None:
        if self._index.names().version != self._names_seen:
            self._read_codes()
        self._upload()
        places = PlaceAddresses(self._handles.data_ptr(), self._lengths.data_ptr(), len(self._handles))
        addresses = self._begins.data_ptr(), self._units.data_ptr(), self._names.data_ptr()
        self._index.follow(PromptAddresses(self._pool.data_ptr(), *addresses, places, self._rows.data_ptr()))

    def look(self) -> None:
        nothing_new = self.prompts.arrays.counts[waiting.TODO] == 0 and self._index.last_call == self._read_at
        if nothing_new and self._read_at is not None:
            return
        self._follow()
        self._read_at = self._index.last_call
        found = torch.stack([self._lengths, self._rows]).cpu().numpy()
        arrays: Any = self.prompts.arrays
        arrays.length[:], arrays.row[:] = found

    def wanted(self) -> Wants:
        """Bring the places up to date, on the device alone; return what waiting prompts want."""
        self._follow()
        if self._order is None:
            self._order = torch.from_numpy(self.prompts.in_order()).to(self._index.device)
        return Wants(self._rows.data_ptr(), self._order.data_ptr(), len(self._order))

    def remove(self, ids: np.ndarray) -> None:
        self._order = None
        self.prompts.remove(ids, 0)

    def remove_one(self, number: int) -> bool:
        self._order = None
        return self.prompts.remove_one(number, 0)
