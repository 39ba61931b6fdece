"""The desk of a tree: pinned buffers for single keys. Kernels read them in place: a copy would need its own launch."""

from __future__ import annotations

import numpy as np
import torch

from flatradix.device.mailbox import Mailbox
from flatradix.inputs.sequences import Buffer
from flatradix.kernels import native
from flatradix.layout import desk
from flatradix.layout.queries import Desk, Values


class Stages:
    """Pinned buffers of STAGED_TOKENS, used in turn, and one device buffer to which a kernel copies its key.

    desk: their addresses, for the functions that stage a key (`kernels/native/stage.py`).
    """

    def __init__(self, device: torch.device, mailbox: Mailbox) -> None:
        size = desk.COUNT * desk.STAGED_TOKENS
        self._buffers = torch.empty(size, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self._staged = torch.empty(desk.STAGED_TOKENS, dtype=torch.int32, device=device)
        self._words = np.zeros(desk.SIZE, np.int64)
        self._words[desk.MAIL] = mailbox.words.data_ptr()
        self._words[desk.STAGES] = self._buffers.data_ptr()
        self._words[desk.STAGING] = self._staged.data_ptr()
        self.desk = Desk(self._words.ctypes.data, self._staged.data_ptr())
        self._mailbox = mailbox

    def put(self, key: Buffer) -> Values:
        """Return one key in host memory, of at most STAGED_TOKENS, in the next buffer. `commit` must follow its launch.

        Waits until no kernel reads that buffer.
        """
        address, count, wide, owner = key
        while not (staged := native.stage_key.call(self.desk.address, address, count, wide)):
            self.wait()
        return Values(staged, False, 0, count, 1, None, owner, self.desk.staging)

    def commit(self, call: int) -> None:
        """Reserve the buffer of the last `put` until the kernel of `call` has answered."""
        native.commit_key.call(self.desk.address, call)

    def wait(self) -> None:
        """Wait until no kernel reads the buffer that is next in turn."""
        # A kernel answers after it has read its buffer.
        self._mailbox.await_answer(int(self._words[desk.FIRST_CALL + self._words[desk.NEXT]]))

    def free_all(self) -> None:
        """Mark all buffers as free. No kernel may be under way."""
        self._words[desk.FIRST_CALL :] = 0
