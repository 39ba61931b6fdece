"""Begin: start prompts together if all of them fit, else one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flatradix.cache import share
from flatradix.cache.input import Prompts, check_tokens
from flatradix.cache.requests import Request, Requests
from flatradix.cache.share import Loan, Sharing
from flatradix.cache.state import State
from flatradix.errors import QueryError
from flatradix.results import Places


class _Grant(NamedTuple):
    """What prompts get that begin, int64 [B]: rows, slots for `lengths` tokens, and pages from `begins` to `ends`.

    Of the tokens before `begins`, `cached` are cached; the others are borrowed as `loans` say.
    """

    rows: np.ndarray
    cached: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    loans: dict[int, Loan]


class _Lack(NamedTuple):
    """Why prompts do not fit: slots that are needed, and slots that can be had."""

    needed: int
    left: int


def begin_prompts(state: State, prompts: Prompts, chunk: int | None, shares: bool) -> Requests:
    """Start those of the prompts that fit, in order; return a request for each."""
    sharing = Sharing(state.page_size) if shares else None
    rows, refused = np.full(len(prompts), -1), {}
    fits = prompts.counts <= state.max_length
    if not fits.all() or prompts.on_device is not None:
        check_tokens(prompts)  # those that are refused, too; a device copies tokens without a check
    if not fits.all():
        prompts = prompts.on_host()
        refused = {query: _refuse(state, prompts, query, _Lack(0, 0)) for query in np.flatnonzero(~fits).tolist()}
    fitting = np.flatnonzero(fits)
    given = _start(state, prompts if fits.all() else prompts.some(fitting), chunk, sharing) if len(fitting) else fitting
    if isinstance(given, _Lack):
        # One by one: the cached part of a refused request must stay evictable for others.
        prompts = prompts.on_host()
        if len(fitting) > 1:
            check_tokens(prompts)  # before the first of them starts
        for query in fitting.tolist():
            alone = given if len(fitting) == 1 else _start(state, prompts.some(np.array([query])), chunk, sharing)
            if isinstance(alone, _Lack):
                refused[query] = _refuse(state, prompts, query, alone)
            else:
                rows[query] = alone[0]
    else:
        rows[fitting] = given
    state.totals.refused += len(refused)
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
    free = len(state.free_rows) - len(prompts)
    if free < 0 and len(prompts) > 1:
        return _Lack(0, 0)
    rows = np.array(state.free_rows[free:] if free >= 0 else [0], np.int64)
    # The match does not touch: a prompt that is refused again and again would keep its cached part from being
    # evicted. The first commit touches.
    place, cached = state.pages.find_cached(state.tree, prompts, lock=True)
    begins, loans = cached, {}
    if sharing is not None and free >= 0:
        loans = _loans_of(sharing, prompts, rows, cached)
        begins = cached.copy()
        for query, row in enumerate(rows.tolist()):
            begins[query] = loans[row].borrowed if row in loans else begins[query]
    lengths = prompts.counts if chunk is None else np.minimum(prompts.counts, begins + chunk)
    grant = _Grant(rows, cached, begins, lengths, state.in_pages(lengths), loans)
    needed = int((grant.ends - begins).sum())
    left = state.pages.free_slots
    if needed > left:
        left += state.tree.evictable_tokens
    if needed <= left and free >= 0:
        try:
            _admit(state, prompts, place, grant)
        except QueryError:
            state.tree.unlock(place)
            raise
        return rows
    state.tree.unlock(place)
    if sharing is not None and free >= 0:
        for query, row in enumerate(rows.tolist()):
            sharing.take_back(row, prompts.name(query))
    return _Lack(needed, left)


def _admit(state: State, prompts: Prompts, place: Places, grant: _Grant) -> None:
    """Give rows, tokens and pages to prompts that fit. Raises QueryError for a bad token; then nothing is given."""
    pages, columns = state.pages, state.columns
    rows, cached, begins, lengths, ends, loans = grant
    pages.store_prompts(rows, prompts, cached)
    state.make_space(int((ends - begins).sum()))
    pages.write_cached(place, rows)
    pages.take(rows, begins, ends)
    lacks = dict(zip(rows.tolist(), cached.tolist(), strict=True))
    for (lender, begin, end), borrowers in share.copies(loans, lacks).items():
        pages.copy(lender, np.array(borrowers), begin, end)
    pages.set_places(rows, place)
    columns.num_tokens[rows], columns.length[rows], columns.kept[rows] = prompts.counts, lengths, cached
    columns.cached[rows], columns.committed[rows] = begins, cached
    columns.counted[rows] = columns.missing[rows] = 0
    columns.priority[rows] = prompts.priorities
    columns.set_names(rows, prompts.names)
    state.start(rows)
    if loans:
        state.loans = {**state.loans, **loans}
    state.totals.begun += len(rows)
    state.totals.prompt_tokens += int(prompts.counts.sum())
    state.totals.cached_tokens += int(cached.sum())
    state.totals.shared_tokens += int((begins - cached).sum())


def _loans_of(sharing: Sharing, prompts: Prompts, rows: np.ndarray, cached: np.ndarray) -> dict[int, Loan]:
    """Return what prompts borrow from those before them, by row."""
    found = {}
    for query, (row, length) in enumerate(zip(rows.tolist(), cached.tolist(), strict=True)):
        loan = sharing.start(row, prompts.array(query)[:-1], prompts.name(query), length)
        if loan is not None:
            found[row] = loan
    return found
