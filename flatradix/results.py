"""What the operations return. A batch of one keeps Python integers, and makes tensors only when asked for them."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch

_Result = TypeVar("_Result", bound="Places")


def _only(values: torch.Tensor) -> int:
    if len(values) != 1:
        raise ValueError(f"the integers are for a batch of one, and this is one of {len(values)}; use the tensors")
    number = int(values[0])
    if number < 0:
        raise ValueError("the call that was to give this was refused; tree.raise_pending() tells why")
    return number


class Places:
    """A place in the tree for each query: a path length and the handle that it goes with.

    lengths: int32 [B] on the tree's device, in tokens (pairs with bigrams), whole pages.
    handles: int64 [B]. `RadixTree.lock` writes a new handle into it where it has to split an edge.
    length, handle: the same as Python integers, for a batch of one.
    """

    __slots__ = ("_handle", "_handles", "_length", "_lengths")

    _handles: torch.Tensor | None
    _lengths: torch.Tensor | None

    def __init__(self, lengths: torch.Tensor, handles: torch.Tensor) -> None:
        self._lengths = lengths
        self._handles = handles
        self._length = self._handle = -1

    @classmethod
    def single(cls: type[_Result], length: int, handle: int) -> _Result:
        """A batch of one, from Python integers."""
        self = cls.__new__(cls)
        self._lengths = self._handles = None
        self._length = length
        self._handle = handle
        return self

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._lengths is None or self._handles is None:
            self._lengths = torch.tensor([self._length], dtype=torch.int32, device="cpu")
            self._handles = torch.tensor([self._handle], dtype=torch.int64, device="cpu")
        return self._lengths, self._handles

    @property
    def lengths(self) -> torch.Tensor:
        return self._tensors()[0]

    @property
    def handles(self) -> torch.Tensor:
        return self._tensors()[1]

    @property
    def length(self) -> int:
        return self._length if self._lengths is None else _only(self._lengths)

    @property
    def handle(self) -> int:
        return self._handle if self._handles is None else _only(self._handles)

    def __len__(self) -> int:
        return 1 if self._lengths is None else len(self._lengths)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lengths={self.lengths.tolist()})"


class MatchResult(Places):
    """The longest cached prefix of each query."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"MatchResult(lengths={self.lengths.tolist()})"


class InsertResult(Places):
    """The end of each inserted key, and how much of it was there before.

    prefix_lengths: int32 [B]; the caller frees its own slots for that part. prefix_length: the same as a Python
    integer, for a batch of one.
    """

    __slots__ = ("_prefix_length", "_prefix_lengths")

    _prefix_lengths: torch.Tensor | None

    def __init__(self, prefix_lengths: torch.Tensor, lengths: torch.Tensor, handles: torch.Tensor) -> None:
        super().__init__(lengths, handles)
        self._prefix_lengths = prefix_lengths
        self._prefix_length = -1

    @classmethod
    def single_insert(cls, prefix_length: int, length: int, handle: int) -> InsertResult:
        """A batch of one, from Python integers."""
        self = cls.single(length, handle)
        self._prefix_lengths = None
        self._prefix_length = prefix_length
        return self

    @property
    def prefix_lengths(self) -> torch.Tensor:
        if self._prefix_lengths is None:
            self._prefix_lengths = torch.tensor([self._prefix_length], dtype=torch.int32, device="cpu")
        return self._prefix_lengths

    @property
    def prefix_length(self) -> int:
        return self._prefix_length if self._prefix_lengths is None else _only(self._prefix_lengths)

    def __repr__(self) -> str:
        return f"InsertResult(prefix_lengths={self.prefix_lengths.tolist()}, lengths={self.lengths.tolist()})"


class EvictResult(NamedTuple):
    """The KV slots that an eviction freed.

    slots: int64 [K] on the slot device, node by node in the order of eviction, root to leaf inside a node.
    """

    slots: torch.Tensor
    num_tokens: int
    num_nodes: int


_HOST = torch.device("cpu")


def places_of(places: Any, device: torch.device = _HOST) -> tuple[torch.Tensor, torch.Tensor]:
    """The lengths, int32 and contiguous, and the handles of a result, or of anything that has both.

    Raises ValueError for a wrong dtype, shape or device.
    """
    try:
        lengths, handles = places.lengths, places.handles
    except AttributeError:
        raise ValueError(
            f"a {type(places).__name__} names no place: pass the result of match or insert, or anything with "
            ".handles (int64 [B]) and .lengths (integers [B])"
        ) from None
    if not isinstance(handles, torch.Tensor) or handles.dtype != torch.int64 or handles.dim() != 1:
        raise ValueError("handles must be an int64 tensor [B]")
    if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError("lengths must be an int32 or int64 tensor [B]")
    if handles.device != device or lengths.device != device:
        raise ValueError(f"handles on {handles.device} and lengths on {lengths.device}, but the tree is on {device}")
    if lengths.shape != handles.shape:
        raise ValueError(f"{tuple(lengths.shape)} lengths for {tuple(handles.shape)} handles")
    if lengths.dtype == torch.int64:
        lengths = lengths.clamp(torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
    return lengths.to(torch.int32).contiguous(), handles
