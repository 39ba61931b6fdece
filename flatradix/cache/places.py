"""The place that each running request holds, by its row of the slot table: as integers, or as tensors on a GPU."""

from __future__ import annotations

import numpy as np
import torch

from flatradix.inputs.upload import upload_numbers
from flatradix.results import Places, one_match


class HostPlaces:
    """Places for an index on the CPU. A single place stays Python integers: the tree then makes no tensors for it."""

    def __init__(self, rows: int) -> None:
        self._handles = [0] * rows
        self._lengths = [0] * rows

    def set(self, rows: list[int], places: Places) -> None:
        if len(rows) == 1:
            self._handles[rows[0]], self._lengths[rows[0]] = places.handle, places.length
            return
        for row, handle, length in zip(rows, places.handles.tolist(), places.lengths.tolist(), strict=True):
            self._handles[row], self._lengths[row] = handle, length

    def get(self, rows: list[int]) -> Places:
        if len(rows) == 1:
            return one_match(self._lengths[rows[0]], self._handles[rows[0]])
        lengths = torch.tensor([self._lengths[row] for row in rows], dtype=torch.int32, device="cpu")
        handles = torch.tensor([self._handles[row] for row in rows], dtype=torch.int64, device="cpu")
        return Places(lengths, handles)


class DevicePlaces:
    """Places for an index on a GPU. No method waits for the device."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._handles = torch.zeros(rows, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=device)

    def set(self, rows: list[int], places: Places) -> None:
        index = self._index(rows)
        self._handles[index] = places.handles
        self._lengths[index] = places.lengths

    def get(self, rows: list[int]) -> Places:
        index = self._index(rows)
        return Places(self._lengths[index], self._handles[index])

    def _index(self, rows: list[int]) -> torch.Tensor:
        return upload_numbers(np.array(rows, np.int64), self._handles.device)


def some_of(places: Places, queries: list[int]) -> Places:
    """Return the places of some queries. queries: indices, ascending and distinct."""
    if len(queries) == len(places):
        return places
    index = upload_numbers(np.array(queries, np.int64), places.handles.device)
    return Places(places.lengths[index], places.handles[index])
