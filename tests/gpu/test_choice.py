"""The device of a tree: by argument, by environment variable, without a GPU, and without memory on the GPU."""

from __future__ import annotations

import importlib.util
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatradix import DeviceUnavailableError, RadixTree
from flatradix.inputs import devices
from tests.support.devices import interpreted
from tests.support.inside import index_of


def test_auto_takes_the_gpu_and_the_variable_speaks_for_it(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.device.index import DeviceIndex
    from flatradix.host.index import HostIndex

    auto = HostIndex if interpreted() else DeviceIndex  # `auto` never takes the interpreter
    monkeypatch.delenv("FLATRADIX_DEVICE", raising=False)
    assert type(index_of(RadixTree(8))) is auto
    for name, kind in (("cpu", HostIndex), ("cuda", DeviceIndex), ("cuda:0", DeviceIndex), ("auto", auto)):
        monkeypatch.setenv("FLATRADIX_DEVICE", name)
        assert type(index_of(RadixTree(8))) is kind
        assert type(index_of(RadixTree(8, device="cpu"))) is HostIndex
        assert type(index_of(RadixTree(8, device=torch.device("cuda")))) is DeviceIndex


def test_a_device_that_is_not_there(gpu: str) -> None:
    with pytest.raises(
        DeviceUnavailableError, match=r"cuda:99 cannot be used: there are \d+ CUDA devices, from cuda:0 on"
    ):
        RadixTree(8, device="cuda:99")


def test_a_tree_says_where_it_is(gpu: str) -> None:
    tree = RadixTree(8, device="cuda")
    assert tree.device == torch.device("cuda", 0)
    assert tree.match([[1]]).handles.device == tree.device
    assert "cuda:0" in repr(tree)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Unset the environment variables, disable the cache of `why_not_cuda`, and forget what was said once."""
    devices._tell_once.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("FLATRADIX_DEVICE", raising=False)
    monkeypatch.setattr(devices, "why_not_cuda", devices.why_not_cuda.__wrapped__)
    return monkeypatch


def test_why_not_without_a_device(no_interpreter: pytest.MonkeyPatch) -> None:
    no_interpreter.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.why_not_cuda() == "torch sees no CUDA device"
    for device, asked in (("cuda", 'device="cuda"'), ("cuda:1", 'device="cuda:1"')):
        with pytest.raises(DeviceUnavailableError, match=f"{asked} cannot be used: torch sees no CUDA device; take "):
            RadixTree(8, device=device)
    no_interpreter.setenv("FLATRADIX_DEVICE", "cuda")
    with pytest.raises(DeviceUnavailableError, match="FLATRADIX_DEVICE=cuda cannot be used: torch sees no CUDA device"):
        RadixTree(8)


def test_why_not_without_triton(no_interpreter: pytest.MonkeyPatch) -> None:
    no_interpreter.setattr(torch.cuda, "is_available", lambda: True)
    no_interpreter.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceUnavailableError, match=r"Triton is not installed \(pip install 'flatradix\[gpu\]'\)"):
        RadixTree(8, device="cuda")


def test_why_not_where_kernels_do_not_run(no_interpreter: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise RuntimeError("no ptxas\nand more")

    no_interpreter.setattr(torch.cuda, "is_available", lambda: True)
    no_interpreter.setitem(sys.modules, "flatradix.kernels.gpu", SimpleNamespace(launch=SimpleNamespace(probe=probe)))
    no_interpreter.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(DeviceUnavailableError, match="a first kernel does not compile and run: no ptxas; take"):
        RadixTree(8, device="cuda")


def test_a_cache_of_triton_that_cannot_be_used_is_named(no_interpreter: pytest.MonkeyPatch) -> None:
    def probe() -> None:
        raise PermissionError(13, "Permission denied", "/read-only/.triton")

    no_interpreter.setattr(torch.cuda, "is_available", lambda: True)
    no_interpreter.setitem(sys.modules, "flatradix.kernels.gpu", SimpleNamespace(launch=SimpleNamespace(probe=probe)))
    no_interpreter.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(DeviceUnavailableError, match=r"Permission denied: '/read-only/.triton'; .*TRITON_CACHE_DIR"):
        RadixTree(8, device="cuda")


def test_auto_falls_back_and_says_so_once(no_interpreter: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    no_interpreter.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="flatradix"):
        assert [RadixTree(8).device.type for _ in range(3)] == ["cpu"] * 3
    assert [record.getMessage() for record in caplog.records] == ["device auto takes cpu: torch sees no CUDA device"]


# Memory


def no_memory(*arguments: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("allocate_device", no_memory, torch.OutOfMemoryError, "CUDA out of memory"),
        ("is_too_large", lambda *_, halves: halves == 2, ValueError, "max_tokens 64 is too large for a tree on a GPU"),
    ],
)
def test_auto_takes_the_cpu_where_a_gpu_has_no_room(
    name: str,
    value: Any,
    error: type[Exception],
    message: str,
    cuda: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flatradix.device import core

    monkeypatch.delenv("FLATRADIX_DEVICE", raising=False)
    monkeypatch.setattr(devices, "why_not_auto", lambda: "")
    monkeypatch.setattr(core, name, value)
    with pytest.raises(error, match=message):
        RadixTree(64, device="cuda")
    with caplog.at_level(logging.WARNING, logger="flatradix"):
        tree = RadixTree(64, page_size=2, device="auto", policy="lfu", slot_dtype=torch.int64)
    assert f"device auto takes cpu: {message}" in caplog.records[-1].getMessage()
    assert caplog.records[-1].levelno == logging.WARNING
    assert (tree.device.type, tree.page_size, tree.policy, tree.slot_dtype) == ("cpu", 2, "lfu", torch.int64)
    tree.insert([[1, 2], [3, 4]], [[2**40, 1], [3, 4]])
    assert tree.evict(1).slots.tolist() == [2**40, 1]
    tree.check()
    monkeypatch.setenv("FLATRADIX_DEVICE", "cuda")
    with pytest.raises(error, match=message):
        RadixTree(64)


def test_out_of_the_memory_of_a_gpu(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATRADIX_DEVICE", raising=False)
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            RadixTree(4_000_000, device="cuda")
        tree = RadixTree(4_000_000, device="auto")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tree.device.type == "cpu"
    assert tree.insert([1, 2], [1, 2]).length == 2


def test_too_large(cuda: str) -> None:
    with pytest.raises(ValueError, match=r"too large for a tree on a GPU: at most 8.5e8 tokens"):
        RadixTree(1_000_000_000, page_size=64, device=cuda)
