"""examples/mini_sglang.py beside mini-sglang's own tree, each under mini-sglang's own cache manager."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.minisgl_modules import load_or_skip

minisgl = load_or_skip()

import examples.mini_sglang  # noqa: E402, F401 - the import registers the cache

ROWS, WIDTH = 8, 64
TOKENS = st.integers(0, 2)  # few: prompts share prefixes of all lengths


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the tree a clock of its own, and replace the only function that needs pinned memory."""
    monkeypatch.setattr(minisgl.radix_cache, "time", SimpleNamespace(monotonic_ns=itertools.count(1).__next__))
    monkeypatch.setattr(minisgl.scheduler_cache, "_write_page_table", write_page_table)
    monkeypatch.setattr(minisgl.core, "_GLOBAL_CTX", None)


def write_page_table(table: torch.Tensor, slots: torch.Tensor, parts: list[tuple[int, int, int]], page: int) -> None:
    for row, first, last in parts:
        table[row, first * page : last * page], slots = slots.split(
            [(last - first) * page, len(slots) - (last - first) * page]
        )


def touch_what_is_matched_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Change the one rule in which mini-sglang's tree differs: a node that is matched in part keeps its old time."""
    plain = minisgl.radix_cache.RadixTreeNode.get_match_len

    def touched(node: Any, ids: torch.Tensor) -> int:
        node.timestamp = minisgl.radix_cache.time.monotonic_ns()
        return plain(node, ids)

    monkeypatch.setattr(minisgl.radix_cache.RadixTreeNode, "get_match_len", touched)


class Run:
    """mini-sglang's CacheManager over one prefix cache, and the requests that run."""

    def __init__(self, kind: str, pages: int, page: int, rows: int = ROWS, width: int = WIDTH) -> None:
        context = minisgl.core.Context(page)
        minisgl.core._GLOBAL_CTX = context
        table = torch.zeros(rows, width, dtype=torch.int32)
        self.manager = minisgl.scheduler_cache.CacheManager(pages, page, table, kind)
        self.rows = list(range(rows))
        self.running: list[Any] = []
        self.hits = 0

    def begin(self, prompt: list[int]) -> tuple[int, bool]:
        """Start a request if there is space, as `PrefillAdder` does. Returns what is cached, and whether it started."""
        ids = torch.tensor(prompt, dtype=torch.int32)
        handle = self.manager.match_req(SimpleNamespace(input_ids=ids, input_len=len(ids))).cuda_handle
        self.manager.lock(handle)
        if not self.rows or len(ids) + self.manager.page_size - handle.cached_len > self.manager.available_size:
            self.manager.unlock(handle)
            return handle.cached_len, False
        row = self.rows.pop()
        if handle.cached_len:
            self.manager.page_table[row, : handle.cached_len] = handle.get_matched_indices()
        space = self.manager.page_table.shape[1] - len(ids)
        request = minisgl.core.Req(ids, row, handle.cached_len, space, 0, None, handle)
        self.manager.allocate_paged([request])
        request.complete_one()
        self.running.append(request)
        self.hits += handle.cached_len
        return handle.cached_len, True

    def cache(self, which: int) -> None:
        """Cache what a request has computed, as after a prefill."""
        if self.running:
            self.manager.cache_req(self.running[which % len(self.running)], finished=False)

    def decode(self, which: int, token: int) -> None:
        if not self.running or self.manager.available_size < self.manager.page_size:
            return
        request = self.running[which % len(self.running)]
        if request.can_decode:
            request.append_host(torch.tensor([token], dtype=torch.int32))
            self.manager.allocate_paged([request])
            request.complete_one()

    def finish(self, which: int) -> None:
        if self.running:
            request = self.running.pop(which % len(self.running))
            self.manager.cache_req(request, finished=True)
            self.rows.append(request.table_idx)

    def peek(self, prompt: list[int]) -> int:
        return self.manager.prefix_cache.match_prefix(torch.tensor(prompt, dtype=torch.int32)).cuda_handle.cached_len

    def evict(self, tokens: int) -> list[int]:
        """Evict what can be evicted, up to so many tokens. The pages go to the free list."""
        manager = self.manager
        slots = manager.prefix_cache.evict(min(tokens, manager.prefix_cache.size_info.evictable_size))
        manager.free_slots = torch.cat([manager.free_slots, slots[:: manager.page_size]])
        return slots.tolist()

    def state(self) -> tuple[Any, ...]:
        """All that both caches must agree on."""
        manager = self.manager
        lengths = [request.cache_handle.cached_len for request in self.running]
        return manager.prefix_cache.size_info, manager.free_slots.tolist(), manager.page_table.tolist(), lengths


