"""Devices and Hypothesis profiles for every test."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from flatradix.cache import home
from flatradix.inputs.devices import interpreted, why_not_cuda
from tests.support.depth import THOROUGH, examples
from tests.support.gates import all_checked
from tests.support.interpreter import patch_once_a_launch

# The workers of a run share the cores: torch's threads would wait for one another in tensors of a few hundred bytes.
torch.set_num_threads(1)
if interpreted():
    patch_once_a_launch()

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=50,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("soak", parent=settings.get_profile("ci"), derandomize=False, max_examples=3000)
# With interpreted GPU kernels a step takes half a second: too long to shrink a failing program.
settings.register_profile(
    "interpreted",
    parent=settings.get_profile("ci"),
    max_examples=examples(2, 6),
    stateful_step_count=8,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "interpreted" if interpreted() else "ci"))


@pytest.fixture(scope="session", autouse=True)
def gates_are_opened() -> Iterator[None]:
    """Behind each call of each test, its gate is open."""
    with all_checked():
        yield


VARIANTS = 2


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With interpreted kernels, run at most VARIANTS of the variants of a parametrized test, evenly spaced.

    `make test-all` runs all, and so does a run that selects with -k.
    """
    if not interpreted() or THOROUGH or config.option.keyword:
        return
    variants: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("gpu"):
            variants[item.nodeid.partition("[")[0]].append(item)
    for found in variants.values():
        kept = {at * len(found) // VARIANTS for at in range(VARIANTS)}
        for at, item in enumerate(found):
            if at not in kept:
                item.add_marker(pytest.mark.skip(reason="one of many variants: make test-all runs it"))


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    gpu += ", its kernels run in Python (TRITON_INTERPRET=1)" if interpreted() else ""
    return f"torch {torch.__version__}, GPU: {gpu}, Hypothesis profile: {settings.get_current_profile_name()}"


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def usable(name: str) -> str:
    """Return the device name; skip the test if the device cannot be used."""
    reason = why_not_cuda() if name == "cuda" else ""
    if reason:
        pytest.skip(reason)
    return name


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn."""
    return usable(request.param)


@pytest.fixture(params=[GPU])
def cuda(request: pytest.FixtureRequest) -> str:
    """A GPU, or Triton's interpreter in its place."""
    return usable(request.param)


@pytest.fixture
def gpu(cuda: str) -> str:
    """A GPU, never the interpreter."""
    if interpreted():
        pytest.skip("needs a GPU: an interpreter has no streams, no graphs and no compiled kernels")
    return cuda


# Devices of a PrefixCache: index and tables on one device, or (apart) an index on the CPU with tables that are copies.
WHERE = ["cpu", "apart", GPU, pytest.param("cuda apart", marks=pytest.mark.gpu)]


@pytest.fixture(params=WHERE)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Keyword arguments of a PrefixCache."""
    name = request.param
    if name == "apart":
        monkeypatch.setattr(home, "apart", lambda kv: True)
    if name.startswith("cuda"):
        usable("cuda")
        if name == "cuda apart" and interpreted():
            pytest.skip("an interpreter has no second device")
    kv = "cuda" if name.startswith("cuda") and not interpreted() else "cpu"
    return {"device": "cuda" if name == "cuda" else "cpu", "kv_device": kv}
