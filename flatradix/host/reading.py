"""Reading: the slots and tokens of places of a tree in host memory."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import numpy as np
import torch

from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.host.core import NOTHING_TO_UNDO, Core
from flatradix.inputs.arguments import check_write_table
from flatradix.inputs.places import contiguous, read_places
from flatradix.inputs.ragged import Ragged
from flatradix.inputs.sequences import address_of
from flatradix.inputs.upload import upload_numbers
from flatradix.kernels import cpu
from flatradix.results import (
    Places,
)


class Reading(Core):
    """Slots and tokens as a Ragged, or into tables of the caller."""

    @public_call
    def slots(self, places: Any) -> Ragged:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            if isinstance(places, Places) and places.late is None:
                values = self._slots_of(places.handle, places.length)
                return Ragged.trusted(values, upload_numbers(np.array([0, len(values)]), values.device))
            lengths, handles = read_places(places)
            self._open = NOTHING_TO_UNDO
            found = self._slots.of_places(contiguous(handles).numpy(), lengths.numpy())
            if isinstance(found, int):
                self._refuse("slots", found)
            self._open = 0
            self.busy = FREE
            return found
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def tokens(self, places: Any) -> Ragged:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            lengths, handles = (contiguous(tensor).numpy() for tensor in read_places(places))
            self._open = NOTHING_TO_UNDO
            total, _nodes = cpu.count_paths(self._addresses, handles, lengths)
            if total < 0:
                self._refuse("tokens", total)
            out, offsets = np.empty(total, np.int32), np.zeros(len(lengths) + 1, np.int64)
            np.cumsum(lengths, out=offsets[1:])
            tokens = self._state.tokens.data_ptr()
            cpu.path_slots(self._addresses, handles, lengths, tokens, False, address_of(out))
            self._open = 0
            self.busy = FREE
            return Ragged.trusted(torch.from_numpy(out), torch.from_numpy(offsets))
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def path_slots(self, place: Any) -> torch.Tensor:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            return self._slots_of(place.handle, place.length)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _slots_of(self, handle: int, length: int) -> torch.Tensor:
        self._open = NOTHING_TO_UNDO
        found = self._slots.of_place(handle, length)
        if isinstance(found, int):
            self._refuse("slots", found)
        self._open = 0
        self.busy = FREE
        return found

    @public_call
    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            lengths, handles = (contiguous(tensor).numpy() for tensor in read_places(places))
            pool = self._slots
            pool.refuse_capture()  # before rows on a GPU are copied
            numbered = check_write_table(table, rows, len(handles), pool.device, self.options.slot_dtype).cpu().numpy()
            self._open = NOTHING_TO_UNDO
            reason = cpu.write_slots(
                self._addresses, handles, lengths, numbered, pool.pool, pool.wide, table.data_ptr(),
                table.dtype == torch.int64, table.stride(0), *table.shape,
            )  # fmt: skip
            reason = reason or pool.write_rows(handles, lengths, table, numbered)
            if reason < 0:
                self._refuse("write_slots", reason)
            self._open = 0
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise
