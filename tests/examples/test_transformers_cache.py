"""examples/transformers_cache.py beside transformers' own paged cache, each under transformers' own scheduler."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")

from transformers.generation.continuous_batching.cache_allocators import FULL_ATTENTION, CachePool

from examples.models import random_model
from examples.transformers_cache import RadixAllocator, flatradix_cache
from tests.support.continuous_batching import PAGE, Engine, Work
from tests.support.depth import examples

MANY = 600
TIGHT = st.integers(28, 48)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=40)  # few tokens: prompts share prefixes of all lengths
HEADS = [range(50 * head, 50 * head + 30) for head in range(6)]
SYSTEM_PROMPTS = st.builds(
    lambda head, length, tail: [*HEADS[head][:length], *tail], st.integers(0, 5), st.integers(0, 30), TOKENS
)


def model_of(device: str = "cpu") -> torch.nn.Module:
    return random_model("tiny", 0, torch.float32, torch.device(device))


MODEL = model_of()


def works_of(prompts: st.SearchStrategy[list[int]], least: int, most: int) -> st.SearchStrategy[list[Work]]:
    work = st.builds(
        Work,
        arrives=st.integers(0, 2 * most),
        prompt=prompts,
        outputs=st.integers(1, 12),
        gives_up=st.sampled_from([None, None, None, 3, 8]),
    )
    return st.lists(work, min_size=least, max_size=most)


def engine(kind: str, blocks: int, **options: Any) -> Engine:
    with flatradix_cache() if kind == "flatradix" else nullcontext():
        return Engine(MODEL, blocks, **options)


def allocator_of(run: Engine) -> RadixAllocator:
    return run.cache.cache_allocators[FULL_ATTENTION]


def assert_whole(run: Engine) -> None:
    """Assert that each block is free, cached, or held by one request, and that requests hold what the tree says."""
    allocator = allocator_of(run)
    ledger, pool = allocator.ledger, run.cache.pool
    ledger.tree.check()
    held = []
    for name, table in allocator.block_table.items():
        place = allocator.places.get(name, ledger.root)
        cached = place.length // PAGE
        assert table[:cached] == ledger.blocks(ledger.tree.path_slots(place))
        held += table[cached:]
    assert allocator.places.keys() <= allocator.block_table.keys()
    assert len(set(held)) == len(held)
    free = len(pool.free_sectors) * allocator.blocks_per_sector + CachePool.count_free_blocks(pool, allocator.index)
    assert free + ledger.tree.total_tokens // PAGE + len(held) == run.cache.num_blocks


def assert_idle(run: Engine) -> None:
    """Assert that nothing is held, and that the free and the cached blocks together are all blocks."""
    assert_whole(run)
    allocator, pool = allocator_of(run), run.cache.pool
    assert not allocator.block_table
    assert not allocator.places
    assert allocator.ledger.tree.protected_tokens == 0
    assert run.cache.compute_free_capacity() == 1
    blocks = pool.get_free_blocks(allocator.index, run.cache.num_blocks)
    first = pool.num_reserved_sectors * allocator.blocks_per_sector
    assert sorted(blocks) == list(range(first, first + run.cache.num_blocks))
    assert allocator.ledger.tree.total_tokens == 0


def finish(run: Engine, works: list[Work], whole: bool = False) -> Engine:
    for _ in run.run(works):
        if whole:
            assert_whole(run)
    return run


@settings(deadline=None, max_examples=examples(8, 50))
@given(works=works_of(TOKENS, 4, 12), scheduler=st.sampled_from(["fifo", "prefill_first"]))
def test_every_step_is_the_same_where_all_fits(works: list[Work], scheduler: str) -> None:
    theirs, ours = (finish(engine(kind, MANY, scheduler_type=scheduler), works) for kind in ("own", "flatradix"))
    assert ours.outputs == theirs.outputs
    assert ours.cached == theirs.cached
    assert (ours.steps, ours.computed) == (theirs.steps, theirs.computed)
    assert_idle(ours)


@settings(deadline=None, max_examples=examples(8, 50))
@given(works=works_of(SYSTEM_PROMPTS, 12, 24), blocks=TIGHT, scheduler=st.sampled_from(["fifo", "prefill_first"]))
def test_equal_outputs_in_a_tight_pool(works: list[Work], blocks: int, scheduler: str) -> None:
    theirs = finish(engine("own", blocks, scheduler_type=scheduler), works)
    ours = finish(engine("flatradix", blocks, scheduler_type=scheduler), works, whole=True)
    for name, output in theirs.outputs.items():
        # a client that gives up may do so before or after the end
        assert ours.outputs.get(name, output) == output or works[int(name)].gives_up is not None
    patient = {str(number) for number, work in enumerate(works) if work.gives_up is None}
    assert patient <= ours.outputs.keys()
    assert_idle(ours)


def talks(seed: int, users: int = 8, turns: int = 5) -> list[list[Work]]:
    """Return turns of conversations behind two system prompts: a group of requests for each turn.

    What a turn generates is not known here, so random tokens stand for the answers in the next prompt.
    """
    numbers = random.Random(seed)

    def some(count: int) -> list[int]:
        return [numbers.randrange(512) for _ in range(count)]

    systems = [some(40) for _ in range(2)]
    histories = [list(numbers.choice(systems)) for _ in range(users)]
    groups = []
    for _ in range(turns):
        for history in histories:
            history += some(numbers.randrange(4, 20))
        numbers.shuffle(histories)
        groups.append([Work(0, list(history), numbers.randrange(2, 10)) for history in histories])
    return groups


@pytest.mark.parametrize("blocks", [90, 130, MANY])
def test_groups_one_after_the_other(blocks: int) -> None:
    """In no pool is less found and more computed than with transformers' own cache, and nothing else comes out."""
    for seed in range(3):
        theirs, ours = engine("own", blocks), engine("flatradix", blocks)
        for group in talks(seed):
            for run in (theirs, ours):
                run.outputs.clear()
                finish(run, group)
            assert ours.outputs == theirs.outputs
            if seed == 0:
                for number, work in enumerate(group):
                    assert ours.outputs[str(number)] == plain(work)
        assert ours.hits >= theirs.hits
        assert ours.computed <= theirs.computed
        assert_idle(ours)


