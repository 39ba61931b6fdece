"""The behaviour of FlatRadixCache that SGLang's scheduler relies on, call by call."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch

from flatradix import StaleHandleError
from tests.support.sglang_engine import Plan, load_or_skip
from tests.support.sglang_home import Home

SGLANG = load_or_skip()
SGLANG_IMAGE = 916876685625995598  # a number of 62 bits, as SGLang makes it from an image's hash


@pytest.fixture
def home() -> Home:
    return Home(Plan())


@pytest.fixture
def home_of_each(device: str) -> Home:
    """A home with the index on each device in turn."""
    return Home(Plan(), device)


def test_a_match_is_what_the_scheduler_reads(home_of_each: Home) -> None:
    home = home_of_each
    slots = home.store(range(10))
    found = home.match([*range(6), 99])
    assert type(found.device_prefix_len) is int
    assert found.device_prefix_len == 6
    assert found.last_device_node is found.last_host_node is found.best_match_node
    assert found.host_hit_length == 0
    indices = home.cache.path_device_indices(found.last_device_node)
    assert indices.dtype == torch.int64
    assert indices.is_contiguous()
    assert indices.tolist() == slots[:6]
    req = SimpleNamespace(last_node=found.last_device_node, prefix_len=5, rid="r")
    assert home.cache.prefix_device_indices(req).tolist() == slots[:5]


def test_a_limit_cuts_the_key_without_a_copy(home: Home) -> None:
    home.store(range(10))
    tokens = array("q", range(10))
    key = SGLANG.radix.RadixKey(tokens, limit=7)
    assert home.cache.match_prefix(SGLANG.base.MatchPrefixParams(key=key)).device_prefix_len == 7
    tokens.append(1)  # raises if the cache still holds a view of its memory
    assert home.match(range(10), limit=0).device_prefix_len == 0
    assert home.match(range(10), limit=50).device_prefix_len == 10


def test_an_empty_key_is_the_root(home: Home) -> None:
    found = home.match([])
    assert found.device_prefix_len == 0
    assert home.cache.path_device_indices(found.last_device_node).tolist() == []
    home.cache.unlock(home.cache.lock(home.cache.root_node_handle("adapter")))
    home.cache.unlock(None)
    assert home.sizes() == (0, 0)


@pytest.mark.parametrize(
    "other",
    [
        {"extra_key": "a"}, {"extra_key": ""}, {"cache_salt": "a"}, {"extra_key": "a", "cache_salt": "b"},
        {"extra_key": "ab", "cache_salt": ""}, {"extra_key": "", "cache_salt": "ab"}, {"extra_key": "1:a"},
        {"extra_key": "a", "cache_salt": "1:ab"}, {"cache_salt": "1:ab"}, {"cache_salt": "0:ab"},
    ],
)  # fmt: skip
def test_extra_keys_and_salts_never_share(other: dict[str, str]) -> None:
    home = Home(Plan())
    spaces = [{}, {"extra_key": "1:ab"}, {"extra_key": "a", "cache_salt": "ab"}, {"cache_salt": "b"}, other]
    for number, space in enumerate(spaces):
        assert home.match([1, 2, 3], **space).device_prefix_len == 0, (number, space)
        home.store([1, 2, 3], **space)
        assert home.match([1, 2, 3], **space).device_prefix_len == 3
    assert home.cache.total_size() == 3 * len(spaces)


def test_locks_tell_how_much_they_protect(home_of_each: Home) -> None:
    home = home_of_each
    home.store(range(10))
    node = home.match(range(4)).last_device_node
    assert home.cache.inc_lock_ref(node).delta == -4
    assert home.sizes() == (6, 4)
    assert home.cache.inc_lock_ref(node).delta == 0
    lock = home.cache.lock(home.match(range(10)).last_device_node)
    assert home.sizes() == (0, 10)
    home.cache.unlock(lock)
    assert home.cache.dec_lock_ref(node).delta == 0
    assert home.cache.dec_lock_ref(node, SGLANG.base.DecLockRefParams()).delta == 4
    assert home.sizes() == (10, 0)


def test_one_match_may_be_locked_by_two(home: Home) -> None:
    """SGLang's prefill adder locks briefly, reads the sizes, and locks again for the whole request."""
    home.store(range(10))
    node = home.match(range(4)).last_device_node
    first = home.cache.lock(node)
    assert home.cache.evictable_size() == 6
    second = home.cache.lock(node)
    home.cache.unlock(first)
    assert home.sizes() == (6, 4)
    home.cache.unlock(second)
    assert home.sizes() == (10, 0)


def test_eviction_frees_before_it_returns(home_of_each: Home) -> None:
    home = home_of_each
    slots = home.store(range(10))
    before = home.allocator.available_size()
    result = home.cache.evict_for_alloc(SGLANG.base.EvictParams(num_tokens=3))
    assert result.num_tokens_evicted == 10
    assert home.allocator.available_size() == before + 10
    assert set(slots) <= set(home.allocator.get_all_free_pages().tolist())
    assert home.cache.evict(SGLANG.base.EvictParams(num_tokens=5)).num_tokens_evicted == 0
    assert home.cache.evict(SGLANG.base.EvictParams()).num_tokens_evicted == 0


def test_a_checkpoint_goes_on_from_the_lock(home_of_each: Home) -> None:
    """A checkpoint inserts only the new tokens. Then the row has the tree's slots, and the lock ends at its end."""
    home = home_of_each
    req = home.request(range(60), range(100, 110))
    home.cache.checkpoint(req, up_to=20)
    given: list[int] = []
    insert = home.cache._tree.insert
    home.cache._tree.insert = lambda tokens, slots, **options: (
        given.append(len(tokens)) or insert(tokens, slots, **options)
    )
    home.cache.checkpoint(req, up_to=50)
    home.cache.checkpoint(req, up_to=60)
    home.cache.checkpoint(req, up_to=70)
    assert given == [30, 10, 10, 0]  # the 0 is the split at the end of the prompt
    assert (req.kv.cache_protected_len, req.kv.cache_inserted_len) == (70, 70)
    assert req.last_node is req.lock.node
    assert home.sizes() == (0, 70)
    home.cache.unlock(req.lock)
    assert home.sizes() == (70, 0)
    assert home.match([*range(60), *range(100, 110)]).device_prefix_len == 70
    home.cache.evict(SGLANG.base.EvictParams(num_tokens=1))
    assert home.cache.total_size() == 60  # the output was evicted, the prompt was not


def test_a_checkpoint_takes_over_what_was_cached_meanwhile(home_of_each: Home) -> None:
    home = home_of_each
    first, second = home.request(range(30)), home.request([*range(20), 99])
    free = home.allocator.available_size()
    home.cache.checkpoint(first, up_to=30)
    home.cache.checkpoint(second, up_to=21)
    assert home.allocator.available_size() == free + 20
    rows = home.pool.req_to_token[[1, 2], :20].tolist()
    assert rows[0] == rows[1]
    home.cache.unlock(first.lock)
    assert home.sizes() == (10, 21)


def test_a_checkpoint_without_a_lock_starts_at_the_root(home: Home) -> None:
    req = home.request(range(30), extra_key="adapter")
    home.cache.checkpoint(req, up_to=10)
    home.cache.unlock(req.lock)
    req.lock = None
    home.cache.checkpoint(req, up_to=30)
    assert home.sizes() == (0, 30)
    assert home.match(range(30), extra_key="adapter").device_prefix_len == 30


@pytest.mark.parametrize("is_eagle", [False, True])
def test_a_checkpoint_of_less_than_is_locked(is_eagle: bool, device: str) -> None:
    """As after an output was discarded: the lock moves up, and the nodes below become evictable."""
    home = Home(Plan(is_eagle=is_eagle), device)
    req = home.request(range(60))
    home.cache.checkpoint(req, up_to=50)
    home.cache.checkpoint(req, up_to=25)
    assert home.sizes() == (25, 25 - is_eagle)
    assert req.kv.cache_protected_len == 25 - is_eagle
    home.cache.checkpoint(req, up_to=25)  # exactly what is locked, which is one unit less with bigrams
    assert home.sizes() == (25, 25 - is_eagle)
    home.cache.tree.check()


def test_what_stands_for_an_image_is_not_cached(home_of_each: Home) -> None:
    """The tokens after an image are not cached either. The request keeps their slots, whatever its chunks."""
    home = home_of_each
    image = SGLANG_IMAGE
    prompt = [*range(10), image, image, *range(20, 30)]
    req = home.request(prompt, [7, 8])
    free = home.allocator.available_size()
    for up_to in (11, 12, 20, 24):
        home.cache.checkpoint(req, up_to=up_to)
        assert req.kv.cache_protected_len == 10
        assert home.sizes() == (0, 10)
    assert home.allocator.available_size() == free
    home.cache.unlock(req.lock)
    again = home.match(prompt)
    assert again.device_prefix_len == 10
    home.cache.tree.check()


def test_the_greatest_priority(home: Home) -> None:
    """The priority of the prompt is one higher, up to the largest int64."""
    req = home.request(range(20), range(50, 60), priority=2**63 - 1)
    home.cache.checkpoint(req, up_to=30)
    assert home.sizes() == (0, 30)


@pytest.mark.parametrize("page_size", [1, 4])
def test_bigrams_of_eagle(page_size: int, device: str) -> None:
    home = Home(Plan(page_size=page_size, is_eagle=True), device)
    req = home.request(range(40))
    home.cache.checkpoint(req, up_to=17)
    home.cache.checkpoint(req, up_to=40)
    units = 39 // page_size * page_size
    assert req.kv.cache_protected_len == units
    home.cache.unlock(req.lock)
    found = home.match(range(40))
    assert found.device_prefix_len == units
    row = home.pool.req_to_token[req.kv.req_pool_idx, :units]
    assert home.cache.path_device_indices(found.last_device_node).tolist() == row.tolist()
    assert home.match([*range(10), 99]).device_prefix_len == 9 // page_size * page_size


def test_the_last_page_stays_the_requests() -> None:
    home = Home(Plan(page_size=16))
    req = home.request(range(40))
    home.cache.checkpoint(req, up_to=40)
    assert req.kv.cache_protected_len == 32
    assert home.sizes() == (0, 32)
    short = home.request([7] * 10)
    home.cache.checkpoint(short, up_to=10)
    assert short.kv.cache_protected_len == 0
    assert home.sizes() == (0, 32)


def test_insert_leaves_double_slots_to_the_caller() -> None:
    home = Home(Plan(page_size=4))
    params = SGLANG.base.InsertParams(key=home.key(range(10)), value=torch.arange(8), priority=3)
    assert home.cache.insert(params).prefix_len == 0
    again = SGLANG.base.InsertParams(key=home.key([*range(8), 1, 2, 3, 4]), value=torch.arange(20, 32))
    result = home.cache.insert(again)
    assert result.prefix_len == 8
    assert home.cache.path_device_indices(result.last_device_node).tolist() == [*range(8), 28, 29, 30, 31]


def test_touching_keeps_a_prefix(home: Home) -> None:
    home.store([1, 2, 3])
    home.store([4, 5, 6])
    home.cache.touch_prefix(home.key([1, 2, 3]))
    home.cache.evict(SGLANG.base.EvictParams(num_tokens=1))
    assert home.match([1, 2, 3]).device_prefix_len == 3
    assert home.match([4, 5, 6]).device_prefix_len == 0


def test_depth_first_order_by_weight(home_of_each: Home) -> None:
    home = home_of_each
    home.store([1, 2, 3])
    home.store([1, 2, 4])
    home.store([9, 8], extra_key="adapter")
    wanted = [([7], None), ([1, 2, 4], None), ([9, 8], "adapter"), ([1, 2], None), ([1, 2, 3], None), ([1, 2, 3], None)]
    nodes = [home.match(tokens, extra_key=extra).last_device_node for tokens, extra in wanted]
    assert home.cache.dfs_weight_order(nodes) == [4, 5, 1, 3, 2, 0]
    assert home.cache.dfs_weight_order([]) == []


def test_reset_forgets_everything(home_of_each: Home) -> None:
    home = home_of_each
    home.store(range(10))
    node = home.match(range(10)).last_device_node
    home.cache.lock(node)
    home.cache.reset()
    assert home.sizes() == (0, 0)
    assert home.match(range(10)).device_prefix_len == 0
    home.cache.unlock(home.cache.lock(home.cache.root_node))


def test_a_node_that_is_gone_is_refused() -> None:
    home = Home(Plan())
    home.store(range(10))
    node = home.match(range(10)).last_device_node
    home.cache.evict(SGLANG.base.EvictParams(num_tokens=10))
    with pytest.raises(StaleHandleError):
        home.cache.lock(node)


def test_pretty_print_shows_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    home = Home(Plan())
    home.store([11, 12, 13], extra_key="adapter")
    home.cache.pretty_print()
    shown = capsys.readouterr().out
    assert "adapter" in shown
    assert "11" in shown


def test_metrics_count_what_was_evicted() -> None:
    import prometheus_client

    ranks = dict.fromkeys(("tp_rank", "pp_rank", "attn_cp_rank", "attn_tp_rank", "attn_dp_rank"), 0)
    with SGLANG.context.get_parallel().override(**ranks):
        home = Home(Plan(), enable_metrics=True)
    home.store(range(10))
    home.cache.evict(SGLANG.base.EvictParams(num_tokens=1))
    samples = [sample for metric in prometheus_client.REGISTRY.collect() for sample in metric.samples]
    ours = [sample for sample in samples if sample.labels.get("cache_type") == "FlatRadixCache"]
    assert [sample.value for sample in ours if sample.name == "sglang:evicted_tokens_total"] == [10.0]
    assert [sample.value for sample in ours if sample.name == "sglang:eviction_duration_seconds_count"] == [1.0]
