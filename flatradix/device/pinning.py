"""Pinning: what a waiting queue and soft pins want of a tree on a GPU."""

from __future__ import annotations

from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.device import interrupted
from flatradix.device.interrupted import OpenCall
from flatradix.device.locking import Locking
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.inputs.namespaces import Namespaces
from flatradix.inputs.places import read_places
from flatradix.inspect.content import Paths
from flatradix.kernels import gpu
from flatradix.layout import mail, numbers
from flatradix.layout.queries import (
    PlaceAddresses,
    PromptAddresses,
)
from flatradix.pins import Pins, read_ends


class _Found(NamedTuple):
    """Places on the device, for a call to read."""

    lengths: torch.Tensor
    handles: torch.Tensor


class Pinning(Locking):
    """Want, unwant, expire, and what a waiting queue asks."""

    @public_call
    def alive(self, places: Any) -> torch.Tensor:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            found = self._alive(self._places(places))
            self.busy = FREE
            return found
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _alive(self, places: PlaceAddresses) -> torch.Tensor:
        out = torch.zeros(places.batch, dtype=torch.int32, device=self.device)
        if places.batch:
            gpu.alive(self._arrays, places, out.data_ptr())
        return out != 0

    def are_alive(self, handles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._alive(self._brought(handles, lengths)).cpu().numpy()
        return found

    def read_own_wants(self) -> np.ndarray:
        found: np.ndarray = self._state.own_wants[: int(self._state.numbers[numbers.ROWS])].cpu().numpy()
        return found

    def _brought(self, handles: np.ndarray, lengths: np.ndarray) -> PlaceAddresses:
        """Bring places in host memory to the device."""
        owner = torch.from_numpy(lengths).to(self.device), torch.from_numpy(handles).to(self.device)
        return PlaceAddresses(owner[1].data_ptr(), owner[0].data_ptr(), len(handles), owner)

    def _read(self, places: Any) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the device. Return the handles and lengths of places, copied to the host."""
        self._finish_all()
        late = self._late(places)
        lengths, handles = read_places(places, self.device) if late is None else (late.own_lengths(), late.handles())
        return handles.cpu().numpy().copy(), lengths.cpu().numpy().copy()

    @public_call
    def want(self, places: Any, until: Any = None) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            if self._graph_evicts and not self._pinned:
                raise RuntimeError(
                    "a CUDA graph holds an eviction of this tree that knows no soft pins: call want once before the "
                    "capture"
                )
            if until is None and self.options.pin_budget is None:
                self._pinned = True
                self._renew(places, self._want)
                return
            handles, lengths = self._read(places)
            ends = None if until is None else read_ends(until, len(handles))
            self._check_budget(handles, lengths)
            self._pinned = True
            self._renew(places, lambda found: self._want_until(places, found, ends))
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _want_until(self, places: Any, found: PlaceAddresses, ends: np.ndarray | None) -> None:
        self._want(found)
        if ends is not None and found.batch:
            handles, lengths = self._read(places if self._late(places) is not None else _Found(*found.owner))
            self._replace_pins(self._pins.with_more(handles, lengths, ends), self._opened())

    def _opened(self) -> tuple[int, ...]:
        """Return numbers that tell the open call from every other call."""
        assert self._open is not None
        return tuple(self._open[:3])

    def _want(self, places: PlaceAddresses) -> None:
        if self._wants.add(places.batch):
            self._look_up(self._wants, places.batch, "want")
        self._split(places)
        if places.batch:
            call = self._calls.next()
            self._open = OpenCall(interrupted.WANT, call, self._changes, places)
            gpu.want(self._arrays, places, call)
            self._calls.enqueued(call)

    @public_call
    def unwant(self, places: Any, until: Any = None) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            left = None
            if until is not None or self._pins.size:
                left = self._pins_left(*self._read(places), until)
            self._unwant(self._places(places), left)
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _unwant(self, found: PlaceAddresses, left: Pins | None) -> None:
        """Remove one want from each path. left: the pins with an end afterwards, None if they stay."""
        if found.batch:
            self._ensure_scratch(found.batch)
            call = self._calls.next()
            self._open = OpenCall(interrupted.UNWANT, call, self._changes, found)
            gpu.unwant(self._arrays, found, call)
            self._calls.enqueued(call)
            if left is not None:
                self._finish_all()
                self._replace_pins(left, self._opened())
            self._changes += 1
            self._open = None

    @public_call
    def expire(self, now: Any) -> int:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            if self._pins.size:
                self._finish_all()
            over, left = self._pins_at(now)
            if over.size:
                self._unwant(self._brought(over.handles, over.lengths), left)
            else:
                self._pins = left
            self.busy = FREE
            return over.size
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    # Waiting queues

    def names(self) -> Namespaces:
        """Return the codes of the namespaces, for a waiting queue to read."""
        return self._names.known

    @property
    def last_call(self) -> int | None:
        """A number that is different after each call that enqueued work; None if the host cannot tell."""
        return self._calls.last

    def follow(self, prompts: PromptAddresses, entries: int) -> None:
        """Match the first `entries` prompts of a waiting queue from their places, which are replaced. One launch."""
        call = self._calls.next()
        gpu.follow(self._arrays, prompts, entries, call)
        self._calls.enqueued(call, False)

    def wait(self) -> None:
        """Wait for all calls so far. Does not tell whether one was refused."""
        self._wait()

    def read_paths(self) -> Paths:
        """Return the columns that lead from a row to the root, copied to the host. Waits for the device."""
        self._finish_all()
        s, rows = self._state, int(self._state.numbers[numbers.ROWS])
        parents, lengths, ends, locks = (
            column[:rows].cpu().numpy() for column in (s.parent, s.length, s.end, s.lock_ref)
        )
        evictable, protected = (self.mailbox.counter(place) for place in (mail.EVICTABLE, mail.PROTECTED))
        return Paths(parents, lengths, ends, locks, evictable, protected)
