"""The operations of a tree on the CPU, compiled by numba at their first use."""

from flatradix.kernels.cpu.compact import compact, plan_compaction
from flatradix.kernels.cpu.digest import digest
from flatradix.kernels.cpu.evict import evict
from flatradix.kernels.cpu.insert import insert, insert_one, take_back_insert
from flatradix.kernels.cpu.jit import address_table
from flatradix.kernels.cpu.lock import lock, lock_one, split, unlock, unlock_one
from flatradix.kernels.cpu.match import match, match_one
from flatradix.kernels.cpu.reset import rebuild, reset
from flatradix.kernels.cpu.slots import (
    count_paths,
    path_ranges,
    path_ranges_one,
    path_slots,
    path_slots_one,
    write_slots,
)

__all__ = [
    "address_table",
    "compact",
    "count_paths",
    "digest",
    "evict",
    "insert",
    "insert_one",
    "lock",
    "lock_one",
    "match",
    "match_one",
    "path_ranges",
    "path_ranges_one",
    "path_slots",
    "path_slots_one",
    "plan_compaction",
    "rebuild",
    "reset",
    "split",
    "take_back_insert",
    "unlock",
    "unlock_one",
    "write_slots",
]
