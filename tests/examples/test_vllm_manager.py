"""examples/vllm_manager.py beside vLLM's own manager, each under vLLM's own scheduler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.vllm_engine import PAGE, Engine, Work, kv_config, load_or_skip, make_request

scheduler = load_or_skip("v1.core.sched.scheduler")
interface = load_or_skip("v1.kv_cache_interface")

from examples.vllm_manager import RadixManager, RadixScheduler  # noqa: E402 - after the skip

MANY = 500
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=40)  # few tokens: prompts share prefixes of all lengths
HEADS = [range(1000 * head, 1000 * head + 30) for head in range(6)]
SYSTEM_PROMPTS = st.builds(
    lambda head, length, tail: [*HEADS[head][:length], *tail], st.integers(0, 5), st.integers(0, 30), TOKENS
)


def works_of(prompts: st.SearchStrategy[list[int]], least: int, most: int) -> st.SearchStrategy[list[Work]]:
    work = st.builds(
        Work,
        arrives=st.integers(0, 2 * most),
        prompt=prompts,
        outputs=st.integers(1, 20),
        salt=st.sampled_from([None, None, None, "a"]),
        lora=st.sampled_from([None, None, None, "a"]),
        gives_up=st.sampled_from([None, None, None, 10, 20]),
    )
    return st.lists(work, min_size=least, max_size=most)


OPTIONS = st.fixed_dictionaries(
    {
        "scheduler_reserve_full_isl": st.booleans(),
        "watermark": st.sampled_from([0.0, 0.1]),
        "max_num_batched_tokens": st.sampled_from([13, 24]),
    }
)


def duplicates(engine: Engine) -> int:
    return sum(len(held.duplicates) for held in engine.scheduler.kv_cache_manager.held.values())


def assert_idle(engine: Engine) -> None:
    """Assert that all requests have ended, that nothing is held, and that every block is free or cached."""
    assert all(request.is_finished() for request in engine.requests.values())
    manager = engine.scheduler.kv_cache_manager
    manager.tree.check()
    assert manager.tree.protected_tokens == 0
    assert manager.available_blocks == engine.blocks - 1
    assert manager.reset_prefix_cache()
    assert manager.available_blocks == engine.blocks - 1


@given(works=works_of(TOKENS, 4, 16), options=OPTIONS)
def test_every_request_finds_as_much_where_all_fits(works: list[Work], options: dict[str, Any]) -> None:
    theirs, ours = Engine(scheduler.Scheduler, MANY, **options), Engine(RadixScheduler, MANY, **options)
    for run in (theirs, ours):
        list(run.run(works))
    assert ours.cached == theirs.cached
    assert_idle(ours)


@given(works=works_of(SYSTEM_PROMPTS, 16, 30), blocks=st.integers(24, 32), options=OPTIONS)
def test_every_step_is_the_same_in_a_tight_pool(works: list[Work], blocks: int, options: dict[str, Any]) -> None:
    """The same requests start, run and are preempted, and find as much, until the first block is there twice."""
    theirs, ours = (Engine(kind, blocks, alike=False, **options) for kind in (scheduler.Scheduler, RadixScheduler))
    for found, expected in zip(ours.run(works), theirs.run(works), strict=True):
        if duplicates(ours):
            return
        assert found == expected
        assert ours.cached == theirs.cached
    assert_idle(ours)


@given(works=works_of(TOKENS, 4, 16), blocks=st.integers(24, 40), options=OPTIONS)
def test_every_read_finds_its_own_kv(works: list[Work], blocks: int, options: dict[str, Any]) -> None:
    """Here many blocks are there twice."""
    ours = Engine(RadixScheduler, blocks, **options)
    list(ours.run(works))
    assert_idle(ours)


def test_a_block_is_kept_where_another_request_has_cached_the_same() -> None:
    """Two equal requests, the second admitted while the first has computed half of a block."""
    engine = Engine(RadixScheduler, 20, max_num_batched_tokens=PAGE + 2)
    works = [Work(0, [0] * (PAGE + 1), 12), Work(1, [0] * (PAGE + 1), 12)]
    assert max(duplicates(engine) for _ in engine.run(works)) > 0
    assert_idle(engine)


def test_what_is_not_text_shares_nothing() -> None:
    manager = RadixManager(kv_config(20), 64, PAGE, hash_block_size=PAGE)
    for name in "ab":
        request = make_request(name, Work(0, [1] * 9, 1))
        request.mm_features = [SimpleNamespace()]
        assert manager.get_computed_blocks(request)[1] == 0
        assert len(manager.allocate_slots(request, 9).blocks[0]) == 3
    assert manager.tree.total_tokens == 0
    assert manager.available_blocks == 13


@pytest.mark.parametrize("skips", [False, True])
def test_a_request_that_skips_the_look_up_still_caches(skips: bool) -> None:
    manager = RadixManager(kv_config(20), 64, PAGE, hash_block_size=PAGE)
    first, second = (make_request(name, Work(0, [1] * 9, 1)) for name in "ab")
    first.skip_reading_prefix_cache = skips
    assert manager.get_computed_blocks(first)[1] == 0
    manager.allocate_slots(first, 9)
    assert manager.get_computed_blocks(second)[1] == 8
    assert not manager.reset_prefix_cache()  # a request still holds blocks
    manager.free(first)
    assert manager.reset_prefix_cache()
    assert manager.get_computed_blocks(second)[1] == 0


def test_drafts_have_blocks_and_are_not_cached() -> None:
    manager = RadixManager(kv_config(20), 64, PAGE, hash_block_size=PAGE)
    request = make_request("a", Work(0, [1] * 9, 20))
    manager.allocate_slots(request, 9)
    request.num_computed_tokens = 9
    request.append_output_token_ids(2)
    assert len(manager.allocate_slots(request, 6, num_lookahead_tokens=2).blocks[0]) == 2
    assert manager.estimate_cached_tokens(request) == 8
    manager.free(request)
    assert manager.available_blocks == 19


def test_other_models_are_refused() -> None:
    config = kv_config(20)
    with pytest.raises(ValueError, match="full attention in all layers"):
        RadixManager(config, 64, PAGE, hash_block_size=PAGE, use_eagle=True)
    window = interface.SlidingWindowSpec(
        block_size=PAGE, num_kv_heads=1, head_size=1, dtype=torch.float16, sliding_window=8
    )
    config.kv_cache_groups[0] = interface.KVCacheGroupSpec(["layer"], window)
    with pytest.raises(ValueError, match="full attention in all layers"):
        RadixManager(config, 64, PAGE, hash_block_size=PAGE)
