"""DeviceArguments: what callers pass to a tree on a GPU, as addresses on the device and numbers for its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flatradix import namespaces
from flatradix.arguments import check_counts, per_query
from flatradix.device_calls import DeviceCalls
from flatradix.device_input import Values, read_values, upload_numbers
from flatradix.results import places_of


class DeviceArguments(DeviceCalls):
    """The part of a DeviceTree that reads arguments.

    Those that may differ from query to query come as (address of one a query or 0, the number for all, owner), where
    the owner keeps the memory alive until the kernels are enqueued.
    """

    def _read_names(self, namespace: Any, batch: int, codes: Sequence[int] | None = None) -> tuple[int, int, Any]:
        """(address of one number a query or 0, the number for all, owner): code * 2 + whether a name was given."""
        if codes is None and not isinstance(namespace, list | tuple):
            namespaces.check(namespace)
            code = self._namespaces.find(namespace)
            return 0, 2 * code + (namespace is not None), None
        names = namespaces.spread(namespace, batch)
        found = [self._namespaces.find(name) for name in names] if codes is None else codes
        packed = [2 * code + (name is not None) for code, name in zip(found, names, strict=True)]
        if len(set(packed)) <= 1:
            return 0, packed[0] if packed else 0, None
        numbers = upload_numbers(np.array(packed, np.int64), self.device)
        return numbers.data_ptr(), 0, numbers

    def _read_starts(self, start: Any, batch: int) -> tuple[int, int, Any]:
        """(address of the handles, of the lengths, owner); 0 without a start."""
        if start is None:
            return 0, 0, None
        lengths, handles = self._places(start)
        if len(handles) != batch:
            raise ValueError(f"start has {len(handles)} places for {batch} queries")
        return handles.data_ptr(), lengths.data_ptr(), (lengths, handles)

    def _places(self, places: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lengths, handles = places_of(places, self.device)
        return lengths, handles.contiguous()

    def _read_numbers(self, value: Any, batch: int, what: str) -> tuple[int, int, Any]:
        """(address of int64 [B] or 0, the number for all, owner) of a priority or the like."""
        if isinstance(value, torch.Tensor) and not value.is_cpu:
            if value.shape != (batch,) or value.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{what} must be an integer, or {batch} integers, one a query")
            numbers = value.to(self.device, torch.int64).contiguous()
            return numbers.data_ptr(), 0, numbers
        found = per_query(value, batch, what)
        if batch == 0 or (found == found[0]).all():
            return 0, int(found[0]) if batch else 0, None
        numbers = upload_numbers(found, self.device)
        return numbers.data_ptr(), 0, numbers

    def _read_slots(self, slots: Any, keys: Values) -> Values:
        """The slots of a batch; a batch of one may come as one sequence, and a single sequence as a batch of one."""
        source = read_values(slots, self.device, "slots")
        if source.batch != keys.batch:
            raise ValueError(f"insert: {keys.batch} queries, but slots for {source.batch}")
        if keys.counts is not None and source.counts is not None:
            check_counts(keys.counts, source.counts)
        if (keys.offsets == 0) != (source.offsets == 0):
            bounds = upload_numbers(np.array([0, source.total]), self.device)
            source = source._replace(offsets=bounds.data_ptr(), owner=(source.owner, bounds))
        return source

    def _codes_to_insert(self, namespace: Any, keys: Values) -> list[int] | None:
        """The namespace code of each query, given out where a key may store something; None if all have the same."""
        many = isinstance(namespace, list | tuple)
        names = namespaces.spread(namespace, keys.batch) if many else [namespaces.only(namespace)]
        if len(self._namespaces) + len(names) > len(self._state.namespace_hash):
            self._wait()  # inserts that were refused may have been given names for nothing
        counts = keys.counts
        if counts is None and len(self._namespaces) + len(names) > len(self._state.namespace_hash):
            counts = keys.read_counts()  # more names than pages: only keys that store something may have one
        if counts is not None and not many:
            counts = counts.max(keepdims=True)
        codes = []
        for query, name in enumerate(names):
            code = self._namespaces.find(name)
            if code < 0 and (counts is None or counts[query] >= self.page_size + self.bigram):
                code = self._namespaces.give(name)
                self._fresh.add(code)
                self._unsure |= counts is None
            codes.append(code)
        return codes if many else None
