"""flatradix: the index of an LLM server's KV prefix cache. A radix tree in flat tensors; each call takes a batch."""

import importlib
from typing import TYPE_CHECKING, Any

from flatradix.errors import CapacityError, DeviceUnavailableError, QueryError, RanksDifferError, StaleHandleError
from flatradix.inputs.policy import Nodes, slru
from flatradix.inputs.ragged import Ragged
from flatradix.results import EvictIntoResult, EvictResult, InsertResult, MatchResult
from flatradix.tree import RadixTree
from flatradix.version import VERSION as __version__
from flatradix.warm_up import warm_up

if TYPE_CHECKING:
    from flatradix.cache.prefix_cache import PrefixCache
    from flatradix.cache.requests import Request, Requests
    from flatradix.events.block_events import BlockEvents
    from flatradix.events.blocks import Block
    from flatradix.queue.orders import Columns
    from flatradix.queue.waiting_queue import Plan, WaitingQueue
    from flatradix.ranks.agree import assert_ranks_agree, watch_ranks

__all__ = [
    "Block",
    "BlockEvents",
    "CapacityError",
    "Columns",
    "DeviceUnavailableError",
    "EvictIntoResult",
    "EvictResult",
    "InsertResult",
    "MatchResult",
    "Nodes",
    "Plan",
    "PrefixCache",
    "QueryError",
    "RadixTree",
    "Ragged",
    "RanksDifferError",
    "Request",
    "Requests",
    "StaleHandleError",
    "WaitingQueue",
    "__version__",
    "assert_ranks_agree",
    "slru",
    "warm_up",
    "watch_ranks",
]


_LATE = {
    "Block": "events.blocks",
    "BlockEvents": "events.block_events",
    "Columns": "queue.orders",
    "Plan": "queue.waiting_queue",
    "PrefixCache": "cache.prefix_cache",
    "Request": "cache.requests",
    "Requests": "cache.requests",
    "WaitingQueue": "queue.waiting_queue",
    "assert_ranks_agree": "ranks.agree",
    "watch_ranks": "ranks.agree",
}


def __getattr__(name: str) -> Any:
    """Import what not every user of a tree needs when it is asked for: it imports a compiler, or torch.distributed."""
    if name in _LATE:
        return getattr(importlib.import_module(f"flatradix.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
