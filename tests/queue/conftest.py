"""Which tests of the queue run in Triton's interpreter, where each look at a queue takes half a second."""

from __future__ import annotations

import pytest

from tests.support.devices import interpreted


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: runs in Triton's interpreter too, not only on a CPU and a GPU")


@pytest.fixture
def device(device: str, request: pytest.FixtureRequest) -> str:
    """Each device in turn. The interpreter takes the place of a GPU only in tests that are marked so."""
    if interpreted(device) and request.node.get_closest_marker("interpreted") is None:
        pytest.skip("takes too long in an interpreter")
    return device
