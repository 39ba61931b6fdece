"""The results of the operations: one class for each operation, no matter when its numbers become known.

A result of one key on the CPU holds Python integers, and makes tensors only when a caller asks for them. All other
results take their numbers from a source (`late`): from tensors, or from a kernel that may not have run yet.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch


class Late(Protocol):
    """The source of a result's numbers. The methods that return an integer need a batch of one."""

    def count(self) -> int: ...

    def lengths(self) -> torch.Tensor: ...

    def handles(self) -> torch.Tensor: ...

    def prefix_lengths(self) -> torch.Tensor: ...

    def host_lengths(self) -> torch.Tensor: ...

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
    """The numbers of a batch as tensors: int32 [B] lengths and prefix lengths, int64 [B] handles."""

    __slots__ = ("_handles", "_lengths", "_prefix_lengths")

    def __init__(self, lengths: torch.Tensor, handles: torch.Tensor, prefix_lengths: torch.Tensor | None) -> None:
        self._lengths = lengths
        self._handles = handles
        self._prefix_lengths = prefix_lengths

    def count(self) -> int:
        return len(self._lengths)

    def lengths(self) -> torch.Tensor:
        return self._lengths

    def handles(self) -> torch.Tensor:
        return self._handles

    def prefix_lengths(self) -> torch.Tensor:
        assert self._prefix_lengths is not None
        return self._prefix_lengths

    def host_lengths(self) -> torch.Tensor:
        return self._lengths.cpu()

    def length(self) -> int:
        return _only(self._lengths)

    def handle(self) -> int:
        return _only(self._handles)

    def prefix_length(self) -> int:
        return _only(self.prefix_lengths())


def _tensor(number: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([number], dtype=dtype, device="cpu")


class Places:
    """A place in the tree for each query: a handle, and a length from the root on the path of its node.

    lengths: int32 [B] on the tree's device, in tokens (pairs with bigrams), whole pages.
    handles: int64 [B] on the tree's device. `RadixTree.lock` and `split` write new handles where they split edges.
    length, handle: the same numbers as Python integers, for a batch of one.

    late: the source of the numbers; None while the result itself holds the two integers.
    """

    __slots__ = ("handle", "late", "length")

    length: int
    handle: int
    late: Late | None

    def __init__(self, lengths: torch.Tensor, handles: torch.Tensor) -> None:
        self.late = Tensors(lengths, handles, None)

    def __getattr__(self, name: str) -> Any:
        """Return an integer that is not set yet: Python calls this method when the attribute's slot is empty."""
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
            del self.length, self.handle  # from now on `__getattr__` reads the tensors
        return late

    @property
    def lengths(self) -> torch.Tensor:
        return self._as_tensors().lengths()

    @property
    def handles(self) -> torch.Tensor:
        return self._as_tensors().handles()

    @property
    def host_lengths(self) -> torch.Tensor:
        """The lengths in host memory, int32 [B]. Waits for the call, and is faster than `lengths.cpu()` after a match.

        They are -1 if the call was refused: `RadixTree.raise_pending` tells why, or this property if B is one.
        """
        return self._as_tensors().host_lengths()

    def __len__(self) -> int:
        return 1 if self.late is None else self.late.count()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(lengths={self.lengths.tolist()})"


class MatchResult(Places):
    """The longest cached prefix of each query."""

    __slots__ = ()


class InsertResult(Places):
    """The end of each inserted key, and how much of the key was cached before.

    prefix_lengths: int32 [B]. The caller frees its own slots for that part of each key. prefix_length: the same number
    as a Python integer, for a batch of one.
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
    """Return the result of one key from Python integers."""
    result = _new_match(MatchResult)
    result.length = length
    result.handle = handle
    result.late = None
    return result


def one_insert(prefix_length: int, length: int, handle: int) -> InsertResult:
    """Return the result of one key from Python integers."""
    result = _new_insert(InsertResult)
    result.prefix_length = prefix_length
    result.length = length
    result.handle = handle
    result.late = None
    return result


def late_match(late: Late) -> MatchResult:
    """Return a result that takes its numbers from `late`."""
    result = _new_match(MatchResult)
    result.late = late
    return result


def late_insert(late: Late) -> InsertResult:
    """Return a result that takes its numbers from `late`."""
    result = _new_insert(InsertResult)
    result.late = late
    return result


class EvictIntoResult(NamedTuple):
    """What an eviction wrote into the caller's tensor (`out`).

    slots: that tensor, [M]. Its first `num_tokens` elements are the freed slots, in the order of `EvictResult.slots`;
        the others are as they were.
    num_tokens, num_nodes: as in `EvictResult`, as tensors int64 [] beside the index; -1 if a GPU refused the call.
    """

    slots: torch.Tensor
    num_tokens: torch.Tensor
    num_nodes: torch.Tensor


def written(out: torch.Tensor, slots: torch.Tensor, num_nodes: int) -> EvictIntoResult:
    """Write the slots of an eviction by an index in host memory to the caller's tensor, and return the result."""
    if out.is_cpu:
        out.numpy()[: len(slots)] = slots.numpy()  # threads of torch do not survive a fork
    else:
        out[: len(slots)].copy_(slots)
    return EvictIntoResult(out, torch.tensor(len(slots), device="cpu"), torch.tensor(num_nodes, device="cpu"))


class EvictResult(NamedTuple):
    """The KV slots that an eviction or a drop freed.

    slots: [K] of the tree's slot_dtype on the slot device, node by node in the order of eviction, and inside a node in
        the order of its tokens. The slots of an earlier, interrupted eviction come first.
    num_tokens: K. num_nodes: whole nodes that this eviction freed, without those of an interrupted one.
    """

    slots: torch.Tensor
    num_tokens: int
    num_nodes: int
