"""Checking what callers pass besides the queries, and giving it the one type that the kernels are compiled for."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from flatradix import meta
from flatradix.errors import DeviceUnavailableError
from flatradix.layout import MAX_UNITS, pool_units, row_capacity
from flatradix.results import Places, places_of

_EMPTY = np.empty(0, np.int64)
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1


def check_sizes(max_tokens: int, page_size: int, slot_dtype: torch.dtype) -> None:
    for name, value in (("max_tokens", max_tokens), ("page_size", page_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    if max_tokens < page_size:
        raise ValueError(f"max_tokens {max_tokens} is less than one page of {page_size}")
    if pool_units(max_tokens, page_size) > MAX_UNITS or row_capacity(max_tokens, page_size) >= 1 << 28:
        raise ValueError(
            f"max_tokens {max_tokens} with page_size {page_size} is too large: at most 1.7e9 tokens and 2.6e8 pages"
        )
    if slot_dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slot_dtype must be torch.int32 or torch.int64, not {slot_dtype}")


def check_slot_device(device: Any) -> torch.device | None:
    try:
        found = None if device is None else torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"slot_device {device!r} is no device") from None
    if found is not None and found.type == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailableError(f'slot_device="{device}" cannot be used: torch sees no CUDA device')
    if found is not None and found.type == "meta":
        raise ValueError("slot_device meta holds no values")
    return found


def nothing_behind(start: Any, sequences: Any) -> Any:
    """An empty list behind a single place is one empty sequence, elsewhere a batch of none."""
    if isinstance(sequences, list | tuple) and not sequences and isinstance(start, Places) and len(start) == 1:
        return _EMPTY
    return sequences


def check_counts(tokens: np.ndarray, slots: np.ndarray) -> None:
    """One slot a token, query by query."""
    if len(tokens) != len(slots):
        raise ValueError(f"insert: {len(tokens)} queries, but slots for {len(slots)}")
    unequal = np.flatnonzero(tokens != slots)
    if len(unequal):
        query = int(unequal[0])
        raise ValueError(
            f"insert: query {query}: it has {tokens[query]} tokens, but {slots[query]} slots; give one slot a token"
        )


def to_int64(value: Any, what: str) -> int:
    number = int(value)
    if not _LOWEST <= number <= _HIGHEST:
        raise ValueError(f"{what} {number} does not fit 64 bits")
    return number


def token_count(value: Any) -> int:
    """How many tokens to evict."""
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"evict: {value!r} tokens; give an integer") from None
    if count < 0:
        raise ValueError(f"evict: {count} tokens; give a number >= 0")
    return min(count, _HIGHEST)


def starts(start: Any, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [B] lengths and handles to continue from."""
    if start is None:
        return np.zeros(queries, np.int64), np.full(queries, meta.NO_HANDLE, np.int64)
    lengths, handles = places_of(start)
    if len(handles) != queries:
        raise ValueError(f"start has {len(handles)} places for {queries} queries")
    given = handles.numpy().copy()
    given[given < 0] = meta.NO_HANDLE - 1  # no handle that was ever given out
    return lengths.numpy().astype(np.int64), given


def per_query(value: Any, queries: int, what: str) -> np.ndarray:
    """int64 [B] from one integer or one a query."""
    if isinstance(value, int | np.integer):
        return np.full(queries, to_int64(value, what), np.int64)
    values = np.asarray(value)
    if values.shape != (queries,) or (queries and values.dtype.kind not in "iu"):
        raise ValueError(f"{what} must be an integer, or {queries} integers, one a query")
    if queries and int(values.max()) > _HIGHEST:
        raise ValueError(f"{what}: {int(values.max())} does not fit 64 bits")
    return values.astype(np.int64)


def check_table(table: Any, rows: Any, queries: int, device: torch.device, slot_dtype: torch.dtype) -> torch.Tensor:
    """The rows to write to as an int64 tensor, where they are; the table is checked."""
    if not isinstance(table, torch.Tensor) or table.dim() != 2 or table.dtype not in (torch.int32, torch.int64):
        raise ValueError("write_slots: the table must be an int32 or int64 tensor [rows, width]")
    if table.device != device:
        raise ValueError(f"write_slots: the table is on {table.device}, but the slots are on {device}")
    if table.shape[1] > 1 and table.stride(1) != 1:
        raise ValueError("write_slots: the elements of a row of the table must lie next to each other")
    if table.shape[0] > 1 and table.stride(0) < table.shape[1]:
        raise ValueError("write_slots: the rows of the table overlap; each needs memory of its own")
    if table.dtype == torch.int32 and slot_dtype == torch.int64:
        raise ValueError("write_slots: the slots are torch.int64, which a table of torch.int32 does not hold")
    try:
        numbers = rows if isinstance(rows, torch.Tensor) else torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"write_slots: rows must be {queries} integers, one a query, not {rows!r}") from None
    if numbers.shape != (queries,) or (queries and numbers.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"write_slots: rows must be {queries} integers, one a query, "
            f"not {numbers.dtype} of shape {tuple(numbers.shape)}"
        )
    return numbers.to(torch.int64).contiguous()
