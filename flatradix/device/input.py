"""Bringing the inputs of callers to a GPU: in place if they are there, through pinned memory if not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flatradix.errors import QueryError
from flatradix.inputs.arguments import check_counts, check_slot_queries, per_query, to_int64
from flatradix.inputs.places import read_places
from flatradix.inputs.ragged import Ragged, read_batch
from flatradix.inputs.refuse import refuse_unequal
from flatradix.inputs.sequences import Batch, Buffer, is_batch, is_on_device, read_host_key, read_one
from flatradix.inputs.upload import refuse_in_graph, upload, upload_numbers
from flatradix.layout.desk import STAGED_TOKENS
from flatradix.layout.queries import PerQuery, PlaceAddresses, Values

_ZERO = PerQuery(0, 0)


def known_counts(values: Values) -> np.ndarray | None:
    """Return the counts of a batch or of a single sequence, None if only the device knows them."""
    return np.array([values.total]) if values.offsets == 0 else values.counts


def key_counts(values: Values) -> np.ndarray:
    """Return the counts of a batch. Synchronises if only the device knows them. Offsets are not checked here."""
    known = known_counts(values)
    return np.diff(values.owner[1].cpu().numpy()) if known is None else known


def as_batch(values: Values, device: torch.device) -> Values:
    """Return a single sequence as a batch of one on the device, with offsets there."""
    if values.on_host:
        values = of_key((values.address, values.total, values.wide, values.owner), device)
    offsets = torch.arange(2, device=device) * values.total
    return values._replace(offsets=offsets.data_ptr(), owner=(values.owner, offsets))


def _in_place(values: torch.Tensor, what: str, query: int = 0) -> torch.Tensor:
    """Return a 1-D tensor on the device as contiguous int32 or int64. Raises QueryError for other shapes and dtypes."""
    if values.dim() != 1:
        raise QueryError(f"{what} of query {query}: a tensor of shape {tuple(values.shape)}; a sequence is 1-D", query)
    if values.dtype not in (torch.int32, torch.int64):
        if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype in (torch.bool, torch.uint64):
            raise QueryError(
                f"{what} of query {query}: dtype {values.dtype}; token ids and slots are int32 or int64", query
            )
        values = values.to(torch.int64)
    return values.contiguous()


def _joined(values: torch.Tensor, offsets: torch.Tensor, counts: np.ndarray | None) -> Values:
    """Return sequences that lie one after another on the device, int32 or int64, with the offset of each."""
    wide, total, batch = values.dtype is torch.int64, values.shape[0], offsets.shape[0] - 1
    return Values(values.data_ptr(), wide, offsets.data_ptr(), total, batch, counts, (values, offsets))


def _of_ragged(ragged: Ragged, device: torch.device, what: str) -> Values:
    values, offsets = ragged.values, ragged.offsets
    counts = None
    if values.is_cpu:
        ragged.validate()
        counts = np.diff(offsets.numpy())
    if values.device != device:
        values, offsets = upload(values, device), upload(offsets, device)
    if values.dtype not in (torch.int32, torch.int64) or not values.is_contiguous():
        values = _in_place(values, what)
    return _joined(values, offsets.contiguous(), counts)


def of_key(key: Buffer, device: torch.device) -> Values:
    """Bring one sequence from host memory to the device."""
    _address, count, wide, owner = key
    values = upload(torch.from_numpy(np.asarray(owner)), device)
    return Values(values.data_ptr(), wide, 0, count, 1, None, (values, owner))


def _of_tensor(values: torch.Tensor, what: str) -> Values:
    values = _in_place(values, what)
    return Values(values.data_ptr(), values.dtype == torch.int64, 0, values.numel(), 1, None, values)


def _of_host_batch(batch: Batch, device: torch.device) -> Values:
    """Concatenate host sequences in pinned memory, and enqueue their copy to the device."""
    refuse_in_graph(device)
    parts = [np.asarray(buffer[3]) for buffer in batch.owner]
    kind = torch.int64 if batch.wide else torch.int32
    pinned = torch.empty(int(batch.counts.sum()), dtype=kind, device="cpu", pin_memory=device.type == "cuda")
    if parts:
        np.concatenate(parts, out=pinned.numpy(), casting="same_kind")
    offsets = np.zeros(len(batch) + 1, np.int64)
    np.cumsum(batch.counts, out=offsets[1:])
    return _joined(upload(pinned, device), upload_numbers(offsets, device), batch.counts)


def _of_mixed(sequences: Sequence[Any], device: torch.device, what: str) -> Values:
    """Bring a list of sequences to the device; at least one of them is on a device."""
    tensors = []
    for query, part in enumerate(sequences):
        if is_on_device(part):
            tensors.append(_in_place(part, what, query).to(device))
        else:
            tensors.append(upload(torch.from_numpy(np.asarray(read_one(part, what, query)[3])), device))
    refuse_in_graph(device)  # the offsets are in host memory
    counts = np.array([len(part) for part in tensors], np.int64)
    kind = torch.int64 if any(part.dtype == torch.int64 for part in tensors) else torch.int32
    offsets = np.zeros(len(tensors) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return _joined(torch.cat([part.to(kind) for part in tensors]), upload_numbers(offsets, device), counts)


def read_values(sequences: Any, device: torch.device, what: str) -> Values:
    """Read a batch in any form that the operations take. `what` ("tokens", "slots") is named in errors."""
    if isinstance(sequences, Ragged):
        return _of_ragged(sequences, device, what)
    if is_on_device(sequences):
        return _of_tensor(sequences.to(device), what)
    if is_batch(sequences):
        if any(is_on_device(part) for part in sequences):
            return _of_mixed(sequences, device, what)
        return _of_host_batch(read_batch(sequences, what), device)
    return of_key(read_one(sequences, what), device)


def read_keys(queries: Any, device: torch.device) -> Values:
    """Read the keys of an insert. A short key in host memory stays there."""
    key = read_host_key(queries, "tokens")
    return read_values(queries, device, "tokens") if key is None else _short_or_there(key, device)


def _short_or_there(key: Buffer, device: torch.device) -> Values:
    """Return one sequence in host memory as it is, or on the device if it is too long for a pinned buffer."""
    address, count, wide, owner = key
    if count > STAGED_TOKENS:
        return of_key(key, device)
    return Values(address, wide, 0, count, 1, None, owner, on_host=True)


def read_slots(slots: Any, keys: Values, device: torch.device, wide: bool) -> Values:
    """Read the slots of a batch. A batch of one may come as one sequence, and a single sequence as a batch of one.

    Short slots of a single key stay in host memory, unless the tree's slots have 64 bits (`wide`).
    """
    single = read_host_key(slots, "slots") if keys.offsets == 0 and not wide else None
    if single is not None:
        if keys.total != single[1]:
            refuse_unequal(0, keys.total, single[1])
        return _short_or_there(single, device)
    source = read_values(slots, device, "slots")
    check_slot_queries(keys.batch, source.batch)
    if keys.offsets == 0 == source.offsets:
        if keys.total != source.total:
            refuse_unequal(0, keys.total, source.total)
        return source
    tokens, counts = known_counts(keys), known_counts(source)
    if tokens is not None and counts is not None:
        check_counts(tokens, counts)
    if (keys.offsets == 0) != (source.offsets == 0):
        source = as_batch(source, device)
    return source


def read_numbers(value: Any, batch: int, device: torch.device, what: str) -> PerQuery:
    """Read one integer, or one a query, such as priorities. A tensor on the device is not copied to the host."""
    if type(value) is int:
        return PerQuery(0, to_int64(value, what)) if value else _ZERO
    if isinstance(value, torch.Tensor) and not value.is_cpu:
        if value.shape != (batch,) or value.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{what} must be an integer, or {batch} integers, one a query")
        numbers = value.to(device, torch.int64).contiguous()
        return PerQuery(numbers.data_ptr(), 0, numbers)
    return numbers_of(per_query(value, batch, what), device)


def numbers_of(found: np.ndarray, device: torch.device) -> PerQuery:
    """Bring int64 [B] from host memory to the device. Equal numbers become one number for all queries, not copied."""
    if len(found) == 0 or (found == found[0]).all():
        return PerQuery(0, int(found[0]) if len(found) else 0)
    numbers = upload_numbers(found, device)
    return PerQuery(numbers.data_ptr(), 0, numbers)


def places_on(places: Any, device: torch.device) -> PlaceAddresses:
    """Return the addresses of places. Their tensors must be on the device."""
    lengths, handles = read_places(places, device)
    handles = handles.contiguous()
    return PlaceAddresses(handles.data_ptr(), lengths.data_ptr(), len(handles), (lengths, handles))
