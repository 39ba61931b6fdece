"""FLATRADIX_EVICT_BY=page inside SGLang: what its scheduler is told, and the KV events of the pages that went."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.router import Router
from tests.support.sglang_engine import Engine, Plan, draw_work, load_or_skip
from tests.support.sglang_home import Home
from tests.support.sglang_pair import flat_cache, is_drained

SGLANG = load_or_skip()


@pytest.fixture
def by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATRADIX_EVICT_BY", "page")


def blocks_of(events: list[Any], kind: str) -> list[int]:
    return [block for event in events if type(event).__name__ == kind for block in event.block_hashes]


def removed(events: list[Any]) -> list[int]:
    return blocks_of(events, "BlockRemoved")


def stored(events: list[Any]) -> list[int]:
    return blocks_of(events, "BlockStored")


def test_the_events_name_the_pages_that_went(by_page: None) -> None:
    home, router = Home(Plan(events=True, page_size=4, slots=96)), Router()
    home.store([90, 91, 92, 93])
    home.store(range(32))
    first = home.cache.take_events()
    other, *blocks = stored(first)
    assert len(blocks) == 8
    free = home.allocator.available_size()
    assert home.cache.evict(SGLANG.base.EvictParams(num_tokens=9)).num_tokens_evicted == 12
    assert home.allocator.available_size() == free + 12
    second = home.cache.take_events()
    assert removed(second) == [other, *blocks[6:]]
    assert stored(second) == []
    assert home.match(range(32)).device_prefix_len == 24
    home.store(range(32))
    third = home.cache.take_events()
    assert stored(third) == blocks[6:]
    router.follow([*first, *second, *third])  # parents first
    assert router.blocks.total() * 4 == home.cache.total_size() == 32
    home.cache.tree.check()


@pytest.mark.parametrize(
    "plan",
    [
        Plan(events=True, seed=21),
        Plan(events=True, seed=22, page_size=16, dynamo=True),
        Plan(events=True, seed=23, page_size=4, is_eagle=True, eviction="slru"),
    ],
    ids=["1", "dynamo-16", "eagle-4"],
)
def test_a_whole_run(plan: Plan, by_page: None) -> None:
    """Requests are chunked, retracted and aborted in a pool that is too small; a router follows after every step."""
    engine, router = Engine(SGLANG, plan, flat_cache), Router()
    assert engine.cache.tree.evict_by == "page"
    coming, now = draw_work(plan, 50), 0
    while coming or not engine.is_idle:
        while coming and coming[0].arrives <= now:
            engine.add(coming.pop(0))
        engine.give_up(now)
        engine.step()
        engine.check()
        engine.cache.tree.check()
        router.follow(engine.cache.take_events())
        assert router.blocks.total() * plan.page_size == engine.cache.total_size()
        now += 1
        assert now < 5000
    assert engine.cache.tree.total_tokens > 0
    is_drained(SGLANG, engine)


def test_the_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.integrations.sglang.index import make_tree

    params = SimpleNamespace(
        token_to_kv_pool_allocator=SimpleNamespace(size=64, device="cpu"), page_size=1, eviction_policy="lru",
        eviction_policy_config=None, is_eagle=False,
    )  # fmt: skip
    assert make_tree(params, "cpu").tree.evict_by == "node"
    for asked, found in (("", "node"), ("node", "node"), ("page", "page")):
        monkeypatch.setenv("FLATRADIX_EVICT_BY", asked)
        assert make_tree(params, "cpu").tree.evict_by == found
    monkeypatch.setenv("FLATRADIX_EVICT_BY", "block")
    with pytest.raises(ValueError, match="FLATRADIX_EVICT_BY=block: set it to one of node, page"):
        make_tree(params, "cpu")
