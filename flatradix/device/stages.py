"""Pinned buffers for single keys, which kernels read where they are: a copy costs a launch of its own, 5 us."""

from __future__ import annotations

import ctypes

import torch

from flatradix.device.mailbox import Mailbox

STAGED_BYTES = 1 << 16
_STAGES = 32


class Stages:
    """Thirty-two buffers of STAGED_BYTES, used in turn, and one on the device, to which a kernel brings its key."""

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
        """Copy `size` bytes; returns where they are now. Without a `commit` the next key takes the same buffer."""
        if self._calls[self._next]:
            self._mailbox.await_answer(self._calls[self._next])  # then the kernel that read this buffer is done
        target = self._address + self._next * STAGED_BYTES
        ctypes.memmove(target, address, size)
        return target

    def commit(self, call: int) -> None:
        """The kernel of `call`, which is to answer, reads what was put last."""
        self._calls[self._next] = call
        self._next = (self._next + 1) % _STAGES

    def free_all(self) -> None:
        """Nothing is under way: no kernel reads any of them."""
        self._calls = [0] * _STAGES
