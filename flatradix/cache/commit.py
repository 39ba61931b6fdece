"""Commit and extend: new tokens of running requests, the whole pages that go to the tree, and more slots."""

from __future__ import annotations

import numpy as np

from flatradix.cache import share
from flatradix.cache.input import Call, refuse_token
from flatradix.cache.requests import Request, Requests
from flatradix.cache.state import State


def store_added(state: State, call: Call) -> None:
    """Write new tokens behind those that are known, where nobody reads yet. Raises QueryError for a bad token."""
    if len(call.added.counts):
        query, position = state.pages.store_tokens(call.rows, call.num_tokens, call.added)
        if query >= 0:
            refuse_token(call.added, query, position)


def commit_tokens(state: State, rows: np.ndarray, known: np.ndarray, ends: np.ndarray) -> Requests:
    """Let requests know `known` tokens, and insert the whole pages of the first `ends` that are not in the tree.

    Returns the requests whose pages were replaced, or may be.
    """
    if not state.loans:
        return state.batch(state.pages.commit(state.tree, rows, known, ends))
    changed = state.pages.commit(state.tree, *_with_families(state, rows, known, ends))
    state.settle_loans()
    return state.batch(changed)


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


def extend_requests(state: State, rows: np.ndarray, more: np.ndarray) -> list[Request]:
    """Give requests slots for `more` tokens, int64 [B]; return those that do not fit."""
    if state.pages.grow(rows, more):
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
