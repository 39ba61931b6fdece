"""Pinned buffers for single keys. Kernels read them in place: a copy would need its own launch, 5 us."""

from __future__ import annotations

import ctypes

import torch

from flatradix.device.mailbox import Mailbox

STAGED_BYTES = 1 << 16
_STAGES = 32


class Stages:
    """32 pinned buffers of STAGED_BYTES, used in turn, and one device buffer to which a kernel copies its key."""

    def __init__(self, device: torch.device, mailbox: Mailbox) -> None:
        self._buffers = torch.empty(
            _STAGES * STAGED_BYTES, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"
        )
        self._staged = torch.empty(STAGED_BYTES, dtype=torch.int8, device=device)
        self.staging = self._staged.data_ptr()
        self._address = self._buffers.data_ptr()
        self._calls = [0] * _STAGES
        self._mailbox = mailbox
        self._next = 0

    def put(self, address: int, size: int) -> int:
        """Copy `size` bytes to the next buffer and return their address. Waits until no kernel reads that buffer.

        Without a `commit`, the next key takes the same buffer.
        """
        if self._calls[self._next]:
            self._mailbox.await_answer(self._calls[self._next])  # a kernel answers after it has read its buffer
        target = self._address + self._next * STAGED_BYTES
        ctypes.memmove(target, address, size)
        return target

    def commit(self, call: int) -> None:
        """Reserve the buffer of the last `put` until the kernel of `call` has answered."""
        self._calls[self._next] = call
        self._next = (self._next + 1) % _STAGES

    def free_all(self) -> None:
        """Mark all buffers as free. No kernel may be under way."""
        self._calls = [0] * _STAGES
