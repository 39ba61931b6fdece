"""Two engines with the same requests, compared after each step: FlatRadixCache and one of SGLang's caches."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.sglang_engine import Engine, Plan, draw_work


@contextmanager
def ever_later(sglang: Any) -> Iterator[None]:
    """Give SGLang's Python tree a clock that never shows the same time twice, so that its victims are defined."""
    clock = SimpleNamespace(monotonic=itertools.count(1).__next__, perf_counter=time.perf_counter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang.radix, "time", clock)
        yield


def flat_cache(params: Any, device: str = "cpu") -> Any:
    from flatradix.integrations.sglang.cache import FlatRadixCache  # imports SGLang

    return FlatRadixCache(params, device=device)


def python_cache(sglang: Any, params: Any) -> Any:
    return sglang.radix.RadixCache(params)


def default_cache(sglang: Any, params: Any) -> Any:
    """Return SGLang's default cache with its Rust core; skip the test if the core does not load."""
    params.tree_components = (sglang.component_type.ComponentType.FULL,)
    params.tree_core_backend = "rust"
    try:
        cache = sglang.unified.UnifiedRadixCache(params)
    except (ImportError, OSError) as reason:
        pytest.skip(f"SGLang's Rust core does not load: {reason}")
    if type(cache.tree_core).__name__ != "RustUnifiedTreeCore":
        pytest.skip(f"SGLang's Rust core does not run with torch {torch.__version__}")
    return cache


class Pair:
    """Both engines. after: called with the pair after each compared step."""

    def __init__(
        self,
        sglang: Any,
        plan: Plan,
        theirs: Callable[[Any, Any], Any],
        after: Callable[[Pair], None] | None = None,
        device: str = "cpu",
        count: int = 50,
    ) -> None:
        self.plan = plan
        self.work = draw_work(plan, count)
        self.ours = Engine(sglang, plan, partial(flat_cache, device=device))
        self.theirs = Engine(sglang, plan, partial(theirs, sglang))
        self.now = 0
        self._after = after

    def run(self, compare_slots: bool = True) -> Pair:
        coming = list(self.work)
        while coming or not self.ours.is_idle:
            while coming and coming[0].arrives <= self.now:
                work = coming.pop(0)
                self.ours.add(work)
                self.theirs.add(work)
            for engine in (self.ours, self.theirs):
                engine.give_up(self.now)
                engine.step()
                engine.check()
            self._compare(compare_slots)
            if self._after is not None:
                self._after(self)
            self.now += 1
            assert self.now < 5000, "requests that are never done"
        assert self.theirs.is_idle
        assert self.ours.finished == self.theirs.finished
        assert sorted(self.ours.finished) == sorted(work.rid for work in self.work)
        return self

    def _compare(self, compare_slots: bool) -> None:
        ours, theirs = self.ours, self.theirs
        assert ours.admitted == theirs.admitted
        sizes = [
            (engine.allocator.available_size(), engine.cache.evictable_size(), engine.cache.protected_size())
            for engine in (ours, theirs)
        ]
        assert sizes[0] == sizes[1]
        if compare_slots:
            assert ours.rows() == theirs.rows()
            assert free_pages(ours) == free_pages(theirs)


def free_pages(engine: Engine) -> list[int]:
    return sorted(engine.allocator.get_all_free_pages().tolist())


def is_drained(sglang: Any, engine: Engine) -> None:
    """Assert what SGLang's server checks when it is idle, and that everything can be evicted."""
    cache, allocator = engine.cache, engine.allocator
    assert cache.protected_size() == 0
    assert allocator.available_size() + cache.evictable_size() == engine.plan.slots
    assert cache.evict(sglang.base.EvictParams(num_tokens=engine.plan.slots)).num_tokens_evicted > 0
    assert allocator.available_size() == engine.plan.slots
    pages = engine.plan.slots // engine.plan.page_size
    assert free_pages(engine) == list(range(1, pages + 1))
