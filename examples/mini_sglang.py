"""flatradix as the prefix cache of mini-sglang (https://github.com/sgl-project/mini-sglang, commit 20fcd7f).

  python3 -m examples.mini_sglang --model Qwen/Qwen3-0.6B --cache-type flatradix

This starts mini-sglang's own server, with all of its options. Any other program imports this module where its
schedulers run: the import registers the cache. mini-sglang starts schedulers with "spawn", which imports the main
module again.

mini-sglang allocates the KV slots itself, so a RadixTree replaces its tree. The tree lies on the CPU; the slots that it
holds lie on the device of the KV cache. Two things differ from mini-sglang's own tree: a node that a request matches in
part counts as used, and `reset` works. `--cache-type flatradix-by-page` evicts no more pages than are needed, where
mini-sglang frees whole nodes.

Each rank of a tensor-parallel engine has a tree of its own, as with mini-sglang's; equal calls give equal trees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from minisgl.core import get_global_ctx
from minisgl.kvcache import SUPPORTED_CACHE_MANAGER, BaseCacheHandle, BasePrefixCache, MatchResult, SizeInfo
from minisgl.kvcache.base import InsertResult

from flatradix import RadixTree
from flatradix.results import Places


@dataclass(frozen=True)
class Handle(BaseCacheHandle):
    tree: RadixTree
    place: Places

    def get_matched_indices(self) -> torch.Tensor:
        return self.tree.path_slots(self.place)


class FlatradixCache(BasePrefixCache):
    """evict_by: as for RadixTree. mini-sglang's own tree evicts by node."""

    def __init__(self, device: torch.device, evict_by: str = "node") -> None:
        # mini-sglang's factory passes nothing but the device. The tree grows to what mini-sglang's slots need.
        page_size = get_global_ctx().page_size
        self.tree = RadixTree(None, page_size, "cpu", slot_device=device, check_slots=False, evict_by=evict_by)

    def match_prefix(self, input_ids: torch.Tensor) -> MatchResult:
        found = self.tree.match(input_ids, split=True)
        return MatchResult(Handle(found.length, self.tree, found))

    def lock_handle(self, handle: BaseCacheHandle, unlock: bool = False) -> None:
        (self.tree.unlock if unlock else self.tree.lock)(handle.place)

    def insert_prefix(self, input_ids: torch.Tensor, indices: torch.Tensor) -> InsertResult:
        found = self.tree.insert(input_ids, indices)
        return InsertResult(found.prefix_length, Handle(found.length, self.tree, found))

    def evict(self, size: int) -> torch.Tensor:
        if size > self.tree.evictable_tokens:
            raise RuntimeError(f"cannot evict {size} tokens: {self.tree.evictable_tokens} are evictable")
        return self.tree.evict(size).slots

    def reset(self) -> None:
        self.tree.reset()

    @property
    def size_info(self) -> SizeInfo:
        return SizeInfo(self.tree.evictable_tokens, self.tree.protected_tokens)

    def check_integrity(self) -> None:
        self.tree.check()


SUPPORTED_CACHE_MANAGER.register("flatradix")(FlatradixCache)
SUPPORTED_CACHE_MANAGER.register("flatradix-by-page")(partial(FlatradixCache, evict_by="page"))

if __name__ == "__main__":
    from minisgl.server import launch_server

    launch_server()