WHICH = st.integers(0, ROWS - 1)
PROMPTS = st.lists(TOKENS, min_size=1, max_size=30)
WITHOUT_EVICTIONS = [
    st.tuples(st.just("begin"), PROMPTS),
    st.tuples(st.just("cache"), WHICH),
    st.tuples(st.just("decode"), WHICH, TOKENS),
    st.tuples(st.just("finish"), WHICH),
    st.tuples(st.just("peek"), PROMPTS),
]
EVICTIONS = st.tuples(st.just("evict"), st.integers(0, 20))


def assert_equal_runs(program: list[tuple[Any, ...]], pages: int, page: int) -> None:
    """Assert that both caches answer every call alike, and that no page is lost at the end."""
    theirs, ours = Run("radix", pages, page), Run("flatradix", pages, page)
    for name, *arguments in program:
        found, expected = (getattr(run, name)(*arguments) for run in (ours, theirs))
        assert found == expected, name
        assert ours.state() == theirs.state(), name
        ours.manager.prefix_cache.check_integrity()
    for run in (ours, theirs):
        while run.running:
            run.finish(0)
        run.manager.check_integrity()
    assert sorted(ours.evict(pages * page)) == sorted(theirs.evict(pages * page))
    assert sorted(ours.manager.free_slots.tolist()) == list(range(0, pages * page, page))


@pytest.mark.parametrize("page", [1, 4])
@given(program=st.lists(st.one_of(WITHOUT_EVICTIONS), max_size=60))
def test_equal_without_evictions(page: int, program: list[tuple[Any, ...]]) -> None:
    assert_equal_runs(program, 4000, page)


@pytest.mark.parametrize("page", [1, 4])
@given(program=st.lists(st.one_of(*WITHOUT_EVICTIONS, EVICTIONS), max_size=60))
def test_equal_with_evictions_where_a_match_in_part_touches(page: int, program: list[tuple[Any, ...]]) -> None:
    """The same victims in the same order, so every page of every request is the same."""
    with pytest.MonkeyPatch.context() as patch:
        touch_what_is_matched_in_part(patch)
        assert_equal_runs(program, 120 // page, page)


def talk(run: Run, seed: int) -> int:
    """Let users talk in turns, each behind one of three system prompts; return the tokens that were cached."""
    numbers = random.Random(seed)
    systems = [[numbers.randrange(1000) for _ in range(40)] for _ in range(3)]
    talks = [list(numbers.choice(systems)) for _ in range(12)]
    for _ in range(150):
        turn = talks[numbers.randrange(len(talks))]
        if len(turn) > 200:
            del turn[40:]
        turn += [numbers.randrange(1000) for _ in range(numbers.randrange(1, 30))]
        _, began = run.begin(turn)
        assert began
        run.cache(0)
        for _ in range(numbers.randrange(1, 12)):
            turn.append(numbers.randrange(1000))
            run.decode(0, turn[-1])
        run.finish(0)
    run.manager.check_integrity()
    return run.hits


@pytest.mark.parametrize("page", [1, 4])
def test_no_fewer_hits_by_page(page: int) -> None:
    """Here mini-sglang's tree is as it is, and frees whole nodes."""
    for seed in range(3):
        theirs, ours = (talk(Run(kind, 500 // page, page, width=300), seed) for kind in ("radix", "flatradix-by-page"))
        assert ours >= theirs


def test_an_eviction_of_too_much_is_refused() -> None:
    run = Run("flatradix", 10, 4)
    run.begin([1] * 9)
    run.cache(0)
    with pytest.raises(RuntimeError, match="cannot evict 4 tokens: 0 are evictable"):
        run.manager.prefix_cache.evict(4)
    run.manager.prefix_cache.reset()
    assert run.manager.prefix_cache.size_info.total_size == 0


def test_in_inference_mode() -> None:
    """mini-sglang's scheduler makes and uses its cache in inference mode."""
    with torch.inference_mode():
        assert talk(Run("flatradix", 120, 4, width=300), 0) > 0
