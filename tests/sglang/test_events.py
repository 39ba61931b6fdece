"""KV events: equal to those of SGLang's caches, block by block, and consistent for a router."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.router import Router, blocks
from tests.support.sglang_engine import Plan, load_or_skip
from tests.support.sglang_pair import Pair, default_cache, ever_later, python_cache

SGLANG = load_or_skip()


@pytest.fixture(autouse=True)
def _clock() -> Iterator[None]:
    with ever_later(SGLANG):
        yield


class Followers:
    """A router behind each engine. After every step both routers must have equal events."""

    def __init__(self, exact: bool) -> None:
        self.ours, self.theirs = Router(), Router()
        self._exact = exact
        self.count = 0

    def __call__(self, pair: Pair) -> None:
        ours, theirs = pair.ours.cache.take_events(), pair.theirs.cache.take_events()
        assert (ours == theirs) if self._exact else (blocks(ours) == blocks(theirs))
        self.ours.follow(ours)
        self.theirs.follow(theirs)
        self.count += len(ours)
        assert self.ours.blocks == self.theirs.blocks
        assert self.ours.blocks.total() * pair.plan.page_size == pair.ours.cache.total_size()


@pytest.mark.parametrize(
    ("plan", "theirs"),
    [
        (Plan(events=True, seed=1), python_cache),
        (Plan(events=True, seed=2, page_size=16, dynamo=True), python_cache),
        (Plan(events=True, seed=3, page_size=4, is_eagle=True), python_cache),
        (Plan(events=True, seed=4, page_size=16, eviction="priority"), default_cache),
    ],
    ids=["python", "python-dynamo-16", "python-eagle-4", "default-priority-16"],
)
def test_the_events_are_those_of_sglang(plan: Plan, theirs: Any) -> None:
    followers = Followers(exact=theirs is python_cache)
    pair = Pair(SGLANG, plan, theirs, followers).run()
    assert followers.count > 50
    assert followers.ours.cleared == 1
    pair.ours.cache.reset()
    followers.ours.follow(pair.ours.cache.take_events())
    assert (followers.ours.cleared, followers.ours.blocks.total()) == (2, 0)


def test_hashes_that_were_forgotten_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.integrations.sglang import events

    monkeypatch.setattr(events, "_MOST_ENDS", 1)
    Pair(SGLANG, Plan(events=True, seed=5, page_size=4), python_cache, Followers(exact=True)).run()


@pytest.mark.parametrize("dynamo", [False, True])
def test_adapters_have_their_names(dynamo: bool) -> None:
    plan = Plan(events=True, seed=6, page_size=16, dynamo=dynamo)
    pair = Pair(SGLANG, plan, python_cache, Followers(exact=True))
    for engine in (pair.ours, pair.theirs):
        table = engine.cache.kv_events.lora_names
        table.register(SimpleNamespace(extra_key="adapter", lora_id="1"), "a lora")
    stored: list[Any] = []
    take = pair.ours.cache.take_events
    pair.ours.cache.take_events = lambda: stored.extend(events := take()) or events
    pair.run()
    assert {event.lora_name for event in stored if hasattr(event, "lora_name")} == {None, "a lora"}


def recorder() -> Any:
    """Return a recorder of events for 64 slots on the CPU, in pages of one."""
    from flatradix.integrations.sglang.events import KvEvents

    params = SGLANG.params.CacheInitParams(
        disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=SimpleNamespace(size=64, device="cpu"),
        page_size=1, enable_kv_cache_events=True,
    )  # fmt: skip
    return KvEvents(params)


def test_events_wait_for_their_slots() -> None:
    """Slots on a GPU reach the host later: the events stay in order, and no call waits."""
    events = recorder()
    arrived: set[str] = set()
    req = SimpleNamespace(full_untruncated_fill_ids=array("q", [1, 2, 3]), extra_key=None, cache_salt=None)
    row = torch.arange(10, 20)
    events.stored(req, None, SimpleNamespace(length=3, handle=5), 0, row)
    events.removed(row[:3])
    events.cleared()
    first, second, third = events._steps
    events._steps.clear()
    events._steps.append(first._replace(is_there=lambda: "first" in arrived))
    events._steps.append(second._replace(is_there=lambda: "second" in arrived))
    events._steps.append(third)
    assert events.take() == []
    arrived.add("second")
    assert events.take() == []
    arrived.add("first")
    stored, removed, cleared = events.take()
    assert stored.block_hashes == removed.block_hashes
    assert stored.token_ids == [1, 2, 3]
    assert type(cleared).__name__ == "AllBlocksCleared"
    assert events.take() == []


def test_only_what_was_stored_is_removed() -> None:
    """Tokens that came by `insert` are not reported, and a page that was removed is not removed again."""
    events = recorder()
    tokens = array("q", [1, 2, 3])
    req = SimpleNamespace(full_untruncated_fill_ids=tokens, extra_key=None, cache_salt=None, session_id="a chat")
    row = torch.arange(10, 20)
    events.removed(row)
    assert events.take() == []
    events.stored(req, None, SimpleNamespace(length=3, handle=5), 0, row)
    events.removed(row[:5])
    events.removed(row[:5])
    *stored, removed = events.take()
    assert {event.session_id for event in stored} == {"a chat"}
    assert removed.block_hashes == [block for event in stored for block in event.block_hashes]


def test_hashes_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own function compiles a C++ extension, in a server during the first request."""
    monkeypatch.setattr("sglang.srt.mem_cache.utils.get_native_hash", lambda *_: pytest.fail("SGLang's hash is called"))
    events = recorder()
    tokens = array("q", [1, 2, 3, 2**31 - 1])
    req = SimpleNamespace(full_untruncated_fill_ids=tokens, extra_key="adapter", cache_salt="salt")
    events.stored(req, None, SimpleNamespace(length=2, handle=5), 0, torch.arange(10, 20))
    events.stored(
        req, SimpleNamespace(length=2, handle=5), SimpleNamespace(length=4, handle=6), 2, torch.arange(10, 20)
    )
    req.cache_salt = None
    events.stored(
        req, SimpleNamespace(length=3, handle=7), SimpleNamespace(length=4, handle=8), 3, torch.arange(30, 40)
    )
    stored = events.take()
    assert [token for event in stored for token in event.token_ids] == [1, 2, 3, 2**31 - 1, 2**31 - 1]


def test_without_events_nothing_is_kept() -> None:
    pair = Pair(SGLANG, Plan(seed=7), python_cache).run()
    assert pair.ours.cache.take_events() == []
    assert not pair.ours.cache.kv_events._steps
    assert not pair.ours.cache.kv_events._ends
