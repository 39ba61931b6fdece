"""Reading: the slots and tokens of places of a tree on a GPU."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch

from flatradix.device.core import Core
from flatradix.device.interrupted import NOTHING_YET
from flatradix.device.results import Awaited
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.inputs.arguments import check_write_table
from flatradix.inputs.places import read_places
from flatradix.inputs.ragged import Ragged
from flatradix.inputs.upload import upload_numbers
from flatradix.kernels import gpu
from flatradix.layout.queries import PlaceAddresses, SlotTable


class Reading(Core):
    """Slots and tokens as a Ragged, or into tables of the caller."""

    @public_call
    def slots(self, places: Any) -> Ragged:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            return self._slots_of(places)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _slots_of(self, places: Any) -> Ragged:
        ragged = self._gather(places, self._pool)
        return ragged if self.options.slot_device is None else ragged.to(self.options.slot_device)

    @public_call
    def tokens(self, places: Any) -> Ragged:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            return self._gather(places, self._state.tokens)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _gather(self, places: Any, pool: torch.Tensor) -> Ragged:
        """Return what a pool has for each unit of each place. Waits for the device."""
        self._refuse_capture()
        late = self._late(places)
        if isinstance(late, Awaited):
            late.length()  # raises the error of a refused key, and waits for that call alone
        else:
            self._finish_all()
        if late is None:
            lengths, handles = read_places(places, self.device)
            handles = handles.contiguous()
            found = PlaceAddresses(handles.data_ptr(), lengths.data_ptr(), len(handles), (handles, lengths))
        else:
            lengths, found = late.own_lengths(), late.places
        offsets = torch.zeros(found.batch + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(lengths.clamp(0, self.options.max_tokens), 0, out=offsets[1:])
        if late is None or late.shown:  # the caller may have changed the lengths
            total = int(offsets[-1])
        else:
            total = late.total()
        values = self._gathered(found, pool, offsets, total)
        self._open = None
        self.busy = FREE
        return Ragged.trusted(values, offsets)

    def _gathered(self, found: PlaceAddresses, pool: torch.Tensor, offsets: torch.Tensor, total: int) -> torch.Tensor:
        """Return `total` values of a pool, those of each place from `offsets` on: int64 [B] or more on the device."""
        self._open = NOTHING_YET
        values = torch.empty(total, dtype=pool.dtype, device=self.device)
        if found.batch:
            self._ensure_scratch(found.batch)
            call = self._calls.next()
            gpu.gather(self._arrays, found, pool, offsets.data_ptr(), values.data_ptr(), total, call)
            self._calls.enqueued(call, False)
            self._finish_all()
        return values

    @public_call
    def path_slots(self, place: Any) -> torch.Tensor:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._refuse_capture()
            late = self._late(place)
            if type(late) is not Awaited or late.shown:
                return self._slots_of(place).values
            values = self._gathered(late.places, self._pool, self._zero, late.length())
            self._open = None
            self.busy = FREE
            where = self.options.slot_device
            return values if where is None else values.to(where)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            found = self._places(places)
            where = self.options.slot_device
            if where is not None and torch.empty(0, device=where).device != self.device:
                raise ValueError(f"write_slots: the slots are returned on {where}, and the tree is not there")
            numbered = check_write_table(table, rows, found.batch, self.device, self.options.slot_dtype)
            if numbered.device != self.device:
                numbered = (
                    upload_numbers(numbered.numpy(), self.device) if numbered.is_cpu else numbered.to(self.device)
                )
            into = SlotTable(table.data_ptr(), table.dtype == torch.int64, table.stride(0), *table.shape)
            self._write(found, numbered, into, False)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def write_pages(self, places: Any, table: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the page of each `page_size` slots of places to rows, int64 [B], of a page table, int32 [R, W].

        All are on the device.
        """
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            height, width = table.shape
            into = SlotTable(table.data_ptr(), False, width, height, width * self.options.page_size)
            self._write(self._places(places), rows, into, True)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _write(self, places: PlaceAddresses, rows: torch.Tensor, table: SlotTable, pages: bool) -> None:
        if places.batch:
            self._open = NOTHING_YET
            self._ensure_scratch(places.batch)
            captured = self._calls.is_capturing()
            call = self._calls.next()
            gpu.write_slots(self._arrays, places, rows.data_ptr(), table, call, pages)
            self._calls.enqueued(call, False, captured)
            self._open = None
        self.busy = FREE
