"""Reading sequences of integers as memory that a kernel can read, without a copy where possible.

`array`, numpy and torch sequences are read in place if they hold contiguous int32 or int64. Other integer types are
widened. Lists are converted through `array` (7 ns a token; `np.array(list)` takes 16-30 ns).
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.errors import QueryError

# (address, number of elements, whether int64, the owner that keeps the memory alive)
Buffer = tuple[int, int, bool, Any]
_INTEGERS = (int, np.integer)


class Batch(NamedTuple):
    """B sequences in host memory: int64 [B] addresses and element counts, one width for all, and the owners."""

    addresses: np.ndarray
    counts: np.ndarray
    wide: bool
    owner: Any

    def __len__(self) -> int:
        return len(self.counts)


def address_of(values: np.ndarray) -> int:
    """Return the address of an array's first element. ctypes takes 0.3 us, numpy's own attributes take 0.9 us."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(values))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # read-only, or empty
        return int(values.__array_interface__["data"][0])


def _read_array(values: array[int]) -> Buffer:
    if values.typecode in "qil":
        address, count = values.buffer_info()
        return address, count, values.itemsize == 8, values
    if values.typecode in "bBhHIL":
        return _read_numpy(np.frombuffer(values, dtype=values.typecode) if values else np.empty(0, np.int64))
    raise ValueError(f"an array of typecode {values.typecode!r}; token ids and slots are integers: use 'q' or 'i'")


def _read_numpy(values: np.ndarray) -> Buffer:
    kind, flags = values.dtype, values.flags
    if kind.char in "ilq" and kind.isnative and values.ndim == 1 and flags.c_contiguous and flags.aligned:
        return address_of(values), values.size, kind.itemsize == 8, values
    if values.ndim != 1:
        raise ValueError(f"an array of shape {values.shape}; a sequence is 1-D (for rows of a batch pass list(rows))")
    if kind.kind in "iu" and not (kind.kind == "u" and kind.itemsize == 8):
        fitting = np.dtype(np.int32 if kind.kind == "i" and kind.itemsize == 4 else np.int64)
        return address_of(copy := values.astype(fitting, order="C")), copy.size, fitting.itemsize == 8, copy
    raise ValueError(f"dtype {kind}; token ids and slots are int32 or int64")


def _read_tensor(values: torch.Tensor) -> Buffer:
    kind = values.dtype
    wide = kind is torch.int64
    if (wide or kind is torch.int32) and values.ndim == 1 and values.is_cpu and values.is_contiguous():
        return values.data_ptr(), values.numel(), wide, values
    if values.ndim != 1:
        raise ValueError(
            f"a tensor of shape {tuple(values.shape)}; a sequence is 1-D (for rows of a batch pass list(rows))"
        )
    if kind in (torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32):
        return _read_numpy(values.cpu().numpy())
    raise ValueError(f"dtype {kind}; token ids and slots are int32 or int64")


def _read_host_tensor(values: torch.Tensor) -> Buffer | None:
    return _read_tensor(values) if values.is_cpu else None


def _read_memoryview(values: memoryview) -> Buffer:
    if values.format in ("q", "l", "i") and values.ndim == 1 and values.c_contiguous and not values.readonly and values:
        return ctypes.addressof(ctypes.c_char.from_buffer(values)), len(values), values.itemsize == 8, values
    return _read_numpy(np.asarray(values))


def _read_list(values: Sequence[int]) -> Buffer:
    try:
        return _read_array(array("q", values))
    except OverflowError:
        raise ValueError("an integer beyond 64 bits; token ids and slots lie in [0, 2**31 - 1]") from None
    except TypeError:
        wrong = next(v for v in values if not isinstance(v, _INTEGERS))
        raise ValueError(f"{wrong!r} of type {type(wrong).__name__} among the integers of a sequence") from None


_READERS: dict[type, Callable[[Any], Buffer]] = {
    array: _read_array,
    np.ndarray: _read_numpy,
    torch.Tensor: _read_tensor,
    range: _read_list,
    memoryview: _read_memoryview,
    list: _read_list,
    tuple: _read_list,
}
# Types that are always one sequence. A list or a tuple may also be a batch.
_KEYS: dict[type, Callable[[Any], Buffer | None]] = {
    **{kind: read for kind, read in _READERS.items() if kind not in (list, tuple)},
    torch.Tensor: _read_host_tensor,
}
_BATCHES: list[type] = []


def declare_batch(kind: type) -> None:
    """Declare a class: its objects are batches, never one sequence."""
    _BATCHES.append(kind)


def _reader(values: Any) -> Callable[[Any], Buffer]:
    """Return the reader for an object of a subclass, or of a type with `__array__`."""
    if isinstance(values, np.ma.MaskedArray):
        raise ValueError("a masked array; pass what is not masked, .compressed()")
    for kind in (torch.Tensor, np.ndarray, array, list, tuple):
        if isinstance(values, kind):
            return _READERS[kind]
    if hasattr(values, "__array__"):
        return lambda v: _read_numpy(np.asarray(v))
    raise ValueError(
        f"a {type(values).__name__} is no sequence of integers: pass a list, an array, a numpy array or a tensor"
    )


def read_one(values: Any, what: str, query: int = 0) -> Buffer:
    """Return one sequence as a buffer. `what` ("tokens", "slots") and `query` are named in the QueryError."""
    try:
        return (_READERS.get(type(values)) or _reader(values))(values)
    except ValueError as error:
        raise QueryError(f"{what} of query {query}: {error}", query) from None


def is_batch(queries: Any) -> bool:
    """Return whether `queries` is a batch rather than one flat sequence. An empty list is one empty sequence."""
    if isinstance(queries, list | tuple):
        return len(queries) > 0 and not isinstance(queries[0], _INTEGERS)
    return isinstance(queries, tuple(_BATCHES))


def is_on_device(values: Any) -> bool:
    """Return whether `values` is a tensor that is not in host memory."""
    return isinstance(values, torch.Tensor) and not values.is_cpu


def read_host_key(queries: Any, what: str) -> Buffer | None:
    """Read one flat sequence in host memory as a buffer. None for a batch and for a tensor on a device.

    Raises QueryError.
    """
    kind = type(queries)
    reader = _KEYS.get(kind)
    if reader is None:
        if kind in _BATCHES or is_batch(queries):
            return None
        # Asked for last: isinstance of a tensor takes 0.3 us for anything else.
        return None if kind not in _READERS and is_on_device(queries) else read_one(queries, what)
    try:
        return reader(queries)
    except ValueError as error:
        raise QueryError(f"{what} of query 0: {error}", 0) from None


def read_many(queries: Sequence[Any], what: str) -> Batch:
    """Return a list of sequences as a Batch; its owner is the list of buffers. Raises QueryError."""
    buffers = [read_one(values, what, query) for query, values in enumerate(queries)]
    widths = {buffer[2] for buffer in buffers}
    if len(widths) == 2:
        buffers = [b if b[2] else _read_numpy(np.asarray(b[3]).astype(np.int64)) for b in buffers]
    addresses = np.array([buffer[0] for buffer in buffers], np.int64)
    return Batch(addresses, np.array([buffer[1] for buffer in buffers], np.int64), True in widths, buffers)
