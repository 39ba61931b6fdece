"""The desk of a tree: pinned buffers for single keys and their slots.

Kernels read them in place: a copy would need its own launch.
"""

from __future__ import annotations

import numpy as np
import torch

from flatradix.device.mailbox import Mailbox
from flatradix.layout import desk
from flatradix.layout.queries import Desk


class Stages:
    """Pinned buffers of `tokens` tokens, used in turn, and one device buffer to which a kernel copies its key.

    buffers: int32 [count * tokens]. words: int64 [desk.SIZE] (`layout.desk`). desk: their addresses, for the
    functions that stage a key (`kernels/native/stage.py`).
    """

    def __init__(
        self, device: torch.device, mailbox: Mailbox, tokens: int = desk.STAGED_TOKENS, count: int = desk.COUNT
    ) -> None:
        self.buffers = torch.empty(count * tokens, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self._staged = torch.empty(tokens, dtype=torch.int32, device=device)
        self.words = np.zeros(desk.SIZE, np.int64)
        self.words[desk.MAIL] = mailbox.words.data_ptr()
        self.words[desk.STAGES] = self.buffers.data_ptr()
        self.words[desk.STAGING] = self._staged.data_ptr()
        self.words[desk.BUFFERS] = count
        self.words[desk.TOKENS] = tokens
        self.desk = Desk(self.words.ctypes.data, self._staged.data_ptr())
        self._mailbox = mailbox

    def wait(self) -> None:
        """Wait until no kernel reads the two buffers that are next in turn: an insert may take both."""
        # A kernel answers after it has read its buffer.
        for ahead in range(2):
            at = (self.words[desk.NEXT] + ahead) % self.words[desk.BUFFERS]
            self._mailbox.await_answer(int(self.words[desk.FIRST_CALL + at]))

    def free_all(self) -> None:
        """Mark all buffers as free. No kernel may be under way."""
        self.words[desk.FIRST_CALL :] = 0
