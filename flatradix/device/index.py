"""DeviceIndex: the index on a GPU. It enqueues kernels, and waits for them only where it returns their results."""

from __future__ import annotations

from collections.abc import Callable, Collection
from threading import get_ident

import numpy as np
import torch

from flatradix.device import interrupted
from flatradix.device.capture import Step
from flatradix.device.evicting import Evicting
from flatradix.device.inserting import Inserting
from flatradix.device.interrupted import NOTHING, NOTHING_YET, OpenCall
from flatradix.device.matching import Matching
from flatradix.device.pinning import Pinning
from flatradix.device.reading import Reading
from flatradix.errors import TooLargeForDeviceError
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.index import T
from flatradix.inputs.namespaces import name_hash
from flatradix.inspect.content import Content, Saved, as_numpy, fields_of, fill, tokens_for
from flatradix.kernels import gpu
from flatradix.layout import mail, numbers
from flatradix.layout.growth import is_too_large
from flatradix.layout.state import pool_units


class DeviceIndex(Matching, Pinning, Reading, Inserting, Evicting):
    """A tree on a GPU. Triton kernels do the work. Its operations stand in the modules beside this one."""

    # CUDA graphs

    def capture(self, function: Callable[[], T]) -> Callable[[], T]:
        return Step(self, function) if self.device.type == "cuda" else function

    def rehearse(self, function: Callable[[], T]) -> T:
        """Run a function. Its calls launch the kernels that they would launch during a capture."""
        self._calls.rehearsing = True
        try:
            return function()
        finally:
            self._calls.rehearsing = False

    def in_graphs(self) -> tuple[bool, bool]:
        """Return whether a CUDA graph holds a call of this tree, and whether one holds an eviction."""
        return self._calls.captured, self._graph_evicts

    def only_in_graphs(self, before: tuple[bool, bool]) -> None:
        """Take back what a capture that has failed has noted: `before` is what `in_graphs` returned before it."""
        self._calls.captured, self._graph_evicts = before

    @property
    def noted_locks(self) -> int:
        """The most locks that any node may have, as far as the host knows."""
        return self._locks.most

    @public_call
    def replay(self, graph: torch.cuda.CUDAGraph, locks: int) -> None:
        """Run a graph that holds calls of this tree, which lock that many places. What runs is not undone."""
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._note_locks(locks, "replay")
            self._open = NOTHING, 0, self._changes + 1
            graph.replay()
            self._changes += 1
            self._open = None
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    # The whole tree

    def pack(self) -> None:
        gpu.compact(self._arrays, True)
        self._calls.tell(self._tell)

    @public_call
    def digest(self) -> str:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._finish_all()
            self._open = NOTHING_YET
            items = self._names.known.items()
            hashes = np.array([name_hash(name) for _, name in items], np.int64)
            codes = torch.tensor([code for code, _ in items], device="cpu").to(self.device)
            self._state.namespace_hash[codes] = torch.from_numpy(hashes).to(self.device)
            lanes = gpu.digest(self._arrays)
            self._open = None
            self.busy = FREE
            return "".join(f"{lane & (2**64 - 1):016x}" for lane in lanes)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def reset(self) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            if self._calls.is_capturing():
                raise RuntimeError("a CUDA graph cannot hold a reset: the host forgets the namespaces")
            call = self._calls.next()
            self._open = OpenCall(interrupted.RESET, call, self._changes, before=self._unreturned)
            gpu.reset(self._arrays, call)
            self._calls.enqueued(call)
            self._names.known.clear()
            self._names.nothing_given()
            self._unseen_inserts.clear()
            self._most_stored = 0
            self._holds_dropped &= self._graph_evicts  # a captured eviction frees dropped nodes first, also from now on
            self._unreturned = None
            if self._listener is not None:
                self._listener.forget()
            self._changes += 1
            self._open = None
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def read_content(self, slots: bool, only: Collection[str] | None = None) -> Content:
        self._finish_all()
        first = int(self._state.numbers[numbers.POOL_END]) - pool_units(self.options.max_tokens, self.options.page_size)
        sizes = (self.mailbox.counter(place) for place in (mail.EVICTABLE, mail.PROTECTED, mail.NODES))
        pool = (self._pool if slots else self._pool[:0]).numpy(force=True)
        state = as_numpy(self._state) if only is None else fields_of(self._state, only)
        names = self._names.known
        items = names.items() if only is None else []
        return Content(self.options, state, pool, first, items, names.name, *sizes)

    def restore(self, saved: Saved) -> None:
        if self.options.grows:
            needed = tokens_for(saved, self.options.page_size)
            if is_too_large(needed, self.options.page_size, halves=2):
                raise TooLargeForDeviceError(f"the tree needs space for {needed} tokens: too many for a GPU")
            self._grow(needed)
            self._most_stored = len(saved["tokens"])
        fill(self._state, self._pool, saved)
        self._holds_dropped = bool((saved["created"] < 0).any())
        self._locks.most = int(saved["lock_ref"].max())
        found = self._state.numbers
        found[numbers.POOL_CURSOR] = found[numbers.EVICTABLE] + found[numbers.PROTECTED]
        self._names.known.restore(saved["names"])
        gpu.rebuild(self._arrays)
        self._calls.tell(self._tell)
        self._finish_all()  # the next insert relies on the FREE_UNITS word that is written here
