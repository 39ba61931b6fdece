"""The index under the SGLang backend, without SGLang: where it splits, and that it never waits for a forward pass."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flatradix.integrations.sglang.index import SchedulerTree, make_tree, up_to


def index_for(device: str, pool: str = "cpu", page_size: int = 1) -> SchedulerTree:
    allocator = SimpleNamespace(size=1000, device=pool)
    params = SimpleNamespace(
        token_to_kv_pool_allocator=allocator, page_size=page_size, eviction_policy="lru", eviction_policy_config=None,
        is_eagle=False,
    )  # fmt: skip
    return make_tree(params, device)


def test_a_match_splits_the_edge_that_it_ends_on(device: str) -> None:
    index = index_for(device)
    index.insert([1, 2, 3, 4], torch.arange(4))
    place = index.match(array("q", [1, 2, 9]), None, None)
    assert place.length == 2
    assert index.tree.num_nodes == 2
    assert index.evict(1).slots.tolist() == [2, 3]
    assert index.slots(place).tolist() == [0, 1]
    index.tree.check()


@pytest.mark.parametrize("kind", [lambda v: array("q", v), lambda v: array("i", v), list, np.array, torch.tensor])
def test_a_match_takes_what_a_tree_takes(kind: Any, device: str) -> None:
    index = index_for(device)
    index.insert([1, 2, 3, 4], torch.arange(4), namespace="a")
    for limit, length in ((None, 4), (9, 4), (3, 3), (0, 0)):
        assert index.match(kind([1, 2, 3, 4]), limit, "a").length == length
    assert index.match(kind([1, 2, 3, 4]), None, "b").length == 0
    assert index.match(kind([1, 2, 3, 4]), None, None).length == 0


@pytest.mark.parametrize("kind", [lambda tokens: array("q", tokens), list, torch.tensor])
@pytest.mark.parametrize("foreign", [-1, 2**31, 2**62 - 1])
def test_a_token_of_no_vocabulary_ends_what_is_cached(kind: Any, foreign: int, device: str) -> None:
    index = index_for(device)
    result = index.insert(kind([1, 2, foreign, 3]), torch.arange(4))
    assert (result.length, index.tree.total_tokens) == (2, 2)
    index.insert(kind([5, foreign]), torch.arange(10, 12), start=result)
    assert index.match(kind([1, 2, 5, foreign, 3]), None, None).length == 3
    assert index.match(kind([1, 2, 5, foreign, 3]), 2, None).length == 2
    assert index.match(kind([foreign, 1, 2]), None, None).length == 0
    index.tree.raise_pending()
    index.tree.check()


def test_other_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="it has 2 tokens, but 1 slots"):
        index_for("cpu").insert(array("q", [1, 2]), torch.arange(1))


def test_a_limit_copies_nothing() -> None:
    tokens = array("q", range(5))
    view = up_to(tokens, 3)
    assert view.obj is tokens
    assert up_to(tokens, 5) is tokens
    assert up_to(tokens, None) is tokens


def test_places_above(device: str) -> None:
    index = index_for(device, page_size=2)
    result = index.insert([1, 2, 3, 4], torch.arange(4))
    above = index.above(result, 2)
    index.insert([], torch.empty(0, dtype=torch.int64), start=above, priority=3)
    assert index.tree.num_nodes == 2


@contextmanager
def _busy() -> Iterator[torch.cuda.Event]:
    """Keep the current stream busy for about a second; the event completes when that work is done."""
    torch.cuda._sleep(2_000_000_000)
    done = torch.cuda.Event()
    done.record()
    yield done
    torch.cuda.synchronize()


def _use(index: SchedulerTree, row: torch.Tensor) -> list[torch.Tensor]:
    """Make the calls of a request: two checkpoints, a split at the end of the prompt, a match, an eviction."""
    tokens = array("q", range(100))
    place = index.insert(tokens[:60], row[:60])
    index.lock(place)
    further = index.insert(tokens[60:], row[60:100], start=place)
    index.insert(array("q"), row[:0], start=index.above(further, 80))
    index.unlock(place)
    found = index.match(array("q", [*range(30), 7]), None, None)
    index.lock(found)
    slots = index.slots(found)
    freed = index.evict(10)
    assert (found.length, freed.num_tokens, index.tree.protected_tokens) == (30, 20, 30)
    index.unlock(found)
    return [slots, freed.slots]


def _check(slots: list[torch.Tensor]) -> None:
    assert [values.tolist() for values in slots] == [list(range(500, 530)), list(range(580, 600))]
    assert all(values.is_cuda and values.dtype == torch.int64 for values in slots)


def test_an_index_on_the_cpu_never_waits_for_the_gpu(gpu: str) -> None:
    row = torch.arange(500, 700, dtype=torch.int32, device=gpu)
    _use(index_for("cpu", gpu), row)  # compiles and allocates
    index = index_for("cpu", gpu)
    with _busy() as done:
        torch.cuda.set_sync_debug_mode("error")
        try:
            slots = _use(index, row)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not done.query()
    _check(slots)


def test_a_look_up_in_an_index_on_the_gpu_does_not_wait_for_the_current_stream(gpu: str) -> None:
    row = torch.arange(500, 700, dtype=torch.int32, device=gpu)
    index = index_for(gpu, gpu)
    _check(_use(index, row))
    with _busy() as done:
        found = index.match(array("q", range(30)), None, None)
        index.lock(found)
        assert (found.length, index.tree.protected_tokens) == (30, 30)
        index.unlock(found)
        assert not done.query()
        slots = index.slots(found)
    assert slots.tolist() == list(range(500, 530))
