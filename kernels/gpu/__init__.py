"""The operations of a tree on a GPU, as Triton kernels. Triton compiles each at its first use."""

from flatradix.kernels.gpu.compact import compact, rebuild
from flatradix.kernels.gpu.digest import digest
from flatradix.kernels.gpu.evict import evict, select
from flatradix.kernels.gpu.evict_keys import classify, effective_keys
from flatradix.kernels.gpu.evict_order import order_victims, set_victims
from flatradix.kernels.gpu.finish import tell
from flatradix.kernels.gpu.follow import follow
from flatradix.kernels.gpu.free import free, free_selected
from flatradix.kernels.gpu.insert import insert
from flatradix.kernels.gpu.insert_one import insert_one, is_one
from flatradix.kernels.gpu.launch import Arrays, arrays_of, no_arrays
from flatradix.kernels.gpu.lock import finish_lock, finish_unlock, lock, unlock
from flatradix.kernels.gpu.lock_one import lock_one, unlock_one
from flatradix.kernels.gpu.match import match, match_one
from flatradix.kernels.gpu.ranges import copy_ranges
from flatradix.kernels.gpu.rematch import rematch
from flatradix.kernels.gpu.reset import reset
from flatradix.kernels.gpu.slots import gather, write_slots
from flatradix.kernels.gpu.wants import alive, end_wants, end_wants_selected, unwant, want, want_again

__all__ = [
    "Arrays",
    "alive",
    "arrays_of",
    "classify",
    "compact",
    "copy_ranges",
    "digest",
    "effective_keys",
    "end_wants",
    "end_wants_selected",
    "evict",
    "finish_lock",
    "finish_unlock",
    "follow",
    "free",
    "free_selected",
    "gather",
    "insert",
    "insert_one",
    "is_one",
    "lock",
    "lock_one",
    "match",
    "match_one",
    "no_arrays",
    "order_victims",
    "rebuild",
    "rematch",
    "reset",
    "select",
    "set_victims",
    "tell",
    "unlock",
    "unlock_one",
    "unwant",
    "want",
    "want_again",
    "write_slots",
]
