"""Copying tensors from host memory to another device without waiting."""

from __future__ import annotations

import numpy as np
import torch

HOST_IN_GRAPH = "a CUDA graph cannot hold inputs in host memory: pass tensors on the device"


def refuse_in_graph(device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is captured, for inputs in host memory.

    To be called before pinned memory is allocated: torch then asks whether earlier copies are done, and a question to
    the driver ends a capture.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(HOST_IN_GRAPH)


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on the device, without waiting. torch reuses pinned memory only after the copy is done.

    Raises RuntimeError while a CUDA graph is captured, if there is host memory to copy.
    """
    if values.device == device:
        return values
    if not values.is_cpu or device.type != "cuda":
        return values.to(device)
    refuse_in_graph(device)
    pinned = values if values.is_pinned() else values.pin_memory()
    return pinned.to(device, non_blocking=True)


def upload_numbers(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return int64 numbers on the device, without waiting. Raises as `upload`."""
    return upload(torch.from_numpy(np.ascontiguousarray(values, np.int64)), device)
