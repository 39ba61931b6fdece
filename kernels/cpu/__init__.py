"""The operations of a tree on the CPU, compiled by numba at their first use."""

from flatradix.kernels.cpu.compact import compact, plan_compaction
from flatradix.kernels.cpu.digest import digest
from flatradix.kernels.cpu.enlarge import enlarge
from flatradix.kernels.cpu.evict import evict
from flatradix.kernels.cpu.insert import insert, insert_one, take_back_insert
from flatradix.kernels.cpu.jit import address_table, waiting_table
from flatradix.kernels.cpu.lock import lock, lock_one, split, unlock, unlock_one
from flatradix.kernels.cpu.look import forget_wants, look, recode
from flatradix.kernels.cpu.match import match, match_one, rematch
from flatradix.kernels.cpu.order import depth_first, sort_by, with_oldest
from flatradix.kernels.cpu.plan import plan
from flatradix.kernels.cpu.prompts import (
    BAD_TOKEN,
    add_prompt,
    add_prompts,
    enter_rows,
    first_bad_token,
    remove_prompt,
    remove_prompts,
    tidy,
)
from flatradix.kernels.cpu.requests import (
    begin_commit,
    check_requests,
    first_bad_of,
    give_pages,
    give_slots,
    grow,
    newly_protected,
    replace_pages,
    slots_of_pages,
    store_tokens,
    take_pages,
    write_pages,
)
from flatradix.kernels.cpu.reset import rebuild, reset
from flatradix.kernels.cpu.slots import (
    count_paths,
    path_ranges,
    path_ranges_one,
    path_slots,
    path_slots_one,
    write_slots,
)
from flatradix.kernels.cpu.waiting import (
    clear_todo,
    enter_keys,
    entries_by_age,
    entries_in_order,
    find_entries,
    order_by_longest,
    set_order,
)
from flatradix.kernels.cpu.wants import alive, unwant, want

__all__ = [
    "BAD_TOKEN",
    "add_prompt",
    "add_prompts",
    "address_table",
    "alive",
    "begin_commit",
    "check_requests",
    "clear_todo",
    "compact",
    "count_paths",
    "depth_first",
    "digest",
    "enlarge",
    "enter_keys",
    "enter_rows",
    "entries_by_age",
    "entries_in_order",
    "evict",
    "find_entries",
    "first_bad_of",
    "first_bad_token",
    "forget_wants",
    "give_pages",
    "give_slots",
    "grow",
    "insert",
    "insert_one",
    "lock",
    "lock_one",
    "look",
    "match",
    "match_one",
    "newly_protected",
    "order_by_longest",
    "path_ranges",
    "path_ranges_one",
    "path_slots",
    "path_slots_one",
    "plan",
    "plan_compaction",
    "rebuild",
    "recode",
    "rematch",
    "remove_prompt",
    "remove_prompts",
    "replace_pages",
    "reset",
    "set_order",
    "slots_of_pages",
    "sort_by",
    "split",
    "store_tokens",
    "take_back_insert",
    "take_pages",
    "tidy",
    "unlock",
    "unlock_one",
    "unwant",
    "waiting_table",
    "want",
    "with_oldest",
    "write_pages",
    "write_slots",
]
