"""The operations on a machine without a GPU, compiled by numba at their first use."""

from flatradix.kernels.cpu.compact import compact, plan_compaction
from flatradix.kernels.cpu.digest import digest
from flatradix.kernels.cpu.evict import evict
from flatradix.kernels.cpu.insert import insert, insert_one
from flatradix.kernels.cpu.jit import address_table
from flatradix.kernels.cpu.lock import lock, lock_one, unlock, unlock_one
from flatradix.kernels.cpu.match import match, match_one
from flatradix.kernels.cpu.reset import rebuild, reset
from flatradix.kernels.cpu.slots import (
    count_path_nodes,
    gather_slots,
    path_ranges,
    path_ranges_one,
    victim_ranges,
    write_slots,
)

__all__ = [
    "address_table",
    "compact",
    "count_path_nodes",
    "digest",
    "evict",
    "gather_slots",
    "insert",
    "insert_one",
    "lock",
    "lock_one",
    "match",
    "match_one",
    "path_ranges",
    "path_ranges_one",
    "plan_compaction",
    "rebuild",
    "reset",
    "unlock",
    "unlock_one",
    "victim_ranges",
    "write_slots",
]
