"""HostIndex: the index in host memory. A call returns when its work is done, so it raises its own errors."""

from __future__ import annotations

from collections.abc import Collection
from threading import get_ident

import torch

from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.host.core import NOTHING_TO_UNDO
from flatradix.host.evicting import Evicting
from flatradix.host.inserting import Inserting
from flatradix.host.locking import Locking
from flatradix.host.matching import Matching
from flatradix.host.pinning import Pinning
from flatradix.host.reading import Reading
from flatradix.inspect.content import Content, Saved, fill, tokens_for
from flatradix.kernels import cpu
from flatradix.layout import numbers


class HostIndex(Matching, Locking, Pinning, Reading, Inserting, Evicting):
    """A tree in host memory. Numba kernels do the work. Its operations stand in the modules beside this one."""

    def pack(self) -> None:
        self._open = call = self._calls = self._calls + 1
        self._slots.compact(call, self._numbers[numbers.NODES])
        self._open = 0

    @public_call
    def digest(self) -> str:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._open = NOTHING_TO_UNDO
            slots = self._slots.values.cpu()
            lanes = [cpu.digest(self._addresses, slots.data_ptr(), slots.dtype == torch.int64, lane) for lane in (0, 1)]
            self._open = 0
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
            self._open = call = self._calls = self._calls + 1
            cpu.reset(self._addresses, call)
            self._namespaces.clear()
            self._unreturned = None
            self._forget_victims()
            self._open = 0
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def raise_pending(self) -> None:
        if self.busy:
            self._settle()

    def read_content(self, slots: bool, only: Collection[str] | None = None) -> Content:
        sizes = self._numbers[numbers.EVICTABLE], self._numbers[numbers.PROTECTED], self._numbers[numbers.NODES]
        pool = self._slots.values if slots else self._slots.values[:0]
        names = self._namespaces
        items = names.items() if only is None else []
        return Content(self.options, self._arrays, pool.numpy(force=True), 0, items, names.name, *sizes)

    def restore(self, saved: Saved) -> None:
        if self.options.grows:
            self._grow(tokens_for(saved, self.options.page_size))
        fill(self._state, self._slots.values, saved)
        self._namespaces.restore(saved["names"])
        cpu.rebuild(self._addresses)