@pytest.mark.parametrize("scheduler", ["fifo", "prefill_first"])
def test_requests_that_lose_their_blocks(scheduler: str) -> None:
    """In a pool that holds three requests at most, some have to give their blocks back and begin again."""
    theirs, ours = (engine(kind, 50, scheduler_type=scheduler) for kind in ("own", "flatradix"))
    for group in talks(0, turns=4):
        for run in (theirs, ours):
            run.outputs.clear()
            finish(run, group, whole=run is ours)
        assert ours.outputs == theirs.outputs
    assert ours.starved > 0
    assert_idle(ours)


def plain(work: Work) -> list[int]:
    """Return what the model generates without paged attention and without other requests."""
    prompt = torch.tensor([work.prompt])
    ids = MODEL.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=work.outputs, do_sample=False, pad_token_id=0
    )
    return ids[0, len(work.prompt) :].tolist()


@pytest.mark.parametrize("blocks", [40, MANY])
def test_samples_share_the_blocks_of_their_prompt(blocks: int) -> None:
    works = [Work(at, [*HEADS[at % 2], at, at + 1], 8) for at in range(6)]
    theirs, ours = engine("own", blocks, samples=3), finish(engine("flatradix", blocks, samples=3), works, whole=True)
    finish(theirs, works)
    assert len(ours.outputs) == 3 * len(works)
    assert ours.outputs == theirs.outputs
    assert ours.computed <= theirs.computed
    assert_idle(ours)


def test_a_reset_forgets_everything() -> None:
    run = finish(engine("flatradix", 50), talks(0)[0][:3])
    run.cache.reset()
    run.cached.clear()
    finish(run, talks(0)[0][:1])
    assert not run.cached
    assert_idle(run)


def test_only_caches_made_in_the_context() -> None:
    with pytest.raises(KeyError), flatradix_cache():
        raise KeyError
    run = engine("own", 20)
    assert type(run.cache.pool) is CachePool
    assert not isinstance(allocator_of(run), RadixAllocator)
