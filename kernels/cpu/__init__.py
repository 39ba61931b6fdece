"""The operations of a tree on the CPU, compiled by numba at their first use."""

from flatradix.kernels.cpu.compact import compact, plan_compaction
from flatradix.kernels.cpu.digest import digest
from flatradix.kernels.cpu.drop import drop
from flatradix.kernels.cpu.enlarge import enlarge
from flatradix.kernels.cpu.evict import evict
from flatradix.kernels.cpu.insert import insert, insert_one, take_back_insert
from flatradix.kernels.cpu.jit import address_table, running_table, waiting_table
from flatradix.kernels.cpu.journal import note_call, note_call_and_sizes
from flatradix.kernels.cpu.lock import lock, lock_one, split, unlock, unlock_one
from flatradix.kernels.cpu.look import forget_wants, look, recode
from flatradix.kernels.cpu.match import match, match_one, rematch
from flatradix.kernels.cpu.order import depth_first, sort_by, with_oldest
from flatradix.kernels.cpu.paged import (
    admit,
    commit,
    compact_pages,
    count_changes,
    find_prompts,
    give_page_list,
    grow,
    pack_changes,
    pages_of_ranges,
    release,
    take_pages,
    write_pages,
)
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
    end_commit,
    end_requests,
    extent,
    first_bad_of,
    newly_protected,
    plan_begin,
    read_requests,
    start_requests,
    store_tokens,
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
    "admit",
    "alive",
    "begin_commit",
    "clear_todo",
    "commit",
    "compact",
    "compact_pages",
    "count_changes",
    "count_paths",
    "depth_first",
    "digest",
    "drop",
    "end_commit",
    "end_requests",
    "enlarge",
    "enter_keys",
    "enter_rows",
    "entries_by_age",
    "entries_in_order",
    "evict",
    "extent",
    "find_entries",
    "find_prompts",
    "first_bad_of",
    "first_bad_token",
    "forget_wants",
    "give_page_list",
    "grow",
    "insert",
    "insert_one",
    "lock",
    "lock_one",
    "look",
    "match",
    "match_one",
    "newly_protected",
    "note_call",
    "note_call_and_sizes",
    "order_by_longest",
    "pack_changes",
    "pages_of_ranges",
    "path_ranges",
    "path_ranges_one",
    "path_slots",
    "path_slots_one",
    "plan",
    "plan_begin",
    "plan_compaction",
    "read_requests",
    "rebuild",
    "recode",
    "release",
    "rematch",
    "remove_prompt",
    "remove_prompts",
    "reset",
    "running_table",
    "set_order",
    "sort_by",
    "split",
    "start_requests",
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
