"""The operations on a GPU, compiled by Triton at their first use."""

from flatradix.kernels.gpu.compact import compact, rebuild
from flatradix.kernels.gpu.digest import digest
from flatradix.kernels.gpu.evict import select
from flatradix.kernels.gpu.evict_keys import effective_keys
from flatradix.kernels.gpu.evict_order import UNORDERED, order_victims
from flatradix.kernels.gpu.finish import tell
from flatradix.kernels.gpu.free import free
from flatradix.kernels.gpu.insert import insert
from flatradix.kernels.gpu.launch import bind, bind_no_tree
from flatradix.kernels.gpu.lock import lock, unlock
from flatradix.kernels.gpu.match import match, match_one
from flatradix.kernels.gpu.ranges import copy_ranges
from flatradix.kernels.gpu.reset import reset
from flatradix.kernels.gpu.slots import gather_slots, write_slots

__all__ = [
    "UNORDERED",
    "bind",
    "bind_no_tree",
    "compact",
    "copy_ranges",
    "digest",
    "effective_keys",
    "free",
    "gather_slots",
    "insert",
    "lock",
    "match",
    "match_one",
    "order_victims",
    "rebuild",
    "reset",
    "select",
    "tell",
    "unlock",
    "write_slots",
]
