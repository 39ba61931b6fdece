"""Bringing what callers hand in to a GPU: in place where it is there, through pinned memory where it is not."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.buffers import Batch, is_single, read_batch, read_one
from flatradix.mailbox import Mailbox
from flatradix.ragged import Ragged

HOST_IN_GRAPH = "a CUDA graph cannot hold inputs in host memory: pass tensors on the device"
STAGED_BYTES = 1 << 16
_STAGES = 32


class Values(NamedTuple):
    """A batch of sequences on the device.

    address: of int64 (`wide`) or int32 values. offsets: address of int64 [B + 1], 0 for a single sequence.
    counts: int64 [B] on the host, None where only the device knows them.
    owner: keeps the memory alive until the kernels are enqueued.
    """

    address: int
    wide: bool
    offsets: int
    total: int
    batch: int
    counts: np.ndarray | None
    owner: Any

    def read_counts(self) -> np.ndarray:
        """The counts; synchronises where only the device knows them. Of offsets that are wrong, whatever they say."""
        if self.counts is not None:
            return self.counts
        return np.diff(self.owner[1].cpu().numpy())

    def as_batch(self, device: torch.device) -> Values:
        """A single sequence as a batch of one, with offsets on the device."""
        offsets = torch.arange(2, device=device) * self.total
        return self._replace(offsets=offsets.data_ptr(), owner=(self.owner, offsets))


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the device, without waiting; torch uses pinned memory again only when the copy is done."""
    if values.device == device:
        return values
    if not values.is_cpu or device.type != "cuda":
        return values.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(HOST_IN_GRAPH)
    pinned = values if values.is_pinned() else values.pin_memory()
    return pinned.to(device, non_blocking=True)


def upload_numbers(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The same for int64 numbers, one a query."""
    return upload(torch.from_numpy(np.ascontiguousarray(values, np.int64)), device)


class Stages:
    """Pinned buffers for single keys, which kernels read where they are: a copy costs a launch of its own, 5 us."""

    def __init__(self, device: torch.device, mail: Mailbox) -> None:
        self._buffers = torch.empty(
            _STAGES * STAGED_BYTES, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda"
        )
        self._address = self._buffers.data_ptr()
        self._calls = [0] * _STAGES
        self._mail = mail
        self._next = 0

    def put(self, address: int, size: int) -> int:
        """Copy `size` bytes; returns where they are now. Without a `commit` the next key takes the same buffer."""
        if self._calls[self._next]:
            self._mail.await_answer(self._calls[self._next])  # then the kernel that read this buffer is done
        target = self._address + self._next * STAGED_BYTES
        ctypes.memmove(target, address, size)
        return target

    def commit(self, call: int) -> None:
        """The kernel of `call`, which is to answer, reads what was put last."""
        self._calls[self._next] = call
        self._next = (self._next + 1) % _STAGES


def _in_place(values: torch.Tensor, what: str, query: int = 0) -> torch.Tensor:
    """A 1-D tensor on the device as int32 or int64, next to each other."""
    if values.dim() != 1:
        raise ValueError(f"{what} of query {query}: a tensor of shape {tuple(values.shape)}; a sequence is 1-D")
    if values.dtype not in (torch.int32, torch.int64):
        if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype in (torch.bool, torch.uint64):
            raise ValueError(f"{what} of query {query}: dtype {values.dtype}; token ids and slots are int32 or int64")
        values = values.to(torch.int64)
    return values.contiguous()


def _of_ragged(ragged: Ragged, device: torch.device, what: str) -> Values:
    values, offsets = ragged.values, ragged.offsets
    counts = None
    if values.is_cpu:
        ragged.validate()
        counts = np.diff(offsets.numpy())
        if values.dtype not in (torch.int32, torch.int64):
            read_one(values[:0], what)  # raises for what is no integer
    values = _in_place(upload(values, device), what)
    offsets = upload(offsets, device).contiguous()
    wide = values.dtype is torch.int64
    return Values(
        values.data_ptr(), wide, offsets.data_ptr(), values.shape[0], offsets.shape[0] - 1, counts, (values, offsets)
    )


def _of_tensor(values: torch.Tensor, what: str) -> Values:
    values = _in_place(values, what)
    counts = np.array([values.numel()])
    return Values(values.data_ptr(), values.dtype == torch.int64, 0, values.numel(), 1, counts, values)


def _joined(batch: Batch, device: torch.device) -> Values:
    """Host sequences, one after another in pinned memory and on their way to the device."""
    parts = [np.asarray(buffer[3]) for buffer in batch.owner]
    total = int(batch.counts.sum())
    kind = torch.int64 if batch.wide else torch.int32
    pinned = torch.empty(total, dtype=kind, device="cpu", pin_memory=device.type == "cuda")
    if parts:
        np.concatenate(parts, out=pinned.numpy(), casting="same_kind")
    offsets = np.zeros(len(batch) + 1, np.int64)
    np.cumsum(batch.counts, out=offsets[1:])
    values, bounds = upload(pinned, device), upload_numbers(offsets, device)
    counts = batch.counts
    return Values(values.data_ptr(), batch.wide, bounds.data_ptr(), total, len(batch), counts, (values, bounds, parts))


def _of_list(sequences: Sequence[Any], device: torch.device, what: str) -> Values:
    on_device = [isinstance(part, torch.Tensor) and not part.is_cpu for part in sequences]
    if not any(on_device):
        return _joined(read_batch(sequences, what), device)
    tensors = []
    for query, part in enumerate(sequences):
        if on_device[query]:
            tensors.append(_in_place(part, what, query).to(device))
        else:
            tensors.append(upload(torch.from_numpy(np.asarray(read_one(part, what, query)[3])), device))
    counts = np.array([len(part) for part in tensors], np.int64)
    kind = torch.int64 if any(part.dtype == torch.int64 for part in tensors) else torch.int32
    values = torch.cat([part.to(kind) for part in tensors])
    offsets = np.zeros(len(tensors) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    bounds = upload_numbers(offsets, device)
    owner = (values, bounds)
    return Values(values.data_ptr(), kind == torch.int64, bounds.data_ptr(), len(values), len(counts), counts, owner)


def read_values(sequences: Any, device: torch.device, what: str) -> Values:
    """A batch in any of the forms that the operations take. `what` is named in errors ("tokens", "slots")."""
    if isinstance(sequences, Ragged):
        return _of_ragged(sequences, device, what)
    if not is_single(sequences):
        return _of_list(sequences, device, what)
    if isinstance(sequences, torch.Tensor) and not sequences.is_cpu:
        return _of_tensor(sequences.to(device), what)
    _address, count, wide, owner = read_one(sequences, what)
    values = upload(torch.from_numpy(np.asarray(owner)), device)
    return Values(values.data_ptr(), wide, 0, count, 1, np.array([count]), (values, owner))
