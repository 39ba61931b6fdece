"""Which device a tree is to live on, and why not another."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from flatradix.errors import DeviceUnavailableError

logger = logging.getLogger("flatradix")
VARIABLE = "FLATRADIX_DEVICE"
_told = False


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 stands in for a GPU: its kernels then run in Python, on tensors in host memory."""
    wanted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return wanted and importlib.util.find_spec("triton") is not None


@functools.cache
def why_not_cuda() -> str:
    """Why no tree can live on a GPU here; an empty string if one can. Compiles and runs a kernel to see."""
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'flatradix[gpu]')"
    try:
        importlib.import_module("flatradix.kernels.gpu.launch").probe()
    except Exception as error:  # whatever a driver, a compiler or an assembler may raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"a first kernel does not compile and run: {first}"
    return ""


def is_free_to_choose() -> bool:
    """Whether `device="auto"` is really left to us, with no word from the environment."""
    return (os.environ.get(VARIABLE) or "auto") == "auto"


def auto_reason() -> str:
    """What `device="auto"` takes, and why, in one sentence."""
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted != "auto":
        try:
            return f"{_named(wanted, f'{VARIABLE}={wanted}')}: the environment variable {VARIABLE} says so"
        except (ValueError, DeviceUnavailableError) as error:
            return f"nothing: {error}"
    reason = _why_not_auto()
    return f"cpu: {reason}" if reason else "cuda: it is there and works"


def _why_not_auto() -> str:
    """Why `auto` does not take CUDA."""
    return (
        "kernels are interpreted (TRITON_INTERPRET), which only who asks for cuda wants"
        if interpreted()
        else why_not_cuda()
    )


def resolve(device: str | torch.device) -> torch.device:
    """The device of a tree: "cpu", "cuda", "cuda:1", or "auto", for which FLATRADIX_DEVICE may speak.

    Raises DeviceUnavailableError if the device cannot be used here, ValueError if it is none.
    """
    global _told
    if device != "auto":
        return _named(device, f'device="{device}"')
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted != "auto":
        return _named(wanted, f"{VARIABLE}={wanted}")
    if not _told:
        logger.info("device auto takes %s", auto_reason())
        _told = True
    return torch.device("cpu") if _why_not_auto() else _indexed(torch.device("cuda"))


def _named(device: str | torch.device, asked: str) -> torch.device:
    """A device that was asked for by name; `asked` is how, for the errors."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{asked} is no device: give cpu, cuda, cuda:N or auto") from None
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise ValueError(f"{asked}: a tree lives on cpu or cuda; its slots may live elsewhere")
    reason = why_not_cuda()
    if reason:
        raise DeviceUnavailableError(f'{asked} cannot be used: {reason}; take "cpu" or "auto"')
    return _indexed(found)


def _indexed(device: torch.device) -> torch.device:
    """With its number: torch.device("cuda") is not torch.device("cuda:0")."""
    if interpreted():
        return torch.device("cuda", 0)
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise DeviceUnavailableError(f"{device} cannot be used: there are {count} CUDA devices, from cuda:0 on")
    return torch.device("cuda", index)


def kernels_for(device: torch.device) -> ModuleType:
    """The kernel package of a device; imports the compiler."""
    return importlib.import_module(f"flatradix.kernels.{'cpu' if device.type == 'cpu' else 'gpu'}")


def explain() -> list[tuple[str, str]]:
    """(device, whether it can be used or why not) for each kind of device."""
    reason = why_not_cuda()
    return [("cpu", "usable"), ("cuda", f"not usable: {reason}" if reason else "usable")]
