"""Devices and Hypothesis profiles for every test."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=50,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("soak", parent=settings.get_profile("ci"), derandomize=False, max_examples=3000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"torch {torch.__version__}, GPU: {gpu}, Hypothesis profile: {settings.get_current_profile_name()}"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; CUDA is skipped where there is none."""
    name: str = request.param
    if name == "cuda":
        from flatradix.backend import why_not_cuda

        reason = why_not_cuda()
        if reason:
            pytest.skip(reason)
    return name
