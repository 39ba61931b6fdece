"""Ragged: a batch of sequences of different lengths in two tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from flatradix.errors import QueryError
from flatradix.inputs.sequences import Batch, declare_batch, is_batch, read_many, read_one


class Ragged:
    """B sequences of integers: sequence i is `values[offsets[i]:offsets[i + 1]]`.

    values: 1-D tensor of any integer dtype, on any device; int32 and int64 are read without a copy.
    offsets: int64 [B + 1] on the same device. They begin at 0, never fall, and end at len(values). int32 offsets, such
        as cu_seqlens, are copied to int64.

    No other tensor is copied. Raises ValueError if they do not fit together. Offsets on another device than the CPU are
    not read here: `validate` reads and checks them, and operations of a tree on the CPU call it.
    """

    __slots__ = ("offsets", "values")

    def __init__(self, values: torch.Tensor | np.ndarray, offsets: torch.Tensor | np.ndarray) -> None:
        # Tensors stay on their device and numpy arrays in host memory, whatever torch's default device is.
        self.values, self.offsets = (
            part if isinstance(part, torch.Tensor) else torch.as_tensor(part, device="cpu")
            for part in (values, offsets)
        )
        if self.values.dim() != 1:
            raise ValueError(f"values must be 1-D, not of shape {tuple(self.values.shape)}")
        if self.offsets.dim() != 1 or self.offsets.dtype not in (torch.int32, torch.int64) or len(self.offsets) == 0:
            raise ValueError(
                f"offsets must be int64 or int32 [B + 1], not {self.offsets.dtype} of shape {tuple(self.offsets.shape)}"
            )
        if self.offsets.dtype == torch.int32:  # as of the cu_seqlens of attention kernels
            wide = torch.from_numpy(self.offsets.numpy().astype(np.int64)) if self.offsets.is_cpu else None
            self.offsets = self.offsets.to(torch.int64) if wide is None else wide
        if self.values.device != self.offsets.device:
            raise ValueError(f"values are on {self.values.device}, offsets on {self.offsets.device}")
        if self.values.device.type == "cpu":
            self.validate()

    @classmethod
    def trusted(cls, values: torch.Tensor, offsets: torch.Tensor) -> Ragged:
        """Make a Ragged without checks, from tensors that are known to fit together."""
        self = cls.__new__(cls)
        self.values = values
        self.offsets = offsets
        return self

    def validate(self) -> np.ndarray:
        """Raise ValueError unless the offsets begin at 0, never fall, and end at len(values). Synchronises.

        Returns the offsets in host memory, int64 [B + 1].
        """
        offsets = self.offsets.cpu().numpy()
        if offsets[0] != 0 or offsets[-1] != len(self.values):
            raise ValueError(
                f"offsets run from {offsets[0]} to {offsets[-1]}, but there are {len(self.values)} values: "
                "they must begin at 0 and end at len(values)"
            )
        falling = offsets[1:] < offsets[:-1]
        if falling.any():
            query = int(falling.argmax())
            raise QueryError(f"offsets fall at query {query}: from {offsets[query]} to {offsets[query + 1]}", query)
        found: np.ndarray = offsets
        return found

    @classmethod
    def from_sequences(cls, sequences: Sequence[Any], what: str = "values") -> Ragged:
        """Copy sequences (lists, `array`, numpy, tensors) into one Ragged in host memory.

        The dtype is int32 if all sequences are int32, else int64. `what` names the sequences in errors. Raises
        ValueError for an item that is not a sequence.
        """
        if not isinstance(sequences, list | tuple):
            sequences = list(sequences)
        if len(sequences) and isinstance(sequences[0], int | np.integer):
            raise ValueError("from_sequences takes a list of sequences; wrap a single one: [sequence]")
        batch = read_many(sequences, what)
        offsets = np.zeros(len(batch) + 1, dtype=np.int64)
        np.cumsum(batch.counts, out=offsets[1:])
        parts = [np.asarray(buffer[3]) for buffer in batch.owner]
        dtype = np.int64 if batch.wide or not parts else np.int32
        values = np.concatenate(parts) if parts else np.empty(0, dtype)
        return cls(torch.from_numpy(values.astype(dtype, copy=False)), torch.from_numpy(offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return sequence `index` as a view. Reads two offsets from the device."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"query {index} of a batch of {count}")
        index %= count
        return self.values[int(self.offsets[index]) : int(self.offsets[index + 1])]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to(self, device: str | torch.device) -> Ragged:
        return Ragged(self.values.to(device), self.offsets.to(device))

    def to_list(self) -> list[list[int]]:
        values = self.values.tolist()
        offsets = self.offsets.tolist()
        return [values[a:b] for a, b in pairwise(offsets)]

    def __repr__(self) -> str:
        return f"Ragged({len(self)} sequences, {len(self.values)} values, {self.values.dtype}, {self.device})"


declare_batch(Ragged)


def _read_ragged(ragged: Ragged, what: str) -> Batch:
    offsets = ragged.validate()
    address, _, wide, owner = read_one(ragged.values, what)
    return Batch(address + offsets[:-1] * (8 if wide else 4), np.diff(offsets), wide, (owner, offsets))


def read_batch(queries: Any, what: str) -> Batch:
    """Read a Ragged, a list of sequences, or one flat sequence (a batch of one) as a batch in host memory.

    A Batch is returned as it is: its maker vouches for it.

    `what` ("tokens", "slots") is named in errors. Raises QueryError, or ValueError for bad offsets.
    """
    if isinstance(queries, Ragged):
        return _read_ragged(queries, what)
    if isinstance(queries, Batch):
        return queries
    if is_batch(queries):
        return read_many(queries, what)
    address, count, wide, _owner = buffer = read_one(queries, what)
    return Batch(np.array([address]), np.array([count]), wide, [buffer])
