"""Results of single keys on a GPU: tensors on the device, and Python integers once the kernel has written them."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import torch

from flatradix.device.mailbox import Mailbox
from flatradix.layout.queries import Output

_CHUNK = 4096


class Chunk(NamedTuple):
    """Device memory for N single keys: int32 [2, N] lengths and prefix lengths, int64 [N] handles, and addresses."""

    lengths: torch.Tensor
    handles: torch.Tensor
    length_address: int
    handle_address: int


class Home(Protocol):
    """The index that enqueued the kernel of a single key."""

    mailbox: Mailbox

    def raise_pending(self) -> None: ...


class Awaited:
    """The numbers of one key, a `results.Late`. The kernel writes them to a chunk and to the mailbox."""

    __slots__ = ("_answer", "_at", "_call", "_chunk", "_home", "_renewed")

    def __init__(self, home: Home, call: int, chunk: Chunk, place: int) -> None:
        self._home = home
        self._call = call
        self._chunk = chunk
        self._at = place
        self._answer: tuple[int, int, int] | None = None
        self._renewed = False

    def _await(self) -> tuple[int, int, int]:
        """Wait for the kernel. Return (length, handle, prefix length). Raises the error of a refused call."""
        if self._answer is None:
            answer = self._home.mailbox.answer(self._call)
            if answer is None:
                lengths = self._chunk.lengths[:, self._at].tolist()
                answer = (lengths[0], self._read_handle(), lengths[1])
            if answer[0] in (-1, 0xFFFFFFFF):
                self._home.raise_pending()
                raise ValueError("this call was refused, as was told before; it has no result")
            self._answer = answer
        return self._answer

    def _read_handle(self) -> int:
        return int(self._chunk.handles[self._at])

    def forget_handle(self) -> None:
        """Read the handle from the device from now on: a lock may have renewed it there."""
        self._renewed = True

    def output(self) -> Output:
        """Return the addresses of the numbers on the device."""
        place, lengths = self._at, self._chunk.length_address
        return Output(self._chunk.handle_address + 8 * place, lengths + 4 * place, lengths + 4 * (_CHUNK + place))

    @property
    def device(self) -> torch.device:
        return self._chunk.handles.device

    def lengths(self) -> torch.Tensor:
        return self._chunk.lengths[0, self._at : self._at + 1]

    def handles(self) -> torch.Tensor:
        return self._chunk.handles[self._at : self._at + 1]

    def prefix_lengths(self) -> torch.Tensor:
        return self._chunk.lengths[1, self._at : self._at + 1]

    def length(self) -> int:
        return self._await()[0]

    def handle(self) -> int:
        return self._read_handle() if self._renewed else self._await()[1]

    def prefix_length(self) -> int:
        return self._await()[2]


class Singles:
    """Device memory for results of single keys, reserved one by one. Separate tensors would cost 3 us a call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._used = _CHUNK
        # The last chunks are kept: torch must not reuse their memory while a stream may still write to it.
        self._chunks: deque[Chunk] = deque(maxlen=4)

    def take(self, home: Home, call: int) -> Awaited:
        """Reserve device memory for the numbers of a call."""
        if self._used == _CHUNK:
            lengths = torch.empty((2, _CHUNK), dtype=torch.int32, device=self._device)
            handles = torch.empty(_CHUNK, dtype=torch.int64, device=self._device)
            self._chunks.append(Chunk(lengths, handles, lengths.data_ptr(), handles.data_ptr()))
            self._used = 0
        self._used += 1
        return Awaited(home, call, self._chunks[-1], self._used - 1)
