"""examples/vllm_manager.py beside vLLM's own manager, each under vLLM's own scheduler."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.vllm_engine import Engine, Work, load_or_skip

scheduler = load_or_skip("v1.core.sched.scheduler")

from examples.vllm_manager import RadixManager, RadixScheduler  # noqa: E402 - after the skip

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=40)  # few tokens: prompts share prefixes of all lengths
WORKS = st.builds(
    Work,
    arrives=st.integers(0, 30),
    prompt=TOKENS,
    outputs=st.integers(1, 20),
    salt=st.sampled_from([None, None, None, "a"]),
    lora=st.sampled_from([None, None, None, "a"]),
    gives_up=st.sampled_from([None, None, None, 10, 20]),
)


def assert_idle(engine: Engine) -> None:
    """Assert that nothing is held, and that every block is free or cached."""
    manager = engine.scheduler.kv_cache_manager
    manager.tree.check()
    assert manager.tree.protected_tokens == 0
    assert manager.usage == 0
    assert manager.reset_prefix_cache()
    assert manager.available_blocks == engine.blocks - 1


@given(works=st.lists(WORKS, max_size=12))
def test_equal_hits_where_all_fits(works: list[Work]) -> None:
    theirs, ours = Engine(scheduler.Scheduler, 500), Engine(RadixScheduler, 500)
    theirs.run(works)
    ours.run(works)
    assert ours.cached == theirs.cached
    assert_idle(ours)


@given(works=st.lists(WORKS, max_size=12), blocks=st.integers(20, 40))
def test_right_kv_in_a_tight_pool(works: list[Work], blocks: int) -> None:
    ours = Engine(RadixScheduler, blocks)
    ours.run(works)
    assert all(request.is_finished() for request in ours.requests.values())
    assert_idle(ours)
