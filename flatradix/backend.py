"""Where a tree lives: from a device to the class of its index, in the order of preference, with the reasons."""

from __future__ import annotations

import secrets

import torch

from flatradix.errors import TooLargeForDeviceError
from flatradix.index import Index
from flatradix.inputs import devices
from flatradix.inputs.options import Options
from flatradix.layout.handles import GENERATION_BITS


def index_class(device: torch.device) -> type[Index]:
    """The class of an index on a device; imports its compiler."""
    if device.type == "cpu":
        from flatradix.host.index import HostIndex

        return HostIndex
    from flatradix.device.index import DeviceIndex

    return DeviceIndex


def open_index(options: Options, device: str | torch.device) -> Index:
    """An empty index on the first device that has room for it.

    Raises DeviceUnavailableError or ValueError for a device that cannot be used, and what the last candidate raises.
    """
    candidates = devices.candidates(device)
    # Random, so that a handle of one tree is stale in another, also in one that was saved by another process.
    generation = secrets.randbits(GENERATION_BITS)
    for candidate, fallback in zip(candidates, [*candidates[1:], None], strict=True):
        try:
            with torch.inference_mode(False):  # its tensors would belong to that mode for ever
                return index_class(candidate)(options, candidate, generation)
        except (torch.OutOfMemoryError, TooLargeForDeviceError) as error:
            if fallback is None:
                raise
            devices.logger.warning("device auto takes %s: %s", fallback, str(error).splitlines()[0])
    raise AssertionError("there is always a candidate")
