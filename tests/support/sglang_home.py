"""A FlatRadixCache with SGLang's pools, and requests that a test drives by single calls."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

from tests.support.sglang_engine import Plan, load_or_skip, make_allocator, make_params

SGLANG = load_or_skip()


class Home:
    """A cache, its pools, and requests with rows of their own."""

    def __init__(self, plan: Plan, device: str = "cpu", **params: Any) -> None:
        from flatradix.integrations.sglang.cache import FlatRadixCache

        self.pool = SGLANG.pools.ReqToTokenPool(size=8, max_context_len=200, device="cpu", enable_memory_saver=False)
        self.allocator = make_allocator(SGLANG, plan)
        self.cache = FlatRadixCache(make_params(SGLANG, plan, self.pool, self.allocator, **params), device=device)
        self.plan = plan
        self._rows = 0

    def key(self, tokens: Any, **options: Any) -> Any:
        return SGLANG.radix.RadixKey(array("q", tokens), **options)

    def match(self, tokens: Any, **options: Any) -> Any:
        return self.cache.match_prefix(SGLANG.base.MatchPrefixParams(key=self.key(tokens, **options)))

    def request(self, prompt: Any, output: Any = (), **fields: Any) -> Any:
        """Return an admitted request: matched, locked, with slots for all its tokens in its row."""
        found = self.match(prompt, extra_key=fields.get("extra_key"), cache_salt=fields.get("cache_salt"))
        self._rows += 1
        fill = array("q", [*prompt, *output])
        req = SimpleNamespace(
            rid=f"r{self._rows}", origin_input_ids=array("q", prompt), full_untruncated_fill_ids=fill, priority=None,
            extra_key=None, cache_salt=None, last_node=found.last_device_node, prefix_len=found.device_prefix_len,
            lock=self.cache.lock(found.last_device_node), kv=SGLANG.requests.ReqKvInfo(req_pool_idx=self._rows),
        )  # fmt: skip
        vars(req).update(fields)
        row, known = self.pool.req_to_token[self._rows], req.prefix_len
        row[:known] = self.cache.path_device_indices(req.last_node)
        page = self.plan.page_size
        own = self.allocator.alloc(-(-(len(fill) - known) // page) * page)
        row[known : known + len(own)] = own
        req.kv.cache_protected_len, req.kv.kv_allocated_len = known, known + len(own)
        return req

    def store(self, tokens: Any, **fields: Any) -> list[int]:
        """Cache tokens as a finished request does; return their slots."""
        req = self.request(tokens, **fields)
        self.cache.checkpoint(req, up_to=len(tokens))
        self.cache.unlock(req.lock)
        return self.pool.req_to_token[req.kv.req_pool_idx, : req.kv.cache_protected_len].tolist()

    def sizes(self) -> tuple[int, int]:
        return self.cache.evictable_size(), self.cache.protected_size()
