"""Calls: the numbers, errors and sizes of the calls of a tree on a GPU, which return before their kernels have run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flatradix.device.mailbox import Mailbox
from flatradix.inputs.options import Options
from flatradix.inputs.refuse import refuse, refuse_capacity, refuse_unseen_slot
from flatradix.layout import mail, reasons

_C: Any = torch._C  # two look-ups fewer in each call


class Calls:
    """Numbers the calls of one tree, and waits for their results when a caller asks for them.

    mailbox: the words that kernels write. options: of the tree, for messages. captured: whether a CUDA graph holds a
    call. The host does not see replays, so every wait must then have the device write the numbers anew (`tell`).
    rehearsing: whether calls are to launch what they would launch during a capture.
    """

    def __init__(self, options: Options, device: torch.device) -> None:
        self.mailbox = Mailbox(device)
        self.options = options
        self._number = int(device.index) if device.type == "cuda" else -1  # of the CUDA device
        self._last = 0
        self.captured = False
        self.rehearsing = False

    # Enqueueing

    def is_capturing(self) -> bool:
        """Return whether a CUDA graph is being captured on the tree's device.

        Asked before a launch, this also binds CUDA's context to a thread that has not used the device yet.
        """
        if self._number < 0:
            return False
        if _C._cuda_getDevice() == self._number:
            return _C._cuda_isCurrentStreamCapturing()
        with torch.cuda.device(self._number):
            return torch.cuda.is_current_stream_capturing()

    @property
    def last(self) -> int | None:
        """The number of the last call, or None if the host cannot know it: a CUDA graph may replay calls."""
        return None if self.captured else self._last

    def begin(self) -> tuple[int, int, bool]:
        """Return (what `next` returns, torch's current stream or -1, what `is_capturing` returns).

        The stream is -1 if the tree's device is not torch's current one: kernels cannot be launched directly then.
        """
        self._last = call = self._last % mail.CALL_MASK + 1
        number = self._number
        if number >= 0 and _C._cuda_getDevice() == number:
            return call, _C._cuda_getCurrentRawStream(number), _C._cuda_isCurrentStreamCapturing()
        return call, -1, self.is_capturing()

    def next(self) -> int:
        """Return the number of a call that is about to be enqueued."""
        self._last = self._last % mail.CALL_MASK + 1
        return self._last

    def enqueued(self, call: int, changes: bool = True, captured: bool | None = None) -> None:
        """Make every later wait include `call`, which is enqueued by now. changes: whether it may change a size.

        captured: what `is_capturing` has returned, if it was asked.
        """
        if self.is_capturing() if captured is None else captured:
            self.captured = True
            return
        self.mailbox.last = call
        if changes:
            self.mailbox.last_change = call

    def enqueued_outside(self, call: int, changes: bool) -> None:
        """Do what `enqueued` does, if no graph is being captured."""
        self.mailbox.last = call
        if changes:
            self.mailbox.last_change = call

    # Waiting

    def tell(self, tell: Callable[[int], None]) -> None:
        """Have the device write the tree's numbers. tell: launches the kernel that does so, given a call number."""
        call = self.next()
        tell(call)
        self.enqueued(call)

    def raise_refusal(self) -> None:
        """Raise the error of the first refusal not reported yet, if any. All refusals then count as reported."""
        refusal, others = self.mailbox.first_refusal()
        if refusal is None:
            return
        try:
            if refusal.reason == reasons.NO_CAPACITY:
                needed, free = divmod(refusal.value, 1 << reasons.FREE_BITS)
                evictable = self.mailbox.counter(mail.EVICTABLE)
                refuse_capacity(needed, free, evictable, self.options.max_tokens)
            if refusal.reason == reasons.BAD_SLOT:
                dtype = self.options.slot_dtype
                refuse_unseen_slot(refusal.value, refusal.query, dtype, int(torch.iinfo(dtype).max))
            refuse(refusal.operation, refusal.reason, refusal.query, refusal.value)
        except (ValueError, RuntimeError, AssertionError) as error:
            if others:
                error.args = (f"{error.args[0]} ({others} later calls were refused too)", *error.args[1:])
            self.mailbox.mark_told(others + 1)
            raise
