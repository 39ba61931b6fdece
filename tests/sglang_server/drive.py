"""Ask both servers of a configuration the same, side by side, and compare what they did."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.sglang_server.compare import Report
from tests.sglang_server.odd import odd_requests
from tests.sglang_server.scenarios import Scenario, all_at_once, chats, one_by_one, pauses, sessions
from tests.sglang_server.server import Launcher, Server, Settings, end_of, running
from tests.sglang_server.talks import Load

SCENARIOS: Mapping[str, Scenario] = {
    "one_by_one": one_by_one,
    "all_at_once": all_at_once,
    "chats": chats,
    "sessions": sessions,
    "odd": odd_requests,
    "pauses": pauses,
}
# SGLang checks its pool when it has nothing to do.
SECONDS_OF_REST = 0.7


def ask_both(
    launcher: Launcher, model: Path, folder: Path, settings: Settings, scenarios: Sequence[str], load: Load
) -> list[Report]:
    """Start a server a backend, ask both at once, stop them. Return a report a backend. Raises ServerFault."""
    # The servers stop first, also if this is interrupted: then the threads end too.
    with ThreadPoolExecutor(2) as pool, running(launcher, model, folder, settings) as servers:
        return list(pool.map(lambda server: ask(server, scenarios, load), servers))


def ask(server: Server, scenarios: Sequence[str], load: Load) -> Report:
    """Play the scenarios, with a look at the server's health after each; flush at the end; read its log."""
    report = Report(server.backend)
    for name in scenarios:
        began = time.monotonic()
        try:
            report.rows[name] = SCENARIOS[name](server, load)
        except httpx.HTTPError as error:
            report.rows[name] = [{"asked": "all", "error": repr(error)[:200]}]
        report.seconds[name] = round(time.monotonic() - began, 1)
        time.sleep(SECONDS_OF_REST)
        report.healthy[name] = server.is_healthy
        if not report.healthy[name]:
            report.troubles.append(end_of(server.log))
            break
    if server.lives:
        try:
            report.healthy["a last flush"] = server.post("/flush_cache").status_code == 200
        except httpx.HTTPError as error:
            report.healthy["a last flush"] = False
            report.troubles.append(repr(error)[:200])
    if server.listener is not None:
        report.events, report.is_complete = server.listener.settled(), server.listener.is_complete
    report.troubles += server.troubles()
    return report
