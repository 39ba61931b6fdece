"""FlatRadixCache: SGLang's prefix cache over a RadixTree. It implements what SGLang's scheduler calls."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    DecLockRefParams,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    InsertParams,
    InsertResult,
    MatchPrefixParams,
    MatchResult,
    TreeLock,
)

from flatradix.errors import QueryError
from flatradix.inspect.draw import draw
from flatradix.integrations.sglang.checkpoint import LOCK, SPLIT, UNLOCK, Checkpoint, free_slots
from flatradix.integrations.sglang.events import KvEvents
from flatradix.integrations.sglang.index import make_tree, up_to
from flatradix.integrations.sglang.order import depth_first_by_weight
from flatradix.results import Places

_RECEIPT = DecLockRefParams()  # an unlock needs only the place
_GREATEST = torch.iinfo(torch.int64).max
_NO_TOKENS = array("q")


class FlatRadixCache(BasePrefixCache):
    """SGLang's prefix cache for models with one KV slot a token, with flatradix as its tree.

    SGLang's nodes are places of the tree (`flatradix.results.Places`). A request holds the place that it locked, and
    each checkpoint continues from that place. So a chunk costs its own tokens and one step for each node above it. With
    the index on the CPU, reading a size waits for nothing; with the index on a GPU, it waits for the tree's own
    kernels. Not thread-safe: the scheduler calls it from one thread.

    before_eviction: called at the start of each eviction, if it is set (see waiting.py).
    """

    def __init__(self, params: Any, device: str | None = None) -> None:
        """params: SGLang's CacheInitParams. device: of the index; None takes FLATRADIX_DEVICE, or else the CPU.

        Raises ValueError for a policy that flatradix does not know, DeviceUnavailableError.
        """
        self.disable = False
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size = params.page_size
        self.is_eagle = params.is_eagle
        self.eviction_policy = params.eviction_policy.lower()
        self.sliding_window_size = None
        self.device = torch.device(params.token_to_kv_pool_allocator.device)
        self._tree = make_tree(params, device)
        self.tree = self._tree.tree
        self._changes = self.tree.changes
        self.root_node = self._tree.match(_NO_TOKENS, None, None)
        _ = self.root_node.length  # read now: later calls overwrite the answer in the mailbox of a GPU
        self.before_eviction: Callable[[], None] | None = None
        self.kv_events = KvEvents(params)
        self.kv_events.cleared()
        if params.enable_metrics:
            self.init_metrics_collector()

    def reset(self) -> None:
        """Drop everything, including locked nodes. Earlier locks must not be unlocked. SGLang calls it when idle."""
        with self._tree.on_own_stream():
            self.tree.reset()
        self.kv_events.cleared()

    # Look-ups

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Find the longest cached prefix of a key, and make it the most recently used. O(length of the match)."""
        key = params.key
        place = self._tree.match(key.token_ids, key.limit, namespace_of(key))
        return MatchResult(place.length, place, place, place)

    def touch_prefix(self, key: Any) -> None:
        self._tree.match(key.token_ids, key.limit, namespace_of(key))

    def path_device_indices(self, node: Places) -> torch.Tensor:
        """Return the slots of a place: int64 [length], contiguous, on the KV pool's device."""
        return self._tree.slots(node)

    def dfs_weight_order(self, node_handles: Sequence[Places]) -> list[int]:
        """Return the indices of `node_handles` in depth-first order, heavier subtrees first.

        Of subtrees with equal weight, the subtree with the first request of the queue comes first.
        """
        with self._tree.on_own_stream():
            return depth_first_by_weight(self.tree, node_handles)

    # Locks

    # If interrupted after its change, each of these undoes the change: the caller does not know about it. A call that
    # the tree refuses (QueryError) has changed nothing, although `changes` of an index on a GPU counts it.

    def lock(self, node: Places) -> TreeLock:
        before = self._changes()
        try:
            self._tree.lock(node)
            return TreeLock(node, _RECEIPT)
        except QueryError:
            raise
        except BaseException:
            if self._changes() != before:
                self._tree.unlock(node)
            raise

    def unlock(self, lock: TreeLock | None) -> None:
        if lock is None:
            return
        before = self._changes()
        try:
            self._tree.unlock(lock.node)
        except QueryError:
            raise
        except BaseException:
            if self._changes() != before:
                self._tree.lock(lock.node)
            raise

    def inc_lock_ref(self, node: Places) -> IncLockRefResult:
        changes, before = self._changes(), self.tree.evictable_tokens
        try:
            self._tree.lock(node)
            return IncLockRefResult(delta=self.tree.evictable_tokens - before)
        except QueryError:
            raise
        except BaseException:
            if self._changes() != changes:
                self._tree.unlock(node)
            raise

    def dec_lock_ref(self, node: Places, params: DecLockRefParams | None = None) -> DecLockRefResult:
        changes, before = self._changes(), self.tree.evictable_tokens
        try:
            self._tree.unlock(node)
            return DecLockRefResult(delta=self.tree.evictable_tokens - before)
        except QueryError:
            raise
        except BaseException:
            if self._changes() != changes:
                self._tree.lock(node)
            raise

    # Changes

    def insert(self, params: InsertParams) -> InsertResult:
        """Cache a key with its slots (`value`, one a token or unit). Slots for tokens cached before stay the caller's.

        Records no KV events: SGLang's scheduler caches only by `checkpoint`.
        """
        tokens, slots = up_to(params.key.token_ids, params.key.limit), params.value
        if len(slots) < len(tokens):  # one a unit: none for the last token of bigrams, or for an incomplete page
            slots = torch.cat((slots, slots.new_zeros(len(tokens) - len(slots))))
        result = self._tree.insert(
            tokens,
            slots[: len(tokens)],
            namespace=namespace_of(params.key),
            priority=params.priority or 0,
            inserted_lengths=params.inserted_len,
        )
        return InsertResult(prefix_len=result.prefix_length, last_device_node=result)

    def checkpoint(self, req: Any, *, up_to: int, **_: Any) -> None:
        """Cache the first `up_to` tokens of a request, give it the tree's slots for them, and move its lock there.

        O(tokens after the request's lock + nodes above it). If another request has cached some of these tokens
        meanwhile, their slots are read as well: O(up_to). The slots of the last, incomplete page stay the request's. So
        do all slots from the first foreign token on, such as the placeholder of an image (`before_foreign`).

        If it is interrupted after the tree has the tokens, it first completes the rest: the tree owns their slots.
        """
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
        start = self._held(req, up_to)
        known = 0 if start is None else start.length
        tokens = req.full_untruncated_fill_ids[known:up_to]
        step = Checkpoint(req, row, self._changes)
        before = self._changes()
        try:
            step.place = self._tree.insert(
                tokens,
                row[known : known + len(tokens)],
                namespace=namespace_of(req) if start is None else None,
                priority=req.priority or 0,
                start=start,
                inserted_lengths=req.kv.cache_inserted_len,
            )
            self._finish(step, start)
        except BaseException:
            if self._changes() != before:
                step.place = self.tree.last_result if step.place is None else step.place
                if self._is_done(step.place):
                    self._finish(step, start)
            raise

    @staticmethod
    def _is_done(place: Places) -> bool:
        """Return whether the insert that reaches a place was carried out. An index on a GPU may have refused it."""
        try:
            return place.length >= 0
        except (ValueError, RuntimeError):
            return False

    def _finish(self, step: Checkpoint, start: Places | None) -> None:
        """Complete a checkpoint after its tokens are in the tree. Each step may be started twice."""
        req, kv, place = step.req, step.req.kv, step.place
        cached, length = place.prefix_length, place.length
        if self.kv_events.enabled and not step.told:
            step.told = True
            self.kv_events.stored(req, start, place, cached, step.row)
        kv.cache_inserted_len = max(kv.cache_inserted_len, length)
        self._split_at_prompt(step, length)
        if cached > kv.cache_protected_len:
            self._use_tree_slots(step, kv.cache_protected_len, cached)
        if step.is_due(LOCK):
            self._tree.lock(place)
        if step.is_due(UNLOCK) and step.lock is not None:
            self._tree.unlock(step.lock.node)
        req.lock = TreeLock(place, _RECEIPT)
        req.last_node = place
        kv.cache_protected_len = length

    def _held(self, req: Any, up_to: int) -> Places | None:
        """Return the place under the request's lock if the key continues from it, else None.

        None for the root too: it knows no namespace.
        """
        if req.lock is None:
            return None
        place: Places = req.lock.node
        return place if 0 < place.length <= up_to - self.is_eagle else None

    def _split_at_prompt(self, step: Checkpoint, length: int) -> None:
        """Split the path at the end of the prompt, and give the prompt a priority higher by 1, as SGLang does.

        The output can then be evicted without the prompt, and policy "priority" evicts it first.
        """
        req = step.req
        prompt = len(req.origin_input_ids) - self.is_eagle
        prompt -= prompt % self.page_size
        if 0 < prompt < length and step.is_due(SPLIT):
            self._tree.insert(
                _NO_TOKENS,
                _NO_SLOTS,
                start=self._tree.above(step.place, prompt),
                priority=min((req.priority or 0) + 1, _GREATEST),
                inserted_lengths=prompt,
            )

    def _use_tree_slots(self, step: Checkpoint, first: int, cached: int) -> None:
        """Replace the request's slots by the tree's for tokens that were cached before, and free the former."""
        if step.duplicates is None:
            step.duplicates = step.row[first:cached].clone()
        place = (step.req.kv.req_pool_idx, slice(first, cached))
        self.req_to_token_pool.write(place, self._tree.slots(step.place)[first:cached])
        allocator = self.token_to_kv_pool_allocator
        if step.free_before is None or step.free_before == free_slots(allocator):
            step.free_before = free_slots(allocator)
            allocator.free_segment(step.duplicates, start_pos=first)

    def evict(self, params: EvictParams) -> EvictResult:
        """Free unlocked nodes in the order of the policy until `num_tokens` are freed. The allocator gets the slots."""
        if params.num_tokens <= 0:
            return EvictResult()
        began = time.perf_counter()
        if self.before_eviction is not None:
            self.before_eviction()
        before, free = self._changes(), free_slots(self.token_to_kv_pool_allocator)
        try:
            freed = self._tree.evict(params.num_tokens)
            self._free(freed, began)
            return EvictResult(num_tokens_evicted=freed.num_tokens)
        except BaseException:
            # Interrupted after the eviction: slots that the allocator does not get now would be lost.
            if self._changes() != before and free == free_slots(self.token_to_kv_pool_allocator):
                self._free(self._tree.last_eviction(), began)
            raise

    def _free(self, freed: Any, began: float) -> None:
        if freed.num_tokens:
            self.token_to_kv_pool_allocator.free_segment(freed.slots, start_pos=0)
            if self.kv_events.enabled:
                self.kv_events.removed(freed.slots)
            self.update_eviction_metrics(freed.num_tokens, began)

    # Sizes

    def evictable_size(self) -> int:
        return self.tree.evictable_tokens

    def protected_size(self) -> int:
        return self.tree.protected_tokens

    def full_evictable_size(self) -> int:
        return self.tree.evictable_tokens

    def full_protected_size(self) -> int:
        return self.tree.protected_tokens

    def total_size(self) -> int:
        return self.tree.total_tokens

    def pretty_print(self) -> None:
        with self._tree.on_own_stream():
            print(draw(self.tree.content()))


_NO_SLOTS = torch.empty(0, dtype=torch.int64, device="cpu")


def namespace_of(key: Any) -> str | bytes | None:
    """Return one name for the `extra_key` and `cache_salt` of a key or request. Different pairs, different names."""
    salt = key.cache_salt
    if not salt:
        return key.extra_key
    if key.extra_key is None:
        return b"\0" + salt.encode("utf-8", "surrogatepass")
    extra = key.extra_key.encode("utf-8", "surrogatepass")
    return b"%d:%b%b" % (len(extra), extra, salt.encode("utf-8", "surrogatepass"))
