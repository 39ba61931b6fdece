"""Results of calls on a GPU: tensors on the device, and numbers in host memory once the kernel has written them."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, NoReturn, Protocol

import torch

from flatradix.device.mailbox import Mailbox
from flatradix.layout.queries import Output, PlaceAddresses
from flatradix.results import Tensors

_CHUNK = 1 << 14
_MOST = 1 << 11  # larger batches get memory of their own
_TOLD_BEFORE = "this call was refused, as was told before; it has no result"


class Chunk(NamedTuple):
    """Device memory for N keys: int32 [2, N] lengths and prefix lengths, int64 [N] handles, and addresses."""

    device: torch.device
    size: int
    lengths: torch.Tensor
    handles: torch.Tensor
    length_address: int
    handle_address: int


def _new_chunk(device: torch.device, size: int) -> Chunk:
    lengths = torch.empty((2, size), dtype=torch.int32, device=device)
    handles = torch.empty(size, dtype=torch.int64, device=device)
    return Chunk(device, size, lengths, handles, lengths.data_ptr(), handles.data_ptr())


class Home(Protocol):
    """The index that enqueued the kernel."""

    mailbox: Mailbox

    def raise_refusals(self) -> None: ...

    def told_lengths(self, call: int, place: int, batch: int) -> torch.Tensor | None: ...


class OnDevice:
    """The numbers of B keys, in a part of a chunk to which a kernel writes them.

    places: the addresses of the handles and lengths; their owner is the chunk. shown: whether the caller has had
    `lengths`, and so may have written other lengths there than those that the kernel has told.
    """

    __slots__ = ("_chunk", "device", "places", "shown")

    def __init__(self, chunk: Chunk, at: int, batch: int) -> None:
        self._chunk = chunk
        self.device = chunk.device
        self.places = PlaceAddresses(chunk.handle_address + 8 * at, chunk.length_address + 4 * at, batch, chunk)
        self.shown = False

    def output(self, told: int = -1) -> Output:
        """Return the addresses of the numbers on the device. told: as in `Output`."""
        handles, lengths, _batch, _owner = self.places
        return Output(handles, lengths, lengths + 4 * self._chunk.size, told)

    def _range(self) -> slice:
        _handles, lengths, batch, _owner = self.places
        at = (lengths - self._chunk.length_address) // 4
        return slice(at, at + batch)

    def count(self) -> int:
        return self.places.batch

    def own_lengths(self) -> torch.Tensor:
        """Return the lengths, not for the caller."""
        return self._chunk.lengths[0, self._range()]

    def lengths(self) -> torch.Tensor:
        self.shown = True
        return self.own_lengths()

    def handles(self) -> torch.Tensor:
        return self._chunk.handles[self._range()]

    def prefix_lengths(self) -> torch.Tensor:
        return self._chunk.lengths[1, self._range()]

    def forget_handle(self) -> None:
        """Note that a lock may have renewed handles on the device."""

    def host_lengths(self) -> torch.Tensor:
        return self.own_lengths().cpu()

    def total(self) -> int:
        """Return the sum of the lengths that the kernel has told. Waits for that. Those of a refused call do not count.

        Of a single key: raises the error of a refused call.
        """
        return int(self.host_lengths().clamp(0).sum())


class Awaited(OnDevice):
    """The numbers of one key, a `results.Late`. The kernel also writes them to the mailbox."""

    __slots__ = ("_answer", "_call", "_home", "_renewed")

    def __init__(self, home: Home, call: int, chunk: Chunk, at: int) -> None:
        self._chunk = chunk
        self.device = chunk.device
        self.places = PlaceAddresses(chunk.handle_address + 8 * at, chunk.length_address + 4 * at, 1, chunk)
        self.shown = False
        self._home = home
        self._call = call
        self._answer: tuple[int, int, int] | None = None
        self._renewed = False

    def _await(self) -> tuple[int, int, int]:
        """Wait for the kernel. Return (length, handle, prefix length). Raises the error of a refused call."""
        if self._answer is None:
            answer = self._home.mailbox.answer(self._call)
            if answer is None:
                answer = (int(self.own_lengths()), self._read_handle(), int(self.prefix_lengths()))
            if answer[0] in (-1, 0xFFFFFFFF):
                self._home.raise_refusals()
                raise ValueError(_TOLD_BEFORE)
            self._answer = answer
        return self._answer

    def _read_handle(self) -> int:
        return int(self.handles())

    def forget_handle(self) -> None:
        """Read the handle from the device from now on: a lock may have renewed it there."""
        self._renewed = True

    def host_lengths(self) -> torch.Tensor:
        return torch.tensor([self._await()[0]], dtype=torch.int32, device="cpu")

    def length(self) -> int:
        return (self._answer or self._await())[0]

    def total(self) -> int:
        return self.length()

    def handle(self) -> int:
        return self._read_handle() if self._renewed else self._await()[1]

    def prefix_length(self) -> int:
        return (self._answer or self._await())[2]


class Batch(OnDevice):
    """The numbers of a batch, a `results.Late`. A match also writes its lengths to the mailbox, if it could reserve it.

    told: the place there, or -1.
    """

    __slots__ = ("_call", "_home", "_told")

    def __init__(self, home: Home, call: int, chunk: Chunk, at: int, batch: int, told: int) -> None:
        super().__init__(chunk, at, batch)
        self._home = home
        self._call = call
        self._told = told

    def host_lengths(self) -> torch.Tensor:
        found = None
        if self._told >= 0:
            found = self._home.told_lengths(self._call, self._told, self.places.batch)
        if found is None:
            found = super().host_lengths()
        if len(found) == 1 and int(found) < 0:
            self._raise()
        return found

    def _raise(self) -> NoReturn:
        self._home.raise_refusals()
        raise ValueError(_TOLD_BEFORE)

    def _tensors(self) -> Tensors:
        """Return the numbers, for the integers of a batch of one. Raises the error of a refused call."""
        if self.places.batch == 1 and int(self.own_lengths()) < 0:
            self._raise()
        return Tensors(self.own_lengths(), self.handles(), self.prefix_lengths())

    def length(self) -> int:
        return self._tensors().length()

    def handle(self) -> int:
        return self._tensors().handle()

    def prefix_length(self) -> int:
        return self._tensors().prefix_length()


class Results:
    """Device memory for results, reserved part by part. Separate tensors would cost 3 us a call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._used = _CHUNK
        # The last chunks are kept: torch must not reuse their memory while a stream may still write to it.
        self._chunks: deque[Chunk] = deque(maxlen=4)

    def reserve(self, count: int = 1, alone: bool = False) -> tuple[Chunk, int]:
        """Return a chunk, and where `count` places begin in it that are not in use yet. alone: in a new chunk."""
        if alone or count > _MOST:
            return _new_chunk(self._device, count), 0
        at = self._used
        if at + count > _CHUNK or not self._chunks:
            self._chunks.append(_new_chunk(self._device, _CHUNK))
            at = 0
        self._used = at + count
        return self._chunks[-1], at

    def one(self, home: Home, call: int) -> Awaited:
        """Reserve device memory for the numbers of one key."""
        return Awaited(home, call, *self.reserve())

    def many(self, home: Home, call: int, batch: int, told: int = -1, captured: bool = False) -> Batch:
        """Reserve device memory for the numbers of a batch. told: as for `Batch`.

        captured: by a CUDA graph, which may be replayed when the result is gone. Memory that torch allocates during the
        capture stays the graph's own.
        """
        return Batch(home, call, *self.reserve(batch, captured), batch, told)
