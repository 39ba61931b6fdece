"""Locking: lock_ref of the nodes of a tree on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch

from flatradix.device import interrupted
from flatradix.device.core import Core
from flatradix.device.results import Awaited, OnDevice
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.inputs.places import read_places, refuse_shared_handles
from flatradix.kernels import gpu
from flatradix.layout.queries import (
    PlaceAddresses,
)


class Locking(Core):
    """Lock, unlock, split."""

    @public_call
    def lock(self, places: Any) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            late = getattr(places, "late", None)
            if type(late) is Awaited and late.device is self.device:  # the quick way, for the result of one key
                calls, place = self._calls, late.places
                self._note_locks(1, "lock")
                call, stream, captured = calls.begin()
                self._open = interrupted.LOCK, call, self._changes, place
                gpu.lock_one(self._arrays, place, call, stream)
                calls.enqueued(call, True, captured)
                late.forget_handle()
                self._changes += 1
                self._open = None
                self.busy = FREE
            else:
                self._renew(places, self._lock)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def split(self, places: Any) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._renew(places, self._split)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _renew(self, places: Any, operation: Callable[[PlaceAddresses], None]) -> None:
        """Run an operation that may renew the handles of places, and write the new handles back."""
        late = self._late(places)
        if late is not None:
            operation(late.places)
            late.forget_handle()
        else:
            lengths, handles = read_places(places, self.device)
            refuse_shared_handles(handles)
            renewed = handles.contiguous()
            operation(PlaceAddresses(renewed.data_ptr(), lengths.data_ptr(), len(handles), (lengths, renewed)))
            if renewed is not handles:
                with torch.inference_mode(handles.is_inference()):  # else torch refuses to write to such a tensor
                    handles.copy_(renewed)
        self._changes += 1
        self._open = None
        self.busy = FREE

    def _lock(self, places: PlaceAddresses) -> None:
        batch = places.batch
        if batch:
            if batch > self._arrays.batch:
                self._ensure_scratch(batch)
            self._note_locks(batch, "lock")
            call, _stream, captured = self._calls.begin()
            self._open = interrupted.LOCK, call, self._changes, places
            gpu.lock(self._arrays, places, call)
            self._calls.enqueued(call, True, captured)

    def _unlock(self, places: PlaceAddresses) -> None:
        """Unlock places without a record of how to undo it: `_open` still describes the lock that this call removes."""
        if places.batch:
            self._ensure_scratch(places.batch)
            call, _stream, captured = self._calls.begin()
            gpu.unlock(self._arrays, places, call)
            self._calls.enqueued(call, True, captured)

    def _split(self, places: PlaceAddresses) -> None:
        self._lock(places)
        self._unlock(places)

    @public_call
    def unlock(self, places: Any) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            late = getattr(places, "late", None)
            found = late.places if isinstance(late, OnDevice) and late.device is self.device else self._places(places)
            batch = found.batch
            if batch == 0:
                self.busy = FREE
                return
            if batch > self._arrays.batch:
                self._ensure_scratch(batch)
            calls = self._calls
            call, stream, captured = calls.begin()
            self._open = interrupted.UNLOCK, call, self._changes, found
            if batch == 1:
                gpu.unlock_one(self._arrays, found, call, stream)
            else:
                gpu.unlock(self._arrays, found, call)
            calls.enqueued(call, True, captured)
            self._changes += 1
            self._open = None
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise
