"""Compare what two servers answered, and what a router makes of their KV events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.sglang_server.scenarios import Row
from tests.support.router import Router, blocks

# The scenarios of which the requests come one after another: nothing in them depends on time.
IN_ORDER = ("one_by_one", "chats", "sessions", "odd")
_ANSWER = ("ids", "texts", "status", "said", "ended", "logprobs", "last_ids", "prompt", "opened", "error")
_MOST_FAULTS = 20


@dataclass
class Report:
    """What one server did. rows: of each scenario. events: all KV events, None if nobody listened."""

    backend: str
    rows: dict[str, list[Row]] = field(default_factory=dict)
    healthy: dict[str, bool] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    events: list[Any] | None = None
    is_complete: bool = True

    def count(self, of: str) -> int:
        return sum(of in row for rows in self.rows.values() for row in rows)

    def total(self, of: str, scenario: str) -> int:
        return sum(row.get(of) or 0 for row in self.rows.get(scenario, []))


@dataclass
class Comparison:
    """How two reports compare. Counts are of rows, in order: of all, of equal answers, of equal cached tokens."""

    requests: int = 0
    in_order: int = 0
    equal_answers: int = 0
    equal_cached: int = 0
    cached: dict[str, list[int]] = field(default_factory=dict)
    errors: list[int] = field(default_factory=list)
    retractions: list[int] = field(default_factory=list)
    healthy: bool = True
    events: str = ""
    faults: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(theirs: Report, ours: Report, same_hits: bool = True, same_events: bool = False) -> Comparison:
    """Compare two reports.

    same_hits: whether the caches must find the same. same_events: whether their KV events must be equal.
    """
    found = Comparison()
    for report in (theirs, ours):
        found.errors.append(report.count("error"))
        found.retractions.append(sum(report.total("retractions", name) for name in report.rows))
        found.healthy &= bool(report.healthy) and all(report.healthy.values())
        found.faults += _faults_of(report)
    for name in theirs.rows:
        _compare_rows(found, name, theirs.rows[name], ours.rows.get(name, []), same_hits)
        found.cached[name] = [report.total("cached", name) for report in (theirs, ours)]
        found.cached[name].append(ours.total("prompt", name))
    if ours.events is not None and theirs.events is not None:
        _compare_events(found, theirs.events, ours.events, same_events)
    del found.faults[_MOST_FAULTS:]
    return found


def _faults_of(report: Report) -> list[str]:
    faults = [f"{report.backend}: its log says {line}" for line in report.troubles]
    faults += [f"{report.backend}: not healthy after {name}" for name, well in report.healthy.items() if not well]
    for name, rows in report.rows.items():
        faults += [f"{report.backend}, {name}, {row['asked']}: {row['error']}" for row in rows if "error" in row]
    if not report.is_complete:
        faults.append(f"{report.backend}: batches of KV events are missing")
    if report.events is not None:
        faults += _followed(report)
    return faults


def _followed(report: Report) -> list[str]:
    """Follow the events as a router does: no block is removed that is not cached, and no parent is unknown."""
    try:
        router = Router()
        router.follow(report.events or [])
    except AssertionError as error:
        return [f"{report.backend}: its KV events contradict themselves: {error!r}"]
    left = router.blocks.total()
    return [f"{report.backend}: {left} blocks are left in a router after the last flush"] if left else []


def _compare_rows(found: Comparison, name: str, theirs: Sequence[Row], ours: Sequence[Row], same_hits: bool) -> None:
    found.requests += len(ours)
    if len(theirs) != len(ours):
        found.faults.append(f"{name}: {len(theirs)} rows with SGLang's cache, {len(ours)} with flatradix")
    if name not in IN_ORDER:
        return
    found.in_order += max(len(theirs), len(ours))
    for their, our in zip(theirs, ours, strict=False):
        differing = [key for key in _ANSWER if their.get(key) != our.get(key)]
        found.equal_answers += not differing
        where = f"{name}, {our['asked']}"
        for key in differing:
            found.faults.append(f"{where}: {key} {_short(their.get(key))}, but {_short(our.get(key))} here")
        cached = their.get("cached", 0), our.get("cached", 0)
        found.equal_cached += cached[0] == cached[1]
        may_differ = not same_hits or (our.get("beyond") and cached[1] <= cached[0])
        if cached[0] != cached[1] and not may_differ:
            found.faults.append(f"{where}: {cached[0]} tokens cached, but {cached[1]} here")


def _compare_events(found: Comparison, theirs: list[Any], ours: list[Any], same_events: bool) -> None:
    theirs, ours = blocks(theirs), blocks(ours)
    if theirs == ours:
        found.events = f"{len(ours)} blocks, equal"
        return
    first = next(
        (at for at, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]),
        min(len(theirs), len(ours)),
    )
    found.events = f"{len(theirs)} and {len(ours)} blocks, consistent"
    if same_events:
        found.faults.append(
            f"KV events differ from block {first} of {len(theirs)} and {len(ours)}: "
            f"{_short(theirs[first : first + 1])}, but {_short(ours[first : first + 1])} here"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 160 else text[:160] + " ..."
