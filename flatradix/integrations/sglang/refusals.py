"""Options and models of SGLang that only its own tree can serve. They are refused by name when a server starts."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from sglang.srt.mem_cache.allocator.page_interleave import page_interleave_shard_size
from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
from sglang.srt.runtime_context import get_disagg, get_memory, get_serving

from flatradix.inputs.policy import NAMES


def _refuse(what: str, cure: str) -> NoReturn:
    raise ValueError(f"--radix-cache-backend flatradix does not serve {what}: {cure}, or leave out the backend")


def refuse_unserved(context: Any) -> None:
    """Raise ValueError for the first thing in a TreeCacheBuildContext that the cache cannot serve."""
    _refuse_models(context)
    _refuse_options(context)
    _refuse_policy(context.params)


def _refuse_models(context: Any) -> None:
    """Refuse models with more state than one KV slot a token, and KV pools that the index cannot serve."""
    params = context.params
    if context.is_hybrid_ssm:
        _refuse("models with mamba or linear-attention state", "take a model with attention alone")
    windowed = isinstance(params.token_to_kv_pool_allocator, SWATokenToKVPoolAllocator)
    if context.is_hybrid_swa or windowed or params.decoder_swa_bounded_replay:
        _refuse("a KV pool with sliding windows (SWA)", "use --disable-hybrid-swa-memory")
    if hasattr(params.req_to_token_pool, "req_to_c128_sidecar"):
        _refuse("DeepSeek-V4 with its sidecar pages (NPU)", "take another model")
    if page_interleave_shard_size(params.token_to_kv_pool_allocator) > 1:
        _refuse("a KV pool that is sharded by pages", "switch the sharding of the KV cache off")
    pool = torch.device(params.token_to_kv_pool_allocator.device).type
    if pool not in ("cpu", "cuda"):
        _refuse(f"a KV pool on {pool}", "run on an NVIDIA or AMD GPU, or a CPU")


def _refuse_options(context: Any) -> None:
    memory, disaggregation = get_memory(), get_disagg()
    asked = {
        "--enable-hierarchical-cache": context.enable_hierarchical_cache,
        "--enable-streaming-session": get_serving().enable_streaming_session,
        "--enable-session-radix-cache": memory.enable_session_radix_cache,
        "--enable-lmcache": memory.enable_lmcache,
        "--enable-flexkv": memory.enable_flexkv,
        "--enable-unified-cache-external-linker": memory.enable_unified_cache_external_linker,
        "--disaggregation-decode-enable-offload-kvcache": disaggregation.disaggregation_decode_enable_offload_kvcache,
    }
    for option, wanted in asked.items():
        if wanted:
            _refuse(option, "remove that option")
    if disaggregation.disaggregation_decode_retraction_backup == "host_pool":
        _refuse(
            "retraction into a host pool",
            "set --disaggregation-decode-retraction-backup cpu_tensor",
        )


def _refuse_policy(params: Any) -> None:
    policy, config = params.eviction_policy.lower(), params.eviction_policy_config
    if policy not in NAMES:
        _refuse(f"--radix-eviction-policy {policy}", f"choose one of {', '.join(NAMES)}")
    known = {"protected_threshold"} if policy == "slru" else set()
    if unknown := sorted(set(config or ()) - known):
        _refuse(f"--radix-eviction-policy-config with {', '.join(unknown)} for {policy}", "remove it")
