"""DeviceCalls: what a tree on a GPU must know of its calls, which nobody waits for: their numbers, errors and sizes."""

from __future__ import annotations

from typing import Any

import torch

from flatradix import meta
from flatradix.mailbox import Mailbox
from flatradix.refusals import BAD_SLOT, FREE_BITS, NO_CAPACITY, refuse, refuse_bad_slot, refuse_capacity
from flatradix.tree import RadixTree


class DeviceCalls(RadixTree):
    """The part of a DeviceTree that numbers calls, and waits for them when somebody asks for what they found."""

    _bound: Any
    _limit: int  # the largest slot

    def _begin_calls(self) -> None:
        """Before the first call."""
        self._mail = Mailbox(self.device)
        self._calls = 0
        self._captured = False
        # Codes given out since the last time that the host looked, and whether one went to a key that may be empty.
        self._fresh: set[int] = set()
        self._unsure = False

    # Enqueueing

    def _is_capturing(self) -> bool:
        if self.device.type != "cuda":
            return False
        if torch._C._cuda_getDevice() == self.device.index:
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def _next_call(self) -> int:
        """A number for a call that is about to be enqueued."""
        self._calls = self._calls % meta.CALL_MASK + 1
        return self._calls

    def _enqueued(self, call: int, changes: bool = True) -> None:
        """Wait for this call from now on; `changes`: whether it may change a size. Not before it is really enqueued."""
        if self._is_capturing():
            # It will tell its numbers whenever the graph is replayed, so from now on the host asks for them.
            self._captured = True
        else:
            self._mail.last = call
            if changes:
                self._mail.last_change = call

    def _tell(self) -> None:
        """Have the device tell its numbers."""
        call = self._next_call()
        self._kernels.tell(self._bound, call)
        self._enqueued(call)

    # Waiting

    def _settle(self) -> None:
        """Wait for all calls so far, and raise the error of the first that was refused."""
        if self._wait():
            self._raise_refusal()

    def _wait(self) -> bool:
        """Wait for all calls so far; whether one was refused. Names given out for nothing are forgotten."""
        if self._captured:
            self._tell()
        refused = bool(self._mail.refusals())
        if self._fresh:
            self._take_back_names(refused)
        return refused

    def _take_back_names(self, refused: bool) -> None:
        """Forget the namespaces that were given out to inserts which stored nothing in them."""
        if (refused or self._unsure) and self._fresh:
            codes = sorted(self._fresh)
            children = self._state.namespace_children
            # A batch that does not fit may have been given codes beyond the array.
            places = torch.tensor(codes, device="cpu").clamp(max=len(children) - 1).to(self.device)
            for code, count in zip(codes, children[places].tolist(), strict=True):
                if count == 0 or code >= len(children):
                    self._namespaces.take_back(code)
        self._fresh.clear()
        self._unsure = False

    def _raise_refusal(self) -> None:
        refusal, others = self._mail.take_refusals()
        if refusal is None:
            return
        try:
            if refusal.reason == NO_CAPACITY:
                needed, free = divmod(refusal.value, 1 << FREE_BITS)
                refuse_capacity(needed, free, self._mail.counter(meta.MAIL_EVICTABLE), self.max_tokens)
            if refusal.reason == BAD_SLOT:
                refuse_bad_slot(refusal.value, refusal.query, self.slot_dtype, self._limit)
            refuse(refusal.operation, refusal.reason, refusal.query, refusal.value)
        except (ValueError, RuntimeError) as error:
            if others:
                error.args = (f"{error.args[0]} ({others} later calls were refused too)", *error.args[1:])
            raise

    def raise_pending(self) -> None:
        self._settle()

    def _counter(self, place: int) -> int:
        self._settle()
        return self._mail.counter(place)

    @property
    def evictable_tokens(self) -> int:
        return self._counter(meta.MAIL_EVICTABLE)

    @property
    def protected_tokens(self) -> int:
        return self._counter(meta.MAIL_PROTECTED)

    @property
    def num_nodes(self) -> int:
        return self._counter(meta.MAIL_NODES)
