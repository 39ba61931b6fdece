"""Results of single keys on a GPU: tensors on the device, and Python integers as soon as the kernel has told them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch

from flatradix.results import InsertResult, MatchResult

if TYPE_CHECKING:
    from flatradix.device_tree import DeviceTree

_CHUNK = 4096


class Chunk(NamedTuple):
    """int32 [2, N] lengths and prefix lengths, int64 [N] handles, and where they are."""

    lengths: torch.Tensor
    handles: torch.Tensor
    length_address: int
    handle_address: int


class Singles:
    """Device memory for the results of single keys, given out one by one: a tensor for each would cost 3 us a call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._used = _CHUNK
        # The last ones are kept, so that no memory is given to somebody else while a stream may still write to it.
        self._chunks: deque[Chunk] = deque(maxlen=4)

    def take(self) -> tuple[Chunk, int]:
        """A chunk and the place in it."""
        if self._used == _CHUNK:
            lengths = torch.empty((2, _CHUNK), dtype=torch.int32, device=self._device)
            handles = torch.empty(_CHUNK, dtype=torch.int64, device=self._device)
            self._chunks.append(Chunk(lengths, handles, lengths.data_ptr(), handles.data_ptr()))
            self._used = 0
        self._used += 1
        return self._chunks[-1], self._used - 1


class _Awaited:
    """What both results have in common: where the answer will be."""

    if not TYPE_CHECKING:
        __slots__ = ()  # two bases with slots of their own could not be joined
    else:
        _tree: DeviceTree
        _call: int
        _chunk: Chunk
        _place: int
        _answer: tuple[int, int, int] | None
        _renewed: bool

    def _await(self) -> tuple[int, int, int]:
        """(length, handle, prefix length)."""
        if self._answer is None:
            answers = self._tree._mail.answers(self._call)
            if answers is None:
                lengths, handle = self._chunk.lengths[:, self._place].tolist(), self._read_handle()
                answer = (lengths[0], handle, lengths[1])
            else:
                length, low, high, prefix = answers
                answer = (length, low | high << 32, prefix)
            if answer[0] in (-1, 0xFFFFFFFF):
                self._tree.raise_pending()
                raise ValueError("this call was refused, as was told before; it has no result")
            self._answer = answer
        return self._answer

    def _read_handle(self) -> int:
        return int(self._chunk.handles[self._place])

    def forget_handle(self) -> None:
        """A lock may have renewed it."""
        self._renewed = True

    def addresses(self) -> tuple[int, int]:
        """Of the handle and the length on the device."""
        place = self._place
        return self._chunk.handle_address + 8 * place, self._chunk.length_address + 4 * place


class AwaitedMatch(_Awaited, MatchResult):
    """The result of a single match."""

    __slots__ = ("_answer", "_call", "_chunk", "_place", "_renewed", "_tree")

    def __init__(self, tree: DeviceTree, call: int, chunk: Chunk, place: int) -> None:
        self._tree = tree
        self._call = call
        self._chunk = chunk
        self._place = place
        self._answer = None
        self._renewed = False

    # A tree on another device takes these, and says that they are not where it is.
    _lengths = property(lambda self: self.lengths)
    _handles = property(lambda self: self.handles)

    @property
    def lengths(self) -> torch.Tensor:
        return self._chunk.lengths[0, self._place : self._place + 1]

    @property
    def handles(self) -> torch.Tensor:
        return self._chunk.handles[self._place : self._place + 1]

    @property
    def length(self) -> int:
        return self._await()[0]

    @property
    def handle(self) -> int:
        return self._read_handle() if self._renewed else self._await()[1]

    def __len__(self) -> int:
        return 1


class AwaitedInsert(_Awaited, InsertResult):
    """The result of a single insert."""

    __slots__ = AwaitedMatch.__slots__

    __init__ = AwaitedMatch.__init__
    _lengths = AwaitedMatch._lengths
    _handles = AwaitedMatch._handles
    lengths = AwaitedMatch.lengths
    handles = AwaitedMatch.handles
    length = AwaitedMatch.length
    handle = AwaitedMatch.handle
    __len__ = AwaitedMatch.__len__

    @property
    def prefix_lengths(self) -> torch.Tensor:
        return self._chunk.lengths[1, self._place : self._place + 1]

    @property
    def prefix_length(self) -> int:
        return self._await()[2]
