"""Begin: start prompts together if all of them fit, else one by one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flatradix.cache import share
from flatradix.cache.input import Prompts, check_tokens
from flatradix.cache.pages import Grant
from flatradix.cache.requests import Request, Requests
from flatradix.cache.share import Loan, Sharing
from flatradix.cache.state import State
from flatradix.errors import QueryError
from flatradix.layout import running


class _Lack(NamedTuple):
    """Why prompts do not fit: slots that are needed, and slots that can be had."""

    needed: int
    left: int


def begin_prompts(state: State, prompts: Prompts, chunk: int | None, shares: bool) -> Requests:
    """Start those of the prompts that fit, in order; return a request for each."""
    if len(prompts) == 0:
        return state.batch(prompts.counts)
    sharing = Sharing(state.page_size) if shares else None
    fit = prompts.longest <= state.max_length
    if not fit or prompts.on_device is not None:
        check_tokens(prompts)  # those that are refused, too; a device copies tokens without a check
    given = _start(state, prompts, chunk, sharing) if fit else None
    if isinstance(given, np.ndarray):
        return state.batch(given)
    return _begin_one_by_one(state, prompts.on_host(), chunk, sharing, given)


def _begin_one_by_one(
    state: State, prompts: Prompts, chunk: int | None, sharing: Sharing | None, lack: _Lack | None
) -> Requests:
    """Start those prompts that fit. The cached part of a refused request must stay evictable for others.

    lack: why the prompts do not fit together; None if one is too long.
    """
    rows, refused = np.full(len(prompts), -1), {}
    if len(prompts) > 1:
        check_tokens(prompts)  # before the first of them starts
    for query, count in enumerate(prompts.counts.tolist()):
        alone: np.ndarray | _Lack = lack or _Lack(0, 0)
        if count <= state.max_length and len(prompts) > 1:
            alone = _start(state, prompts.some(np.array([query])), chunk, sharing)
        if isinstance(alone, _Lack):
            refused[query] = _refuse(state, prompts, query, alone)
        else:
            rows[query] = alone[0]
    state.refused += len(refused)
    return Requests(state, rows, np.where(rows >= 0, state.columns.serial[rows], 0), refused)


def _refuse(state: State, prompts: Prompts, query: int, lack: _Lack) -> Request:
    """Return the request of a prompt that is refused."""
    count = int(prompts.counts[query])
    missing = max(lack.needed - lack.left, 0)
    if count > state.max_length:
        text = f"{count} tokens are more than max_length {state.max_length}: cut the prompt"
    elif missing:
        text = f"{lack.needed} slots are needed and {lack.left} can be had: {missing} too few"
    else:
        text = f"all {state.max_requests} requests that max_requests allows are running"
    names = prompts.name(query), int(prompts.priorities[query])
    return Request.refused(state, count, names, text, missing)


def _start(state: State, prompts: Prompts, chunk: int | None, sharing: Sharing | None) -> np.ndarray | _Lack:
    """Start prompts if all of them fit, and return their rows, int64 [B]. Otherwise they hold nothing.

    sharing: the prompts of this call that have started.
    """
    columns = state.columns
    free = columns.counts[running.FREE_ROWS] - len(prompts)
    if free < 0 and len(prompts) > 1:
        return _Lack(0, 0)
    rows = columns.next_rows(len(prompts)) if free >= 0 else np.zeros(1, np.int64)
    # The match does not touch: a prompt that is refused again and again would keep its cached part from being
    # evicted. The first commit touches.
    found = state.pages.find(state.tree, prompts, chunk or 0)
    begins, loans = found.cached, {}
    if sharing is not None and free >= 0:
        loans = _loans_of(sharing, prompts.on_host(), rows, begins)
        begins = np.array([loans[row].borrowed if row in loans else -1 for row in rows.tolist()], np.int64)
        begins = np.maximum(begins, found.cached)
        found = state.pages.plan(found, prompts, begins, 0)
    needed, left = found.needed * state.page_size, state.pages.free_slots
    short = needed > left
    if short:
        left += state.tree.evictable_tokens
    if needed <= left and free >= 0:
        try:
            if short:
                check_tokens(prompts, found.cached)  # before anything is evicted
                state.make_space(needed)
            _admit(state, prompts, found.place, Grant(rows, found.cached, begins, found.lengths), loans)
        except QueryError:
            state.pages.unlock(state.tree, found)
            raise
        return rows
    state.pages.unlock(state.tree, found)
    if sharing is not None and free >= 0:
        for query, row in enumerate(rows.tolist()):
            sharing.take_back(row, prompts.name(query))
    return _Lack(needed, left)


def _admit(state: State, prompts: Prompts, place: Any, grant: Grant, loans: dict[int, Loan]) -> None:
    """Let prompts run, for which enough pages are free. Raises QueryError for a bad token with nothing changed."""
    pages, rows = state.pages, grant.rows
    state.columns.set_names(rows, prompts.names)
    pages.admit(prompts, place, grant)
    if loans:
        lacks = dict(zip(rows.tolist(), grant.cached.tolist(), strict=True))
        for (lender, begin, end), borrowers in share.copies(loans, lacks).items():
            pages.copy(lender, np.array(borrowers), begin, end)
        state.set_loans({**state.loans, **loans})


def _loans_of(sharing: Sharing, prompts: Prompts, rows: np.ndarray, cached: np.ndarray) -> dict[int, Loan]:
    """Return what prompts borrow from those before them, by row."""
    found = {}
    for query, (row, length) in enumerate(zip(rows.tolist(), cached.tolist(), strict=True)):
        loan = sharing.start(row, prompts.array(query)[:-1], prompts.name(query), length)
        if loan is not None:
            found[row] = loan
    return found
