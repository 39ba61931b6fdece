"""A short run over two real SGLang servers, on a CPU. `make server-matrix` runs more configurations, for longer."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("httpx")
pytest.importorskip("msgspec")
pytest.importorskip("zmq")

from tests.sglang_server.compare import compare
from tests.sglang_server.drive import ask_both
from tests.sglang_server.server import Launcher, Settings, why_not
from tests.sglang_server.talks import Load
from tests.sglang_server.tiny_model import write_model

SCENARIOS = ("one_by_one", "chats", "odd", "all_at_once")
SETTINGS = Settings(
    options=("--page-size=4", "--chunked-prefill-size=64", "--schedule-policy=lpm", "--max-total-tokens=1600"),
    environment={"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"},
    events=True,
)
LOAD = Load(turns=20, at_once=12)


@pytest.mark.slow
def test_a_server_answers_as_with_its_own_cache(tmp_path: Path) -> None:
    """Equal answers, cached tokens and KV events one by one; every request answered, and a full pool, all at once.

    One test, so that of the workers of a run only one starts servers.
    """
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Launcher(tmp_path) as launcher:
        theirs, ours = ask_both(launcher, write_model(tmp_path / "model"), tmp_path, SETTINGS, SCENARIOS, LOAD)
    found = compare(theirs, ours)
    assert not found.faults, "\n".join(found.faults)
    assert found.healthy
    assert found.equal_answers == found.in_order
    assert ours.total("cached", "all_at_once") > 0
    assert ours.count("aborted") > 0
    assert any(type(event).__name__ == "BlockRemoved" for event in ours.events), "the pool was never full"
