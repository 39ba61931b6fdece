"""Checking the arguments other than queries, and converting each to the one type that the kernels are compiled for."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch

from flatradix.inputs.refuse import refuse_negative, refuse_unequal

_LOWEST, _HIGHEST = -(2**63), 2**63 - 1


def check_counts(tokens: np.ndarray, slots: np.ndarray) -> None:
    """Raise QueryError unless each query has one slot a token. tokens, slots: counts, int64 [B]."""
    check_slot_queries(len(tokens), len(slots))
    unequal = np.flatnonzero(tokens != slots)
    if len(unequal):
        query = int(unequal[0])
        refuse_unequal(query, tokens[query], slots[query])


def check_slot_queries(queries: int, slots: int) -> None:
    if queries != slots:
        raise ValueError(f"insert: {queries} queries, but slots for {slots}")


def to_int64(value: Any, what: str) -> int:
    number = int(value)
    if not _LOWEST <= number <= _HIGHEST:
        raise ValueError(f"{what} {number} does not fit 64 bits")
    return number


def token_count(value: Any) -> int:
    """Return the number of tokens to evict, checked."""
    try:
        count = operator.index(value)
    except TypeError:
        raise ValueError(f"evict: {value!r} tokens; give an integer") from None
    if count < 0:
        refuse_negative(count)
    return min(count, _HIGHEST)


def check_out(out: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError unless `out` can take slots of this dtype, which are on this device."""
    if not isinstance(out, torch.Tensor) or out.dim() != 1 or out.dtype != dtype or not out.is_contiguous():
        got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise ValueError(f"evict: out must be a contiguous tensor [M] of {dtype}, not {got}")
    if out.device != device:
        raise ValueError(f"evict: out is on {out.device}, but the slots are on {device}")


def positive(name: str, value: Any) -> int:
    """Return the argument `name`, checked. Raises ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a positive integer, not {value!r}")
    return int(value)


def per_query(value: Any, queries: int, what: str) -> np.ndarray:
    """Return int64 [B] from one integer for all queries, or from one integer a query. A priority of None is 0."""
    if value is None and what == "priority":
        return np.zeros(queries, np.int64)
    if isinstance(value, int | np.integer):
        found = np.empty(queries, np.int64)  # np.full takes 2 us longer
        found.fill(to_int64(value, what))
        return found
    values = np.asarray(value)
    if values.shape != (queries,) or (queries and values.dtype.kind not in "iu"):
        raise ValueError(f"{what} must be an integer, or {queries} integers, one a query")
    if queries and int(values.max()) > _HIGHEST:
        raise ValueError(f"{what}: {int(values.max())} does not fit 64 bits")
    return values.astype(np.int64)


def check_write_table(
    table: Any, rows: Any, queries: int, device: torch.device, slot_dtype: torch.dtype
) -> torch.Tensor:
    """Check the arguments of write_slots. Return `rows` as a contiguous int64 tensor on the device where they are."""
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
