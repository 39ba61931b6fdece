"""Which devices can be used here, and the reason if a device cannot."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os

import torch

from flatradix.errors import DeviceUnavailableError

logger = logging.getLogger("flatradix")
VARIABLE = "FLATRADIX_DEVICE"


def interpreted() -> bool:
    """Return whether TRITON_INTERPRET=1 replaces the GPU. Triton kernels then run in Python, on host memory."""
    wanted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return wanted and importlib.util.find_spec("triton") is not None


@functools.cache
def why_not_cuda() -> str:
    """Return why no tree can live on a GPU here, or "" if one can. Compiles and runs a kernel, once a process."""
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'flatradix[gpu]')"
    try:
        from flatradix.kernels.gpu import launch

        launch.probe()
    except Exception as error:  # whatever a driver, a compiler or an assembler may raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return f"a first kernel does not compile and run: {first}{_about_files(error)}"
    return ""


def _about_files(error: Exception) -> str:
    """Return what to do about an error that comes from the files in which Triton keeps kernels, or ""."""
    if not isinstance(error, OSError | json.JSONDecodeError):
        return ""
    return (
        "; Triton keeps kernels in ~/.triton/cache, or in TRITON_CACHE_DIR: a folder that can be written, has space, "
        "and may be emptied"
    )


def asked_for() -> str:
    """Return the device that FLATRADIX_DEVICE gives for `device="auto"`, or "auto" if the variable is not set."""
    return os.environ.get(VARIABLE) or "auto"


def why_not_auto() -> str:
    """Return why `auto` does not take CUDA, or "" if it does."""
    if interpreted():
        return "kernels are interpreted (TRITON_INTERPRET), which only who asks for cuda wants"
    return why_not_cuda()


def auto_reason() -> str:
    """Return which device `device="auto"` takes, and why, in one sentence."""
    wanted = asked_for()
    if wanted != "auto":
        try:
            return f"{named(wanted, f'{VARIABLE}={wanted}')}: the environment variable {VARIABLE} says so"
        except (ValueError, DeviceUnavailableError) as error:
            return f"nothing: {error}"
    reason = why_not_auto()
    return f"cpu: {reason}" if reason else "cuda: it is there and works"


@functools.cache
def _tell_once(reason: str) -> None:
    logger.info("device auto takes %s", reason)


def candidates(device: str | torch.device) -> list[torch.device]:
    """Return the devices on which a tree may live, the preferred device first. A device given by name is alone.

    device: "cpu", "cuda", "cuda:1", or "auto", which FLATRADIX_DEVICE overrides. Raises DeviceUnavailableError if the
    device cannot be used here, ValueError if it is not a device.
    """
    if device != "auto":
        return [named(device, f'device="{device}"')]
    if asked_for() != "auto":
        return [named(asked_for(), f"{VARIABLE}={asked_for()}")]
    _tell_once(auto_reason())
    host = torch.device("cpu")
    return [host] if why_not_auto() else [_indexed(torch.device("cuda")), host]


def preferred(device: str | torch.device) -> torch.device:
    """Return the first of `candidates`."""
    return candidates(device)[0]


def named(device: str | torch.device, asked: str) -> torch.device:
    """Return the device that was given by name, with its index. asked: the request as quoted in errors."""
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


def memory_on(name: str, device: str | torch.device) -> torch.device:
    """Return the device of the argument `name`, with its index, where torch can hold tensors; kernels need not run.

    Raises ValueError for what is no device or holds no values, DeviceUnavailableError for what cannot be used here.
    """
    asked = f'{name}="{device}"'
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{asked} is no device: give cpu, cuda or cuda:N") from None
    if found.type == "meta":
        raise ValueError(f"{asked} holds no values: give cpu, cuda or cuda:N")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailableError(f"{asked} cannot be used: torch sees no CUDA device")
    try:
        return torch.empty(0, device=found).device
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # each kind of device has its own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DeviceUnavailableError(f"{asked} cannot be used: {first}") from None


def _indexed(device: torch.device) -> torch.device:
    """Return a CUDA device with its index: torch.device("cuda") is not equal to torch.device("cuda:0")."""
    if interpreted():
        return torch.device("cuda", 0)
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise DeviceUnavailableError(f"{device} cannot be used: there are {count} CUDA devices, from cuda:0 on")
    return torch.device("cuda", index)


def explain() -> list[tuple[str, str]]:
    """Return (device, "usable" or the reason why not) for each kind of device."""
    reason = why_not_cuda()
    return [("cpu", "usable"), ("cuda", f"not usable: {reason}" if reason else "usable")]
