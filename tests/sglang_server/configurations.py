"""The configurations of `make server-matrix`: how both servers are started, and what they are asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tests.sglang_server.server import Settings
from tests.sglang_server.talks import Load

# SGLang then checks its pool after every step.
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
_ORDER = ("one_by_one",)
_CROWD = ("all_at_once",)
_BOTH = ("one_by_one", "all_at_once")
_ODD = ("odd", "sessions", "pauses", "one_by_one")


class Configuration(NamedTuple):
    """One row. same_hits: the caches must find the same. same_events: the KV events must be equal, block by block."""

    name: str
    settings: Settings
    scenarios: tuple[str, ...]
    load: Load
    same_hits: bool
    same_events: bool

    @property
    def summary(self) -> str:
        """The options and variables of this row that not every row has."""
        variables = [f"{name}={value}" for name, value in self.settings.environment.items() if name not in STRICT]
        events = ["--kv-events-config=..."] if self.settings.events else []
        return " ".join([*variables, *self.settings.options, *events])


def _row(
    name: str,
    scenarios: tuple[str, ...],
    load: Load,
    options: str,
    *,
    environment: Mapping[str, str] | None = None,
    events: bool = False,
    chunk: int = 64,
    same_hits: bool = True,
    same_events: bool = False,
) -> Configuration:
    chunks = [f"--chunked-prefill-size={chunk}"] if chunk else []
    settings = Settings((*chunks, *options.split()), {**STRICT, **(environment or {})}, events)
    return Configuration(name, settings, scenarios, load, same_hits, same_events)


_POOL = "--max-total-tokens=2500"
_STORM = "--max-total-tokens=4000 --max-running-requests=40 --schedule-conservativeness=0.1"

CONFIGURATIONS = (
    _row(
        "page-1", (*_BOTH, "chats"), Load(75),
        "--schedule-policy=lpm --max-total-tokens=3000 --max-running-requests=24",
    ),
    _row(
        "page-16", (*_BOTH, "chats"), Load(75, at_once=48, seed=1),
        "--page-size=16 --schedule-policy=lpm --max-total-tokens=3200 --max-running-requests=24",
    ),
    _row(
        "page-64", _BOTH, Load(40, seed=14),
        "--page-size=64 --schedule-policy=fcfs --max-total-tokens=4096 --max-running-requests=16",
    ),
    _row("no-chunks", _BOTH, Load(40, seed=15), _POOL, chunk=0),
    _row(
        "dfs-weight", _BOTH, Load(40, at_once=64, seed=2),
        "--page-size=16 --schedule-policy=dfs-weight --max-total-tokens=4000 --max-running-requests=16",
    ),
    _row("no-overlap", _BOTH, Load(40, seed=4), f"--disable-overlap-schedule {_POOL}"),
    _row("mixed-chunk", _CROWD, Load(75, seed=5), f"--enable-mixed-chunk --page-size=16 {_POOL}"),
    _row("lfu", _BOTH, Load(40, seed=6), f"--radix-eviction-policy=lfu {_POOL}", chunk=0),
    _row("slru", _BOTH, Load(40, seed=7), f"--radix-eviction-policy=slru {_POOL}", chunk=0),
    _row(
        "priority", _BOTH, Load(40, seed=8, priorities=True),
        f"--radix-eviction-policy=priority --enable-priority-scheduling --max-running-requests=8 {_POOL}", chunk=0,
    ),
    _row(
        "preemption", _CROWD, Load(75, at_once=64, seed=9, priorities=True),
        "--enable-priority-scheduling --priority-scheduling-preemption-threshold=1 --max-running-requests=4 "
        "--max-total-tokens=3000", chunk=0,
    ),
    _row("events-1", _ORDER, Load(40, seed=11), f"--enable-metrics {_POOL}", events=True),
    _row(
        "events-16", _BOTH, Load(40, seed=12), "--page-size=16 --enable-metrics --max-total-tokens=3200", events=True,
    ),
    _row("session-ids", _ORDER, Load(40, seed=11, session_ids=True), _POOL, events=True),
    _row("odd-1", _ODD, Load(20, seed=13), "--max-total-tokens=4000"),
    _row("odd-16", _ODD, Load(20, seed=13), "--page-size=16 --max-total-tokens=4000"),
    _row("storm-1", _CROWD, Load(80, at_once=64, longer=4, aborts=0.15, seed=20), f"--schedule-policy=lpm {_STORM}"),
    _row(
        "storm-16", _CROWD, Load(80, at_once=64, longer=4, aborts=0.15, seed=21),
        f"--page-size=16 --enable-mixed-chunk {_STORM}",
    ),
    _row(
        "queue-lpm", _BOTH, Load(40, at_once=64, seed=23), f"--schedule-policy=lpm --max-running-requests=8 {_POOL}",
        environment={"FLATRADIX_QUEUE": "1"},
    ),
    _row(
        "queue-dfs-16", _BOTH, Load(40, at_once=64, seed=24),
        "--page-size=16 --schedule-policy=dfs-weight --max-running-requests=8 --max-total-tokens=3200",
        environment={"FLATRADIX_QUEUE": "1"},
    ),
    _row(
        "evict-by-page", _BOTH, Load(40, seed=25), f"--page-size=4 {_POOL}", events=True,
        environment={"FLATRADIX_EVICT_BY": "page"}, same_hits=False,
    ),
    _row(
        "tensor-parallel", _BOTH, Load(40, seed=22),
        f"--tp-size=2 --schedule-policy=lpm --max-running-requests=16 {_POOL}",
        environment={"SGLANG_CPU_OMP_THREADS_BIND": "0|0"},
    ),
    _row(
        "retraction", _CROWD, Load(75, aborts=0.2, seed=3), "--max-total-tokens=3000 --max-running-requests=24",
        environment={"SGLANG_TEST_RETRACT": "1"},
    ),
)  # fmt: skip
