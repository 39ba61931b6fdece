"""flatradix as the prefix cache of vLLM 0.33: a scheduler that differs from vLLM's own in its KV cache manager alone.

  PYTHONPATH=. vllm serve MODEL --no-async-scheduling --scheduler-cls examples.vllm_manager.RadixScheduler

vLLM finds a cached prefix by a chain of hashes, one for each block. Here a RadixTree compares the tokens themselves.
The tree holds the blocks that are cached, and the manager a list of those that are free. vLLM's workers append to their
block tables and never replace a block, so a request keeps the blocks that it got: where another request has cached the
same tokens first, the later request's own blocks stay out of the tree and are free again when this request ends. Until
then, its lock keeps the other blocks too, where vLLM could reuse one of both. (A `PrefixCache` would replace them.)

As in vLLM, blocks count as cached as soon as their computation is scheduled; cached blocks that nobody uses go in the
order in which they were last freed, the end of a prefix first; LoRA adapters and cache salts are kept apart.

Refused: hybrid models, sliding windows, drafts from hidden states (EAGLE, MTP), KV connectors, context parallelism.
Not covered: asynchronous scheduling, KV events, metrics of single blocks. Requests with images or prompt embeddings
run, but share nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import RequestStatus

from flatradix import RadixTree
from flatradix.results import Places


@dataclass
class Hit(KVCacheBlocks):
    """The blocks of a cached prefix, and where it ends in the tree."""

    place: Places


@dataclass
class Held:
    """What a running request holds: its blocks in order, and the place, locked, up to which its tokens are in the tree.

    duplicates: the blocks before `place` that are not in the tree, because it had others for the same tokens.
    """

    namespace: str | None
    place: Places
    blocks: list[int]
    duplicates: list[int] = field(default_factory=list)


def namespace_of(request: Any) -> str | None:
    """Return what must be equal, besides the tokens, for two requests to share KV."""
    lora = request.lora_request
    if lora is None and not request.cache_salt:
        return None
    return repr((lora and (lora.lora_name, lora.lora_path), request.cache_salt))


class RadixManager(KVCacheManager):
    def __init__(self, kv_cache_config: Any, max_model_len: int, scheduler_block_size: int, **options: Any) -> None:
        super().__init__(kv_cache_config, max_model_len, scheduler_block_size, **options)
        kinds = [type(manager) for manager in self.coordinator.single_type_managers]
        spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        if kinds != [FullAttentionManager] or self.use_eagle or scheduler_block_size != spec.block_size:
            raise ValueError("RadixManager serves models with full attention in all layers: leave out --scheduler-cls")
        self.block_size = scheduler_block_size
        self._total = kv_cache_config.num_blocks - 1  # vLLM keeps block 0 to itself
        self.tree = RadixTree(self._total * self.block_size, self.block_size, "cpu", evict_by="page")
        self.held: dict[str, Held] = {}  # by request id
        self._free = list(range(self._total, 0, -1))

    # Admission

    def get_computed_blocks(self, request: Any, max_cache_hit_length: int | None = None) -> tuple[Any, int, int]:
        if not self.prefix_cache_lookup_enabled(request) or not self._can_share(request):
            return self.empty_kv_cache_blocks, 0, 0
        limit = request.num_tokens - 1 if max_cache_hit_length is None else max_cache_hit_length
        place = self.tree.match(request.all_token_ids[:limit], namespace_of(request), touch=False)
        return Hit(self._groups(self._cached_blocks(place)), place), place.length, 0

    def allocate_slots(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        has_scheduled_reqs: bool = True,
        **unused: Any,
    ) -> KVCacheBlocks | None:
        """Give a request blocks for its next tokens, and cache what they fill; None if too few are free or unused.

        unused: what vLLM passes for KV connectors and encoders.
        """
        starts = request.request_id not in self.held
        held = self._begin(request, new_computed_blocks) if starts else self.held[request.request_id]
        end = min(request.num_computed_tokens + num_new_computed_tokens + num_new_tokens, self.max_model_len)
        with_drafts = min(end + num_lookahead_tokens, self.max_model_len)
        needed = max(self._blocks_for(with_drafts) - len(held.blocks), 0)
        whole = self._blocks_for(min(request.num_tokens, self.max_model_len)) - len(held.blocks)
        waits = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        spare = self.watermark_blocks if has_scheduled_reqs and waits else 0
        if max(needed, whole if full_sequence_must_fit else 0) + spare > self.available_blocks:
            if starts:
                self.tree.unlock(held.place)
            return None
        self.held[request.request_id] = held
        new = self._take(needed)
        held.blocks += new
        self.cache_blocks(request, min(end, request.num_tokens))
        return KVCacheBlocks(self._groups(new))

    def _begin(self, request: Any, hit: KVCacheBlocks | None) -> Held:
        namespace = namespace_of(request)
        place = hit.place if isinstance(hit, Hit) else self.tree.match([], namespace, touch=False)
        self.tree.lock(place)
        return Held(namespace, place, self._cached_blocks(place))

    def _take(self, count: int) -> list[int]:
        short = count - len(self._free)
        if short > 0:
            evicted = self.tree.evict(short * self.block_size)
            self._free += (evicted.slots[:: self.block_size] // self.block_size).tolist()
        return [self._free.pop() for _ in range(count)]

    # Computed, ended

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        held = self.held[request.request_id]
        begin, end = held.place.length, num_computed_tokens // self.block_size * self.block_size
        if not self.enable_caching or end <= begin or not self._can_share(request):
            return
        blocks = held.blocks[begin // self.block_size : end // self.block_size]
        slots = np.add.outer(np.array(blocks, np.int32) * self.block_size, np.arange(self.block_size, dtype=np.int32))
        found = self.tree.insert(request.all_token_ids[begin:end], slots.ravel(), held.namespace, start=held.place)
        self.tree.lock(found)
        self.tree.unlock(held.place)
        held.place = found
        held.duplicates += blocks[: (found.prefix_length - begin) // self.block_size]

    def free(self, request: Any) -> None:
        held = self.held.pop(request.request_id, None)
        if held is None:
            return
        self.tree.match([], held.namespace, start=held.place)  # the whole path is now the most recently used
        self.tree.unlock(held.place)
        self._free += held.duplicates + held.blocks[held.place.length // self.block_size :]

    def reset_prefix_cache(self) -> bool:
        if self.held:
            return False
        self.tree.reset()
        self._free = list(range(self._total, 0, -1))
        if self.prefix_cache_stats is not None:
            self.prefix_cache_stats.reset = True
        return True

    # Numbers

    @property
    def available_blocks(self) -> int:
        """Blocks that are free, or cached and unused."""
        return len(self._free) + self.tree.evictable_tokens // self.block_size

    @property
    def usage(self) -> float:
        return 1 - self.available_blocks / self._total

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        return KVCacheBlocks(self._groups(self.held[request_id].blocks if request_id in self.held else []))

    def estimate_cached_tokens(self, request: Any) -> int:
        return self.held[request.request_id].place.length if request.request_id in self.held else 0

    def _can_share(self, request: Any) -> bool:
        return not request.mm_features and request.prompt_embeds is None

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _cached_blocks(self, place: Places) -> list[int]:
        return (self.tree.path_slots(place)[:: self.block_size] // self.block_size).tolist()

    def _groups(self, blocks: list[int]) -> tuple[list[Any], ...]:
        """Return blocks as vLLM wants them: its objects, in a list for each group of layers."""
        return ([self.block_pool.blocks[block] for block in blocks],)


class RadixScheduler(Scheduler):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if self.connector is not None or self.aux_output_connector is not None or self.use_eagle:
            raise ValueError("RadixScheduler serves no KV connectors, EAGLE or MTP: leave out --scheduler-cls")
        self.kv_cache_manager = RadixManager(
            self.kv_cache_config,
            self.max_model_len,
            self.block_size,
            hash_block_size=self.hash_block_size,
            enable_caching=self.cache_config.enable_prefix_caching,
            log_stats=self.log_stats,
            watermark=self.scheduler_config.watermark,
        )
