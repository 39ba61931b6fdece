"""What the operations return: one class for each, however late its numbers come.

A result of one key on the CPU holds Python integers, and makes tensors only when asked for them. All others have their
numbers from elsewhere (`late`): from tensors, or from a kernel that may not have run yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch


class Late(Protocol):
    """Where a result has its numbers from. The integers are for a batch of one."""

    def lengths(self) -> torch.Tensor: ...

    def handles(self) -> torch.Tensor: ...

    def prefix_lengths(self) -> torch.Tensor: ...

    def length(self) -> int: ...

    def handle(self) -> int: ...

    def prefix_length(self) -> int: ...


def _only(values: torch.Tensor) -> int:
    if len(values) != 1:
        raise ValueError(f"the integers are for a batch of one, and this is one of {len(values)}; use the tensors")
    number = int(values[0])
    if number < 0:
        raise ValueError("the call that was to give this was refused; tree.raise_pending() tells why")
    return number


class Tensors:
    """Numbers of a batch: int32 [B] lengths and prefix lengths, int64 [B] handles."""

    __slots__ = ("_handles", "_lengths", "_prefix_lengths")

    def __init__(self, lengths: torch.Tensor, handles: torch.Tensor, prefix_lengths: torch.Tensor | None) -> None:
        self._lengths = lengths
        self._handles = handles
        self._prefix_lengths = prefix_lengths

    def lengths(self) -> torch.Tensor:
        return self._lengths

    def handles(self) -> torch.Tensor:
        return self._handles

    def prefix_lengths(self) -> torch.Tensor:
        assert self._prefix_lengths is not None
        return self._prefix_lengths

    def length(self) -> int:
        return _only(self._lengths)

    def handle(self) -> int:
        return _only(self._handles)

    def prefix_length(self) -> int:
        return _only(self.prefix_lengths())


def _tensor(number: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([number], dtype=dtype, device="cpu")


class Places:
    """A place in the tree for each query: a path length and the handle that it goes with.

    lengths: int32 [B] on the tree's device, in tokens (pairs with bigrams), whole pages.
    handles: int64 [B]. `RadixTree.lock` writes a new handle into it where it has to split an edge.
    length, handle: the same as Python integers, for a batch of one.

    late: None while the numbers are the two integers.
    """

    __slots__ = ("handle", "late", "length")

    length: int
    handle: int
    late: Late | None

    def __init__(self, lengths: torch.Tensor, handles: torch.Tensor) -> None:
        self.late = Tensors(lengths, handles, None)

    def __getattr__(self, name: str) -> Any:
        """The integers, where they are not known yet: an empty slot asks here."""
        if name == "length" or name == "handle":
            late = self.late
            assert late is not None
            return late.length() if name == "length" else late.handle()
        raise AttributeError(f"a {type(self).__name__} has no attribute {name!r}")

    def _as_tensors(self) -> Late:
        late = self.late
        if late is None:
            late = Tensors(_tensor(self.length, torch.int32), _tensor(self.handle, torch.int64), None)
            self.late = late
            del self.length, self.handle  # from now on the tensors are asked
        return late

    @property
    def lengths(self) -> torch.Tensor:
        return self._as_tensors().lengths()

    @property
    def handles(self) -> torch.Tensor:
        return self._as_tensors().handles()

    def __len__(self) -> int:
        return 1 if self.late is None else len(self.late.lengths())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lengths={self.lengths.tolist()})"


class MatchResult(Places):
    """The longest cached prefix of each query."""

    __slots__ = ()


class InsertResult(Places):
    """The end of each inserted key, and how much of it was there before.

    prefix_lengths: int32 [B]; the caller frees its own slots for that part. prefix_length: the same as a Python
    integer, for a batch of one.
    """

    __slots__ = ("prefix_length",)

    prefix_length: int

    def __init__(self, prefix_lengths: torch.Tensor, lengths: torch.Tensor, handles: torch.Tensor) -> None:
        self.late = Tensors(lengths, handles, prefix_lengths)

    def __getattr__(self, name: str) -> Any:
        if name == "prefix_length":
            assert self.late is not None
            return self.late.prefix_length()
        return super().__getattr__(name)

    def _as_tensors(self) -> Late:
        late = self.late
        if late is None:
            prefix_lengths = _tensor(self.prefix_length, torch.int32)
            late = Tensors(_tensor(self.length, torch.int32), _tensor(self.handle, torch.int64), prefix_lengths)
            self.late = late
            del self.length, self.handle, self.prefix_length
        return late

    @property
    def prefix_lengths(self) -> torch.Tensor:
        return self._as_tensors().prefix_lengths()

    def __repr__(self) -> str:
        return f"InsertResult(prefix_lengths={self.prefix_lengths.tolist()}, lengths={self.lengths.tolist()})"


_new_match, _new_insert = MatchResult.__new__, InsertResult.__new__


def one_match(length: int, handle: int) -> MatchResult:
    """A result of one key, of Python integers."""
    result = _new_match(MatchResult)
    result.length = length
    result.handle = handle
    result.late = None
    return result


def one_insert(prefix_length: int, length: int, handle: int) -> InsertResult:
    """A result of one key, of Python integers."""
    result = _new_insert(InsertResult)
    result.prefix_length = prefix_length
    result.length = length
    result.handle = handle
    result.late = None
    return result


def late_match(late: Late) -> MatchResult:
    """A result whose numbers are told later."""
    result = _new_match(MatchResult)
    result.late = late
    return result


def late_insert(late: Late) -> InsertResult:
    """A result whose numbers are told later."""
    result = _new_insert(InsertResult)
    result.late = late
    return result


class EvictResult(NamedTuple):
    """The KV slots that an eviction freed.

    slots: [K] of the tree's slot_dtype on the slot device, node by node in the order of eviction, root to leaf inside a
        node. Those of an eviction that was cut short come first in the next one.
    """

    slots: torch.Tensor
    num_tokens: int
    num_nodes: int
