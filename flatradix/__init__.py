"""flatradix: the radix tree behind an LLM server's KV prefix cache, as flat tensors, a whole batch at a time."""

from flatradix.errors import CapacityError, DeviceUnavailableError, StaleHandleError
from flatradix.policy import Nodes
from flatradix.prefix_cache import PrefixCache
from flatradix.ragged import Ragged
from flatradix.request import Request
from flatradix.results import EvictResult, InsertResult, MatchResult
from flatradix.tree import RadixTree
from flatradix.version import VERSION as __version__
from flatradix.warm_up import warm_up

__all__ = [
    "CapacityError",
    "DeviceUnavailableError",
    "EvictResult",
    "InsertResult",
    "MatchResult",
    "Nodes",
    "PrefixCache",
    "RadixTree",
    "Ragged",
    "Request",
    "StaleHandleError",
    "__version__",
    "warm_up",
]
