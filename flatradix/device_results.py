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

    __slots__ = ()

    _tree: DeviceTree
    _call: int
    _chunk: Chunk
    _place: int
    _known: list[int | None]

    def _bind(self, tree: DeviceTree, call: int, chunk: Chunk, place: int) -> None:
        self._tree = tree
        self._call = call
        self._chunk = chunk
        self._place = place
        self._known = [None, None, None]

    def _await(self) -> list[int | None]:
        known = self._known
        if known[0] is None:
            answers = self._tree._mail.answers(self._call)
            if answers is None:
                known[0] = int(self._chunk.lengths[0, self._place])
                known[1] = int(self._chunk.handles[self._place])
                known[2] = int(self._chunk.lengths[1, self._place])
            else:
                length, low, high, prefix = answers
                known[0], known[1], known[2] = length, low | high << 32, prefix
            if known[0] in (-1, 0xFFFFFFFF):
                known[0] = None
                self._tree.raise_pending()
                raise ValueError("this call was refused, as was told before; it has no result")
        return known

    def forget_handle(self) -> None:
        """A lock may have renewed it."""
        if self._known[0] is not None:
            self._known[1] = None

    def addresses(self) -> tuple[int, int]:
        """Of the handle and the length on the device."""
        place = self._place
        return self._chunk.handle_address + 8 * place, self._chunk.length_address + 4 * place


class AwaitedMatch(_Awaited, MatchResult):
    """The result of a single match."""

    __slots__ = ("_call", "_chunk", "_known", "_place", "_tree")

    def __init__(self, tree: DeviceTree, call: int, chunk: Chunk, place: int) -> None:
        self._bind(tree, call, chunk, place)

    @property
    def lengths(self) -> torch.Tensor:
        return self._chunk.lengths[0, self._place : self._place + 1]

    @property
    def handles(self) -> torch.Tensor:
        return self._chunk.handles[self._place : self._place + 1]

    @property
    def length(self) -> int:
        return int(self._await()[0])  # type: ignore[arg-type]

    @property
    def handle(self) -> int:
        known = self._await()
        if known[1] is None:
            known[1] = int(self._chunk.handles[self._place])
        return int(known[1])

    def __len__(self) -> int:
        return 1


class AwaitedInsert(_Awaited, InsertResult):
    """The result of a single insert."""

    __slots__ = ("_call", "_chunk", "_known", "_place", "_tree")

    def __init__(self, tree: DeviceTree, call: int, chunk: Chunk, place: int) -> None:
        self._bind(tree, call, chunk, place)

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
        return int(self._await()[2])  # type: ignore[arg-type]
