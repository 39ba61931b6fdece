"""flatradix as the prefix cache of transformers' continuous batching (transformers 5.23).

  from examples.transformers_cache import flatradix_cache

  with flatradix_cache():  # for the caches that are made in here
      outputs = model.generate_batch(prompts, continuous_batching_config=config, persistent_manager=True)

`python examples/continuous_batching.py` compares both caches. With `persistent_manager=True` the cache is there for the
next call too.

transformers finds a cached prefix by a chain of hashes of 64 bits, one for each block. Here a RadixTree compares the
tokens themselves. When fewer than 15 % of the blocks are free (`safety_margin`), transformers evicts every cached block
that no request uses. Here such a block counts as free, and is evicted, the least recently used first, when a request
needs its memory. So a tight pool keeps more, also the blocks of a request that lost its place and has to begin again.

Two classes change: the allocator of layers with full attention, and the pool of free blocks. Scheduler, batches and
attention remain transformers' own. Models that also have sliding windows share no prefixes, as with transformers'
own cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from transformers.generation.continuous_batching import cache as paged
from transformers.generation.continuous_batching.cache_allocators import (
    FULL_ATTENTION,
    CachePool,
    FullAttentionCacheAllocator,
)
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import BlockLedger

from flatradix import RadixTree
from flatradix.results import Places


class RadixLedger(BlockLedger):
    """The cached blocks: a tree of their tokens. Locks in the tree take the place of reference counts."""

    def __init__(self, num_blocks: int, page_size: int) -> None:
        super().__init__()
        self.page_size = page_size
        self.tree = RadixTree(num_blocks * page_size, page_size, "cpu", evict_by="page")
        self.root = self.tree.match([], touch=False)

    @property
    def unused(self) -> int:
        """Cached blocks that no request uses."""
        return self.tree.evictable_tokens // self.page_size

    def blocks(self, slots: Any) -> list[int]:
        return (slots[:: self.page_size] // self.page_size).tolist()

    def insert(self, tokens: list[int], blocks: list[int], start: Places) -> Any:
        slots = np.add.outer(np.array(blocks, np.int32) * self.page_size, np.arange(self.page_size, dtype=np.int32))
        return self.tree.insert(tokens, slots.ravel(), start=start)

    def evict(self, count: int) -> list[int]:
        return self.blocks(self.tree.evict(count * self.page_size).slots)

    def acquire(self, block_id: int) -> None:
        """Do nothing: `RadixAllocator.fork_blocks` locks the place of a fork instead."""

    def evict_cached_blocks(self) -> list[int]:
        """Evict nothing: unused blocks count as free already."""
        return []

    def reset(self) -> None:
        self.tree.reset()


class RadixPool(CachePool):
    """Free blocks, and behind them the cached blocks that no request uses."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        self.ledgers: dict[int, RadixLedger] = {}  # by the index of their allocator
        super().__init__(*arguments, **keywords)

    def count_free_blocks(self, index: int) -> int:
        return super().count_free_blocks(index) + (self.ledgers[index].unused if index in self.ledgers else 0)

    def get_free_blocks(self, index: int, num_blocks: int) -> list[int]:
        while super().count_free_blocks(index) < num_blocks and self.free_sectors:
            self.allocate_sector(index)
        short = num_blocks - super().count_free_blocks(index)
        if short > 0 and index in self.ledgers:
            self.free_blocks(index, self.ledgers[index].evict(short))
        return super().get_free_blocks(index, num_blocks)


class RadixAllocator(FullAttentionCacheAllocator):
    """places: by request id, the locked place up to which the blocks of a request are in the tree."""

    def register_cache_tensor(self, bytes_per_sector: int, non_trash_bytes: int, *rest: Any) -> None:
        super().register_cache_tensor(bytes_per_sector, non_trash_bytes, *rest)
        self.ledger = RadixLedger(self.num_blocks, self.tokens_per_page)
        self.places: dict[str, Places] = {}
        self.pool.ledgers[self.index] = self.ledger

    def match_prefix_blocks(self, prompt_ids: list[int]) -> list[int]:
        self.found = self.ledger.tree.match(prompt_ids[:-1])  # the last token is computed: its logits are needed
        return self.ledger.blocks(self.ledger.tree.path_slots(self.found))

    def acquire_prefix_blocks(self, request_id: str, prefix_len: int, block_ids: list[int]) -> None:
        """Give a request the blocks of the last match. No allocator else shares prefixes, so none found less."""
        self.ledger.tree.lock(self.found)
        self.places[request_id], self.block_table[request_id] = self.found, block_ids

    def mark_complete_blocks(self, request_id: str, token_ids: list[int], new_new_blocks: int) -> None:
        """Cache the blocks that a forward pass has filled. Where others are cached for these tokens, take those."""
        table, place, page = self.block_table[request_id], self._place(request_id), self.tokens_per_page
        begin = place.length // page
        end = min(begin + new_new_blocks, len(token_ids) // page, len(table))
        found = self.ledger.insert(token_ids[begin * page : end * page], table[begin:end], place)
        self.ledger.tree.lock(found)
        self.ledger.tree.unlock(place)
        self.places[request_id] = found
        cached = found.prefix_length // page
        if cached > begin:
            self.pool.free_blocks(self.index, table[begin:cached])
            table[begin:cached] = self.ledger.blocks(self.ledger.tree.path_slots(found))[begin:cached]

    def free_blocks(self, request_id: str, no_cache: bool = False) -> None:
        """End a request. Its cached blocks stay, also with `no_cache`: they count as free all the same."""
        blocks, place = self.block_table.pop(request_id, []), self._place(request_id)
        self.places.pop(request_id, None)
        self.ledger.tree.unlock(place)
        self.pool.free_blocks(self.index, blocks[place.length // self.tokens_per_page :])

    def count_shareable_blocks(self, source_request_id: str, past_length: int) -> int:
        return self._place(source_request_id).length // self.tokens_per_page

    def fork_blocks(self, source_request_id: str, dest_request_id: str, past_length: int) -> tuple[Any, Any]:
        self.places[dest_request_id] = self._place(source_request_id)
        self.ledger.tree.lock(self.places[dest_request_id])
        return super().fork_blocks(source_request_id, dest_request_id, past_length)

    def _place(self, request_id: str) -> Places:
        return self.places.get(request_id, self.ledger.root)


@contextmanager
def flatradix_cache() -> Iterator[None]:
    """Make the paged caches that are made in this context find, share and evict blocks by a RadixTree."""
    own = paged.ATTN_TYPE_TO_ALLOCATOR[FULL_ATTENTION], paged.CachePool
    paged.ATTN_TYPE_TO_ALLOCATOR[FULL_ATTENTION], paged.CachePool = RadixAllocator, RadixPool
    try:
        yield
    finally:
        paged.ATTN_TYPE_TO_ALLOCATOR[FULL_ATTENTION], paged.CachePool = own
