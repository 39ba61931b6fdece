"""Commit and extend: new tokens of running requests, the whole pages that go to the tree, and more slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flatradix.cache import share
from flatradix.cache.input import (
    as_batch,
    numbers_of,
    read_growth,
    read_tokens,
    read_up_to,
    refuse_long,
    refuse_token,
    rows_of,
)
from flatradix.cache.requests import Request, Requests
from flatradix.cache.state import State
from flatradix.inputs.arguments import per_query
from flatradix.inputs.sequences import Batch
from flatradix.kernels import cpu


def read_added(state: State, operation: str, rows: np.ndarray, tokens: Any) -> tuple[Batch, np.ndarray]:
    """Return the new tokens of each request, and how many it will have in all, int64 [B]."""
    added = read_tokens(operation, rows, tokens)
    known: np.ndarray = state.columns.num_tokens[rows] + added.counts
    refuse_long(operation, known, state.pages.most_tokens)
    return added, known


def computed_ends(state: State, operation: str, rows: np.ndarray, known: np.ndarray, up_to: Any) -> np.ndarray:
    """Return how many tokens of each request are computed, int64 [B]: by default all that are known and have slots.

    up_to: what the caller says, which may go to the end of the last page. known: int64 [B], tokens that will be known.
    """
    lengths = state.columns.length[rows]
    if up_to is None:
        return np.minimum(known, lengths)
    return read_up_to(operation, up_to, known, np.minimum(state.in_pages(lengths), state.max_length))


def store_added(state: State, rows: np.ndarray, added: Batch) -> None:
    """Write new tokens behind those that are known, where nobody reads yet. Raises QueryError for a bad token."""
    if added.owner is not None:
        begins = state.columns.num_tokens[rows]
        query, position = state.pages.store_tokens(rows, begins, added, np.zeros_like(rows))
        if query >= 0:
            refuse_token(added, query, position)


def read_step(state: State, requests: Sequence[Request], tokens: Any, n: Any) -> tuple[np.ndarray, Batch, np.ndarray]:
    """Return rows, new tokens and how many slots more, int64 [B], checked."""
    requests = as_batch(requests)
    rows, serials = numbers_of(state, "step", requests)
    added = read_tokens("step", rows, tokens)
    more = per_query(n, len(rows), "n")
    most = state.pages.most_tokens
    reason, query = cpu.check_requests(state.columns.data, rows, serials, added.counts, most, more, state.max_length)
    if reason:  # find it again, and say it
        rows_of(state, "step", requests)
        refuse_long("step", state.columns.num_tokens[rows] + added.counts, most)
        read_growth("step", state.columns, rows, n, state.max_length)
        raise AssertionError(f"step: request {query} was refused for reason {reason}, which no check finds")
    return rows, added, more


def commit_tokens(state: State, rows: np.ndarray, known: np.ndarray, ends: np.ndarray) -> Requests:
    """Let requests know `known` tokens, and insert the whole pages of the first `ends` that are not in the tree."""
    columns = state.columns
    if state.loans:
        rows, known, ends = _with_families(state, rows, known, ends)
    chosen = np.empty((3, len(rows)), np.int64)
    count = cpu.begin_commit(columns.data, rows, known, ends, state.page_size, chosen)
    if count == 0:
        return state.batch(rows[:0])
    rows, begins, ends = chosen[:, :count]
    changed = _insert(state, rows, begins, ends)
    return state.batch(rows if changed is None else rows[changed])


def _with_families(
    state: State, rows: np.ndarray, known: np.ndarray, ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add the requests that share what is committed. Every lender stands before its borrowers."""
    given = dict(zip(rows.tolist(), zip(known.tolist(), ends.tolist(), strict=True), strict=True))
    columns, page = state.columns, state.page_size
    whole = share.together(state.loans, {row: end // page * page for row, (_, end) in given.items()})
    found = {row: end for row, end in whole.items() if row in given or end > columns.committed[row]}
    all_rows = np.array(list(found), np.int64)
    knows = [given[row][0] if row in given else int(columns.num_tokens[row]) for row in found]
    all_ends = [max(end, given[row][1] if row in given else 0) for row, end in found.items()]
    return all_rows, np.array(knows, np.int64), np.array(all_ends, np.int64)


def _insert(state: State, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
    """Insert tokens of some rows; return which rows have other pages now, bool [B], or None if nobody knows yet."""
    pages, columns, owned = state.pages, state.columns, state.owned_from(rows)
    found = pages.insert(state.tree, columns, rows, begins, ends)
    columns.committed[rows] = ends
    columns.counted[rows] = ends
    if state.loans:
        state.settle_loans()
    pages.unlock(state.tree, found.before)
    return pages.replace(found, rows, begins, owned)


def extend_requests(state: State, rows: np.ndarray, more: np.ndarray) -> list[Request]:
    """Give requests slots for `more` tokens, int64 [B]; return those that do not fit."""
    if state.pages.grow(state.columns, rows, more):
        return []
    lengths = state.columns.length[rows]
    begins, ends = state.in_pages(lengths), state.in_pages(lengths + more)
    needed = ends - begins
    left = state.pages.free_slots
    if needed.sum() > left:
        state.pages.give_back_duplicates()
        left = state.pages.free_slots + state.tree.evictable_tokens
    missing = np.zeros(len(rows), np.int64)
    if needed.sum() > left:
        for query, slots in enumerate(needed.tolist()):
            missing[query] = max(slots - left, 0)
            left -= slots if slots <= left else 0
    fits = missing == 0
    grow = fits & (needed > 0)
    if grow.any():
        state.make_space(int(needed[grow].sum()))
        state.pages.take(rows[grow], begins[grow], ends[grow])
    state.columns.missing[rows] = missing
    state.columns.length[rows] = lengths + np.where(fits, more, 0)
    return [] if fits.all() else list(state.batch(rows[~fits]))
