"""Repairing a PrefixCache after an interrupted call.

No record tells how far the call came. The content of the tree and the running requests determine where each slot is,
and which locks must exist. If the tree holds a request's own pages, the request was committed up to these pages.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from flatradix.cache import share
from flatradix.cache.columns import Columns
from flatradix.cache.input import Call
from flatradix.cache.pages import Pages
from flatradix.cache.state import State
from flatradix.layout import numbers
from flatradix.layout.handles import ROW_MASK, pack_handle
from flatradix.results import Places
from flatradix.tree import RadixTree

BEGIN, EXTEND, COMMIT, STEP, END, RESET, OTHER = "begin", "extend", "commit", "step", "end", "reset", "other"
_NO_ROWS = np.empty(0, np.int64)


class UnderWay(NamedTuple):
    """A call that has begun, and its requests before the call. serial: that of the first request that it may begin."""

    operation: str
    rows: np.ndarray = _NO_ROWS
    length: np.ndarray = _NO_ROWS
    num_tokens: np.ndarray = _NO_ROWS
    committed: np.ndarray = _NO_ROWS
    serial: int = 0


READING = UnderWay("reading")  # a call that has changed nothing so far


def begun(operation: str, call: Call) -> UnderWay:
    """Return the record of a call on running requests."""
    return UnderWay(operation, call.rows, call.length, call.num_tokens, call.committed)


def end_begun(cut: UnderWay, columns: Columns) -> np.ndarray:
    """End what an interrupted `begin` started; return the rows of the requests that run on, int64 [B].

    After an `extend`, the lengths from before the call are restored.
    """
    if cut.operation == BEGIN:
        columns.serial[columns.serial >= cut.serial] = 0
    if cut.operation == RESET:
        columns.serial[:] = 0
    if cut.operation in (EXTEND, STEP):
        columns.length[cut.rows] = cut.length
    return np.flatnonzero(columns.serial)


def find_committed(
    tree: RadixTree, pages: Pages, columns: Columns, rows: np.ndarray, loans: share.Loans
) -> tuple[Places, np.ndarray]:
    """Return a place on the path of each request, and how many of its tokens are in the tree, in whole pages.

    At least `committed` tokens are in the tree, and those up to the last page of its own that the tree holds. What a
    request shares with others by `loans` is in the tree for all of these requests.
    """
    page, before = pages.page_size, columns.committed[rows]
    if len(rows) == 0:
        empty = torch.empty(0, dtype=torch.int32, device=tree.device)
        return Places(empty, empty.to(torch.int64)), before
    known = np.minimum(columns.length[rows], columns.num_tokens[rows]) // page * page
    keys = pages.tokens(rows, before, np.maximum(known, before))
    match = tree.match(keys, columns.names_of(rows), touch=False, start=pages.places(rows, before))
    cached, own = tree.slots(match).to("cpu"), pages.on_host(rows)
    committed = before.copy()
    for query, length in enumerate(match.lengths.tolist()):
        theirs = cached[query].numpy()[before[query] :: page] // page
        same = np.flatnonzero(theirs == own[query, before[query] // page : length // page])
        committed[query] += page * (int(same[-1]) + 1 if len(same) else 0)
    if loans:
        ends = share.together(loans, dict(zip(rows.tolist(), committed.tolist(), strict=True)))
        committed = np.array([ends[row] for row in rows.tolist()], np.int64)
    return Places(torch.from_numpy(committed.astype(np.int32)).to(tree.device), match.handles), committed


def forget_tokens(cut: UnderWay, columns: Columns, committed: np.ndarray) -> None:
    """Drop the new tokens of an interrupted commit, unless it reached the tree. committed: by row, int64 [R]."""
    if cut.operation in (COMMIT, STEP, END) and not (committed[cut.rows] > cut.committed).any():
        columns.num_tokens[cut.rows] = cut.num_tokens


def lock_exactly(tree: RadixTree, places: Places) -> None:
    """Change the locks of the tree to one for each of these places. Renew the handles of `places`."""
    tree.split(places)
    content = tree.content(slots=False)
    rows = places.handles.cpu().numpy() & ROW_MASK
    wanted = np.bincount(rows, minlength=content.rows)
    own = np.where(np.isin(np.arange(content.rows), content.live()), content.column("own_locks"), 0)
    wanted[0] = 0  # nothing is locked at the root
    generation = content.number(numbers.GENERATION)
    for surplus, operation in ((own - wanted, tree.unlock), (wanted - own, tree.lock)):
        found = np.repeat(np.arange(content.rows), np.maximum(surplus, 0))
        if len(found):
            packed = [pack_handle(int(row), generation + int(content.column("generation")[row])) for row in found]
            handles = torch.tensor(packed, dtype=torch.int64, device="cpu").to(tree.device)
            lengths = torch.from_numpy(content.column("end")[found].astype(np.int32)).to(tree.device)
            operation(Places(lengths, handles))


def free_pages(tree: RadixTree, pages: Pages, columns: Columns, rows: np.ndarray) -> np.ndarray:
    """Return the pages that are neither in the tree nor held by a request: int64 [K], the lowest last."""
    tree.evict(0)  # drops the slots of an interrupted eviction from the tree: no node holds them, so they are free
    content, page = tree.content(), pages.page_size
    used = np.zeros(pages.num_pages, np.bool_)
    for row in content.live().tolist():
        begin = int(content.column("start")[row])
        slots = content.slots[begin : begin + int(content.column("length")[row]) : page]
        used[slots // page] = True
    begins, ends = columns.committed[rows] // page, -(-columns.length[rows] // page)
    for own, begin, end in zip(pages.on_host(rows), begins, ends, strict=True):
        used[own[begin:end]] = True
    return np.flatnonzero(~used)[::-1].copy()


def repair(state: State, cut: UnderWay) -> None:
    """Repair a cache after the interrupted call `cut`. O(slots)."""
    columns, pages = state.columns, state.pages
    rows = end_begun(cut, columns)
    state.end_views()
    places, committed = find_committed(state.tree, pages, columns, rows, state.loans)
    ends = np.zeros_like(columns.committed)
    ends[rows] = committed
    forget_tokens(cut, columns, ends)
    lock_exactly(state.tree, places)
    pages.set_places(rows, places)
    pages.write_cached(places, rows)
    columns.committed[rows] = committed
    columns.length[rows] = np.maximum(columns.length[rows], committed)
    state.settle_loans()
    state.inherit(share.end_others(state.loans, set(rows.tolist())))
    columns.find_free_rows()
    pages.set_free(free_pages(state.tree, pages, columns, rows))
    pages.copy_rows(rows, columns.length[rows])
