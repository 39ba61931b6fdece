"""Choosing the index of a tree: from a device to an index class. `auto` falls back to the CPU and logs the reason."""

from __future__ import annotations

import secrets

import torch

from flatradix.errors import TooLargeForDeviceError
from flatradix.index import Index
from flatradix.inputs import devices
from flatradix.inputs.options import Options
from flatradix.layout.handles import GENERATION_BITS


def index_class(device: torch.device, paged: bool) -> type[Index]:
    """Return the index class for a device. Imports the compiler of its kernels. paged: for a PrefixCache."""
    if device.type == "cpu" and paged:
        from flatradix.host.paged import PagedIndex

        return PagedIndex
    if device.type == "cpu":
        from flatradix.host.index import HostIndex

        return HostIndex
    from flatradix.device.index import DeviceIndex

    return DeviceIndex


def open_index(options: Options, device: str | torch.device, paged: bool = False) -> Index:
    """Return an empty index on the first candidate device that can hold it. paged: for a PrefixCache.

    Raises DeviceUnavailableError or ValueError for a device that cannot be used, and the error of the last candidate.
    """
    candidates = devices.candidates(device)
    # Random, so that a handle of one tree is stale in every other tree, even in one that another process saved.
    generation = secrets.randbits(GENERATION_BITS)
    for candidate, fallback in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            with torch.inference_mode(False):  # else the tensors would be inference tensors forever
                return index_class(candidate, paged)(options, candidate, generation)
        except (torch.OutOfMemoryError, TooLargeForDeviceError) as error:
            if fallback is None:
                raise
            devices.logger.warning("device auto takes %s: %s", fallback, str(error).splitlines()[0])
    raise AssertionError("there is always a candidate")
