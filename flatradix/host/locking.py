"""Locking: lock_ref of the nodes of a tree in host memory."""

from __future__ import annotations

from threading import get_ident
from typing import Any

from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.host.core import NOTHING_TO_UNDO, Core
from flatradix.inputs.places import contiguous, read_places, refuse_shared_handles
from flatradix.kernels import cpu
from flatradix.kernels.cpu import lock_one, unlock_one


class Locking(Core):
    """Lock, unlock, split."""

    @public_call
    def lock(self, places: Any) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            try:
                late = places.late
            except AttributeError:  # not a result of this library; isinstance would take longer
                late = True
            if late is None:
                self._open = call = self._calls = self._calls + 1
                handle = lock_one.call(self._addresses, call, places.handle, places.length)
                if handle < 0:
                    self._refuse("lock", handle)
                places.handle = handle
                self._open = 0
                self.busy = FREE
                return
            lengths, handles = read_places(places)
            refuse_shared_handles(handles)
            renewed = contiguous(handles)
            call = self._begin(renewed.numpy().copy(), kept := lengths.numpy().copy(), kept)
            reason = cpu.lock(self._addresses, call, renewed.numpy(), lengths.numpy())
            if reason < 0:
                self._refuse("lock", reason)
            if renewed is not handles:
                handles.numpy()[:] = renewed.numpy()
            self._open = 0
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def unlock(self, places: Any) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            try:
                late = places.late
            except AttributeError:  # not a result of this library; isinstance would take longer
                late = True
            if late is None:
                self._open = call = self._calls = self._calls + 1
                reason = unlock_one.call(self._addresses, call, places.handle, places.length)
            else:
                lengths, handles = (contiguous(tensor).numpy() for tensor in read_places(places))
                call = self._begin(handles.copy(), kept := lengths.copy(), kept)
                reason = cpu.unlock(self._addresses, call, handles, lengths)
            if reason < 0:
                self._refuse("unlock", reason)
            self._open = 0
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def split(self, places: Any) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            lengths, handles = read_places(places)
            refuse_shared_handles(handles)
            renewed = contiguous(handles)
            self._open = NOTHING_TO_UNDO  # a split is not undone
            reason = cpu.split(self._addresses, renewed.numpy(), lengths.numpy())
            if reason < 0:
                self._refuse("split", reason)
            if renewed is not handles:
                handles.numpy()[:] = renewed.numpy()
            self._open = 0
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise
