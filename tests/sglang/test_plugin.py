"""How SGLang finds the backend, and which options the backend refuses at the start."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch

from flatradix.errors import DeviceUnavailableError
from tests.support.sglang_engine import Plan, load_or_skip, make_allocator, make_params

SGLANG = load_or_skip()
PLAN = Plan()


@pytest.fixture
def plugin() -> Iterator[Any]:
    """The plug-in's module, registered in an empty registry. The old registry is restored afterwards."""
    from flatradix.integrations.sglang import plugin as loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SGLANG.registry, "_RADIX_CACHE_REGISTRY", {})
        loaded.register()
        yield loaded


def context_for(plan: Plan = PLAN, params: dict[str, Any] | None = None, **others: Any) -> Any:
    """Return the context that the scheduler passes to `create_tree_cache`."""
    pool = SGLANG.pools.ReqToTokenPool(size=4, max_context_len=100, device="cpu", enable_memory_saver=False)
    made = make_params(SGLANG, plan, pool, make_allocator(SGLANG, plan), **(params or {}))
    fields = {
        "server_args": None, "params": made, "is_hybrid_swa": False, "is_hybrid_ssm": False,
        "enable_hierarchical_cache": False, "disable_radix_cache": False, "tp_worker": None, "model_config": None,
        "tp_size": 1, "tp_rank": 0, "tp_group": None,
    }  # fmt: skip
    return SGLANG.registry.TreeCacheBuildContext(**{**fields, **others})


def options(**fields: Any) -> Any:
    return SGLANG.context.get_context().override_server_args(**fields)


def create(context: Any, **fields: Any) -> Any:
    with options(radix_cache_backend="flatradix", **fields):
        return SGLANG.registry.create_tree_cache(context)


def test_the_entry_point_is_the_plugin(plugin: Any) -> None:
    (point,) = [point for point in entry_points(group="sglang.srt.plugins") if point.name == "flatradix"]
    assert point.load() is plugin.register


def test_sglang_loads_the_plugin_and_the_flag_chooses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SGLANG.registry, "_RADIX_CACHE_REGISTRY", {})
    monkeypatch.setattr(SGLANG.plugins, "_plugins_loaded", False)
    SGLANG.plugins.load_plugins()
    assert "flatradix" in SGLANG.registry.registered_radix_cache_backends()
    assert type(create(context_for())).__name__ == "FlatRadixCache"
    with options():
        params = context_for(params={"tree_core_backend": "python"})
        assert type(SGLANG.registry.create_tree_cache(params)).__name__ == "UnifiedRadixCache"


def test_registering_twice_changes_nothing(plugin: Any) -> None:
    plugin.register()
    assert SGLANG.registry.registered_radix_cache_backends() == ["flatradix"]


def test_a_disabled_cache_is_sglangs_own(plugin: Any) -> None:
    context = context_for(disable_radix_cache=True)
    context.params.disable = True
    cache = create(context)
    assert type(cache).__name__ == "UnifiedRadixCache"
    assert not cache.supports_prefix_sharing()


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"is_hybrid_ssm": True}, "mamba"),
        ({"is_hybrid_swa": True}, "--disable-hybrid-swa-memory"),
    ],
)
def test_refuses_what_the_scheduler_found(plugin: Any, fields: dict[str, bool], option: str) -> None:
    with pytest.raises(ValueError, match=option):
        create(context_for(**fields))


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("enable_streaming_session", True, "--enable-streaming-session"),
        ("enable_session_radix_cache", True, "--enable-session-radix-cache"),
        ("enable_lmcache", True, "--enable-lmcache"),
        ("enable_flexkv", True, "--enable-flexkv"),
        ("enable_unified_cache_external_linker", True, "--enable-unified-cache-external-linker"),
        ("disaggregation_decode_enable_offload_kvcache", True, "--disaggregation-decode-enable-offload-kvcache"),
        ("disaggregation_decode_retraction_backup", "host_pool", "--disaggregation-decode-retraction-backup cpu_t"),
    ],
)
def test_refuses_options(plugin: Any, field: str, value: Any, option: str) -> None:
    with pytest.raises(ValueError, match=f"flatradix does not serve .*{option}"):
        create(context_for(), **{field: value})


def test_refuses_policies_and_their_options(plugin: Any) -> None:
    with pytest.raises(ValueError, match="--radix-eviction-policy tlru: choose one of lru"):
        create(context_for(Plan(eviction="tlru")))
    with pytest.raises(ValueError, match="--radix-eviction-policy-config with threshold for lru"):
        create(context_for(params={"eviction_policy_config": {"threshold": 3}}))


def test_refuses_other_pools(plugin: Any) -> None:
    with pytest.raises(ValueError, match="sliding windows"):
        create(context_for(params={"decoder_swa_bounded_replay": True}))
    context = context_for()
    context.params.req_to_token_pool.req_to_c128_sidecar = None
    with pytest.raises(ValueError, match="DeepSeek-V4"):
        create(context)
    context = context_for()
    sharded = object.__new__(SGLANG.page_interleave.PageInterleavePoolAllocator)
    sharded.shard_size = 2
    context.params.token_to_kv_pool_allocator = sharded
    with pytest.raises(ValueError, match="sharded by pages"):
        create(context)


@pytest.mark.parametrize("threshold", [1, 2, 4])
def test_slru_takes_its_threshold(plugin: Any, threshold: int) -> None:
    """A node inserted `threshold` times outlives a more recently used node with fewer inserts."""
    context = context_for(Plan(eviction="slru"), params={"eviction_policy_config": {"protected_threshold": threshold}})
    tree = create(context).tree
    for _ in range(threshold):
        tree.insert([1, 2], [1, 2])
    tree.insert([3, 4], [3, 4], inserted_lengths=2)
    tree.match([3, 4])
    assert tree.evict(1).slots.tolist() == [3, 4]


def test_the_index_is_on_the_cpu_unless_the_environment_says_otherwise(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for word in (None, "auto", "cpu"):
        monkeypatch.delenv("FLATRADIX_DEVICE", raising=False)
        if word is not None:
            monkeypatch.setenv("FLATRADIX_DEVICE", word)
        assert create(context_for()).tree.device == torch.device("cpu")
    monkeypatch.setenv("FLATRADIX_DEVICE", "nonsense")
    with pytest.raises(ValueError, match="FLATRADIX_DEVICE=nonsense is no device"):
        create(context_for())


@pytest.mark.skipif(torch.cuda.is_available() or bool(os.environ.get("TRITON_INTERPRET")), reason="a GPU can be used")
def test_asking_for_a_gpu_where_there_is_none(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATRADIX_DEVICE", "cuda")
    with pytest.raises(DeviceUnavailableError, match="no CUDA device"):
        create(context_for())


def _python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_flatradix_does_not_import_sglang() -> None:
    ran = _python("import sys, flatradix.integrations; assert not any(m.startswith('sglang') for m in sys.modules)")
    assert ran.returncode == 0, ran.stderr


def test_without_sglang_the_import_says_what_to_install() -> None:
    ran = _python("import sys; sys.modules['sglang'] = None; import flatradix.integrations.sglang.plugin")
    assert "ImportError: flatradix.integrations.sglang.plugin works inside SGLang 0.5.23" in ran.stderr
    assert "pip install sglang==0.5.23" in ran.stderr
