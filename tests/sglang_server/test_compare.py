"""The comparison of two servers finds what differs."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("msgspec")
pytest.importorskip("zmq")

from tests.sglang_server.compare import Report, compare
from tests.sglang_server.events import AllBlocksCleared, BlockRemoved, BlockStored

ROW = {"asked": "turn 1", "ids": [5, 6], "cached": 32, "prompt": 40, "ended": "length", "retractions": 0}


def report(backend: str, *rows: dict[str, Any], scenario: str = "one_by_one", **more: Any) -> Report:
    return Report(backend, {scenario: list(rows)}, {scenario: True}, **more)


def test_equal_reports() -> None:
    found = compare(report("default", ROW, ROW), report("flatradix", ROW, ROW))
    assert (found.faults, found.healthy) == ([], True)
    assert (found.requests, found.in_order, found.equal_answers, found.equal_cached) == (2, 2, 2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": [5, 7]}, "turn 1: ids [5, 6], but [5, 7] here"),
        ({"cached": 31}, "turn 1: 32 tokens cached, but 31 here"),
        ({"prompt": 41}, "turn 1: prompt 40, but 41 here"),
        ({"error": "gone"}, "flatradix, one_by_one, turn 1: gone"),
    ],
)
def test_a_row_that_differs(change: dict[str, Any], message: str) -> None:
    found = compare(report("default", ROW), report("flatradix", ROW | change))
    assert message in "\n".join(found.faults)


def test_a_row_too_few() -> None:
    assert compare(report("default", ROW, ROW), report("flatradix", ROW)).faults == [
        "one_by_one: 2 rows with SGLang's cache, 1 with flatradix"
    ]


def test_hits_may_differ_where_that_is_known() -> None:
    less = ROW | {"cached": 16}
    assert compare(report("default", ROW), report("flatradix", less), same_hits=False).faults == []
    assert compare(report("default", ROW), report("flatradix", less | {"beyond": True})).faults == []
    assert compare(report("default", less), report("flatradix", ROW | {"beyond": True})).faults != []


def test_hits_all_at_once_depend_on_time() -> None:
    ours = report("flatradix", ROW | {"ids": [9], "cached": 0}, scenario="all_at_once")
    found = compare(report("default", ROW, scenario="all_at_once"), ours)
    assert (found.faults, found.cached) == ([], {"all_at_once": [32, 0, 40]})


def test_a_server_that_is_not_well() -> None:
    ours = report("flatradix", ROW, troubles=["a leak"])
    ours.healthy["one_by_one"] = False
    found = compare(report("default", ROW), ours)
    assert found.faults == ["flatradix: its log says a leak", "flatradix: not healthy after one_by_one"]
    assert not found.healthy


STORED = BlockStored([1, 2], None, [10, 11], 1)


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        ([STORED, BlockRemoved([2]), BlockRemoved([1])], ""),
        ([STORED, AllBlocksCleared()], ""),
        ([STORED, BlockRemoved([2])], "1 blocks are left"),
        ([BlockRemoved([2])], "contradict"),
        ([BlockStored([2], 1, [11], 1)], "contradict"),
    ],
)
def test_events_that_contradict_themselves(events: list[Any], fault: str) -> None:
    found = compare(report("default", ROW, events=[]), report("flatradix", ROW, events=events))
    assert [fault in each for each in found.faults] == ([True] if fault else [])


def test_events_must_be_equal_where_that_is_asked() -> None:
    theirs = report("default", ROW, events=[STORED, AllBlocksCleared()])
    ours = report("flatradix", ROW, events=[AllBlocksCleared()])
    assert compare(theirs, ours).faults == []
    assert len(compare(theirs, ours, same_events=True).faults) == 1
    assert compare(theirs, theirs, same_events=True).faults == []
