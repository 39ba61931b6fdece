"""Pinning: what a waiting queue and soft pins want of a tree in host memory."""

from __future__ import annotations

from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.host.core import Core
from flatradix.inputs.namespaces import Namespaces
from flatradix.inputs.options import Options
from flatradix.inputs.places import contiguous, read_places, refuse_shared_handles
from flatradix.inspect.content import Paths
from flatradix.kernels import cpu
from flatradix.layout import numbers
from flatradix.pins import read_ends


class Watched(NamedTuple):
    """What a waiting queue reads of an index. addresses: of its address table. numbers: `TreeState.numbers`.

    Both stay when the tree grows; then ROW_CAPACITY is another number.
    """

    addresses: int
    numbers: memoryview
    namespaces: Namespaces
    options: Options


class Pinning(Core):
    """Want, unwant, expire, and what a waiting queue asks."""

    @public_call
    def alive(self, places: Any) -> torch.Tensor:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            lengths, handles = read_places(places)
            found = self.are_alive(contiguous(handles).numpy(), lengths.numpy())
            self.busy = FREE
            return torch.from_numpy(found)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def are_alive(self, handles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        found = np.empty(len(handles), np.bool_)
        cpu.alive(self._addresses, handles, lengths, found)
        return found

    def read_own_wants(self) -> np.ndarray:
        found: np.ndarray = self._arrays.own_wants[: self._numbers[numbers.ROWS]]
        return found

    @public_call
    def want(self, places: Any, until: Any = None) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            lengths, handles = read_places(places)
            refuse_shared_handles(handles)
            ends = None if until is None else read_ends(until, len(handles))
            renewed = contiguous(handles)
            self._check_budget(renewed.numpy(), lengths.numpy())
            call = self._begin(renewed.numpy().copy(), kept := lengths.numpy().copy(), kept)
            reason = cpu.want(self._addresses, call, renewed.numpy(), lengths.numpy())
            if reason < 0:
                self._refuse("want", reason)
            if renewed is not handles:
                handles.numpy()[:] = renewed.numpy()
            if ends is not None:
                self._replace_pins(self._pins.with_more(renewed.numpy(), kept, ends), call)
            self._open = 0
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def unwant(self, places: Any, until: Any = None) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            lengths, handles = (contiguous(tensor).numpy() for tensor in read_places(places))
            left = None if until is None and self._pins.size == 0 else self._pins_left(handles, lengths, until)
            call = self._begin(handles.copy(), kept := lengths.copy(), kept)
            reason = cpu.unwant(self._addresses, call, handles, lengths)
            if reason < 0:
                self._refuse("unwant", reason)
            if left is not None:
                self._replace_pins(left, call)
            self._open = 0
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def expire(self, now: Any) -> int:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            over, left = self._pins_at(now)
            if over.size:
                call = self._begin(over.handles, over.lengths, over.lengths)
                reason = cpu.unwant(self._addresses, call, over.handles, over.lengths)
                assert reason == 0, "a pin with an end is not counted at its node"
                self._replace_pins(left, call)
                self._open = 0
            else:
                self._pins = left
            self.busy = FREE
            return over.size
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    # Waiting queues

    def read_paths(self) -> Paths:
        s, rows = self._arrays, self._numbers[numbers.ROWS]
        sizes = self._numbers[numbers.EVICTABLE], self._numbers[numbers.PROTECTED]
        return Paths(s.parent[:rows], s.length[:rows], s.end[:rows], s.lock_ref[:rows], *sizes)

    @property
    def watched(self) -> Watched:
        """What a waiting queue needs to watch this index."""
        return Watched(self._addresses, self._numbers, self._namespaces, self.options)
