"""Reading the places that callers pass: results, or any object with handles and lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flatradix.layout.handles import NO_HANDLE

_HOST = torch.device("cpu")


def read_places(places: Any, device: torch.device = _HOST) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lengths (int32 [B], contiguous) and the handles (int64 [B]) of a result, or of any object with both.

    Raises ValueError for a wrong dtype, shape or device.
    """
    try:
        lengths, handles = places.lengths, places.handles
    except AttributeError:
        raise ValueError(
            f"a {type(places).__name__} names no place: pass the result of match or insert, or anything with "
            ".handles (int64 [B]) and .lengths (integers [B])"
        ) from None
    if not isinstance(handles, torch.Tensor) or handles.dtype != torch.int64 or handles.dim() != 1:
        raise ValueError("handles must be an int64 tensor [B]")
    if not isinstance(lengths, torch.Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError("lengths must be an int32 or int64 tensor [B]")
    if handles.device != device or lengths.device != device:
        raise ValueError(f"handles on {handles.device} and lengths on {lengths.device}, but the tree is on {device}")
    if lengths.shape != handles.shape:
        raise ValueError(f"{tuple(lengths.shape)} lengths for {tuple(handles.shape)} handles")
    return _narrow(lengths), handles


def _narrow(lengths: torch.Tensor) -> torch.Tensor:
    """Return lengths as int32 [B], contiguous. What does not fit becomes the nearest that does, refused later."""
    least, most = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    if not lengths.is_cpu:
        wide = lengths.dtype == torch.int64
        return (lengths.clamp(least, most) if wide else lengths).to(torch.int32).contiguous()
    if lengths.dtype == torch.int64:
        return torch.from_numpy(lengths.numpy().clip(least, most).astype(np.int32))
    return contiguous(lengths)


def contiguous(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor in host memory as a contiguous one, itself if it is.

    Like all work in host memory, numpy does it: threads of torch do not survive a fork.
    """
    return values if values.is_contiguous() else torch.from_numpy(np.ascontiguousarray(values.numpy()))


def refuse_shared_handles(handles: torch.Tensor) -> None:
    """Raise ValueError for handles that share memory: a lock cannot renew each of them."""
    if len(handles) > 1 and handles.stride(0) == 0:
        raise ValueError("lock: the handles share memory, and each may be renewed; pass handles.clone()")


def read_starts(start: Any, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places to continue from as handles and lengths, int64 [B] in host memory; NO_HANDLE is the root."""
    if start is None:
        return np.full(queries, NO_HANDLE, np.int64), np.zeros(queries, np.int64)
    lengths, handles = read_places(start)
    check_starts(len(handles), queries)
    given = handles.numpy().copy()
    given[given < 0] = NO_HANDLE - 1  # never a valid handle: a caller's -1 must not mean the root
    return given, lengths.numpy().astype(np.int64)


def check_starts(places: int, queries: int) -> None:
    if places != queries:
        raise ValueError(f"start has {places} places for {queries} queries")
