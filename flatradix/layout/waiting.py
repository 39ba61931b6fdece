"""Waiting: the columns of a waiting queue, as one tuple of flat arrays in host memory.

A waiting prompt is an entry, numbered from 1 on; 0 stands for none. An entry that leaves is used again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NONE = 0

# Indices into `Waiting.counts`.
LIVE = 0  # waiting prompts
ENTRIES = 1  # entries that were ever in use, with entry 0
FREE = 2  # length of `free`
AGED = 3  # length of `by_age`
NEXT_ID = 4
READ = 5  # events of the tree that were read
TODO = 6  # length of `todo`
GONE = 7  # length of `gone_start` and `gone_tokens`
TURNS = 8  # length of `turns` and `id_of_turn`
KEEP = 11  # whether the queue wants what its prompts match
GONE_TOKENS = 12  # tokens of prompts that left, and may still be in the pool
LIVE_TOKENS = 13
PASS = 14  # number of the last tidying
BUCKETS = 15  # length of `buckets`, a power of two
SIZE = 16

_i8, _i32, _i64, _f64 = np.int8, np.int32, np.int64, np.float64


class Waiting(NamedTuple):
    """The arrays of one queue. W entries, R rows of the tree, B buckets, S spaces (namespaces with waiting prompts)."""

    id: np.ndarray  # int64 [W]
    start: np.ndarray  # int64 [W]: where the prompt begins in the pool
    tokens: np.ndarray  # int32 [W]: tokens of the prompt
    units: np.ndarray  # int32 [W]: units in its whole pages
    space: np.ndarray  # int32 [W]
    leaf: np.ndarray  # int32 [W]: the row of the prompt tree at which the prompt ends, 0 for the root
    shared: np.ndarray  # int32 [W]: units from the root that an older prompt has too
    row: np.ndarray  # int32 [W]: the row of the tree at which its match ends, 0 for the root
    length: np.ndarray  # int32 [W]: units that are cached
    key: np.ndarray  # int64 [W]: (row, or ~namespace << 32 | tag): the child that would continue its match
    keyed: np.ndarray  # int8 [W]: whether it has such a key
    next_at_row: np.ndarray  # int32 [W]: lists of the prompts at each row
    previous_at_row: np.ndarray  # int32 [W]
    next_with_key: np.ndarray  # int32 [W]: lists of the prompts in each bucket
    previous_with_key: np.ndarray  # int32 [W]
    dirty: np.ndarray  # int8 [W]: whether it is in `todo`
    wants: np.ndarray  # int32 [W]: the row of the tree that it wants, 0 for none
    wants_generation: np.ndarray  # int64 [W]: of that row
    priority: np.ndarray  # int64 [W]
    arrival: np.ndarray  # float64 [W]
    free: np.ndarray  # int32 [W]: a stack
    todo: np.ndarray  # int32 [W]: entries to look at again
    by_age: np.ndarray  # int32 [2 W]: entries from the oldest on; 0 where one has left
    id_by_age: np.ndarray  # int64 [2 W]: their ids, rising, also of those that have left
    turns: np.ndarray  # int32 [2 W]: entries in the queue's order, which decides whose nodes are evicted first
    id_of_turn: np.ndarray  # int64 [2 W]: their ids; a turn whose entry has another id now is that of one who left
    gone_start: np.ndarray  # int64 [W]: pool ranges of prompts that left
    gone_tokens: np.ndarray  # int32 [W]
    at_row: np.ndarray  # int32 [R]: the first prompt at each row
    buckets: np.ndarray  # int32 [B]
    codes: np.ndarray  # int64 [S]: the tree's code of each space
    in_space: np.ndarray  # int32 [S]: waiting prompts of each space
    counts: np.ndarray  # int64 [SIZE]


COLUMNS = {
    "id": _i64, "start": _i64, "tokens": _i32, "units": _i32, "space": _i32, "leaf": _i32, "shared": _i32, "row": _i32,
    "length": _i32, "key": _i64, "keyed": _i8, "next_at_row": _i32, "previous_at_row": _i32, "next_with_key": _i32,
    "previous_with_key": _i32, "dirty": _i8, "wants": _i32, "wants_generation": _i64, "priority": _i64,
    "arrival": _f64, "free": _i32, "todo": _i32, "gone_start": _i64,
    "gone_tokens": _i32,
}  # fmt: skip
OTHERS = {
    "by_age": _i32,
    "id_by_age": _i64,
    "turns": _i32,
    "id_of_turn": _i64,
    "at_row": _i32,
    "buckets": _i32,
    "codes": _i64,
    "in_space": _i32,
    "counts": _i64,
}
LISTS = ("by_age", "id_by_age", "turns", "id_of_turn")  # twice as long as the columns
DTYPES = {name: {**COLUMNS, **OTHERS}[name] for name in Waiting._fields}
FEWEST = 64  # entries and spaces at first


def allocate_waiting(rows: int) -> Waiting:
    """Return the arrays of an empty queue. rows: the row capacity of the tree, or 0 if nothing watches the tree."""
    lengths = {
        "by_age": 2 * FEWEST,
        "id_by_age": 2 * FEWEST,
        "turns": 2 * FEWEST,
        "id_of_turn": 2 * FEWEST,
        "at_row": rows,
        "buckets": 2 * FEWEST,
        "codes": FEWEST,
        "in_space": FEWEST,
        "counts": SIZE,
    }
    arrays = {name: np.zeros(lengths.get(name, FEWEST), dtype) for name, dtype in DTYPES.items()}
    arrays["counts"][ENTRIES], arrays["counts"][BUCKETS] = 1, 2 * FEWEST
    return Waiting(**arrays)


def enlarge_waiting(old: Waiting, entries: int) -> Waiting:
    """Return a copy with space for `entries` entries, a power of two. Its buckets are empty."""
    arrays = old._asdict() | {"counts": old.counts.copy()}
    for name in (*COLUMNS, *LISTS):
        grown = np.zeros(entries if name in COLUMNS else 2 * entries, DTYPES[name])
        grown[: len(arrays[name])] = arrays[name]
        arrays[name] = grown
    arrays["buckets"] = np.zeros(2 * entries, _i32)
    arrays["counts"][BUCKETS] = 2 * entries
    return Waiting(**arrays)
