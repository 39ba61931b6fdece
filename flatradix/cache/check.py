"""Checks of every invariant of a PrefixCache. For tests; slow."""

from __future__ import annotations

import numpy as np

from flatradix.cache.columns import Columns
from flatradix.cache.counts import Counts
from flatradix.cache.pages import Pages
from flatradix.cache.share import Loans
from flatradix.inspect.check import check, equal
from flatradix.inspect.content import Content
from flatradix.layout.handles import ROW_MASK
from flatradix.results import Places


def check_slots(counts: Counts, content: Content, pages: Pages, held: list[np.ndarray]) -> None:
    """Raise AssertionError unless every page is exactly one of free, cached or held by a request. held: their pages."""
    check(content)
    page, live = pages.page_size, content.live()
    edges = zip(content.column("start")[live].tolist(), content.column("length")[live].tolist(), strict=True)
    cached = [content.slots[begin : begin + length] for begin, length in edges]
    for slots in cached:
        equal(slots.tolist(), (slots[::page, None] + np.arange(page)).reshape(-1).tolist(), "slots of a cached page")
    where = np.concatenate([pages.free_list(), *(slots[::page] // page for slots in cached), *held]).astype(np.int64)
    equal(counts.free + counts.evictable + counts.protected + counts.held, counts.slots, "slots in all")
    equal(np.sort(where).tolist(), list(range(pages.num_pages)), "slots that are free, cached or held, in pages")


def check_holders(content: Content, committed: np.ndarray, places: Places) -> None:
    """Raise AssertionError unless each request holds a lock at its place, and there are no other locks."""
    equal(places.lengths.tolist(), committed.tolist(), "places that requests hold")
    holders = np.bincount(places.handles.cpu().numpy() & ROW_MASK, minlength=content.rows)
    holders[0] = 0  # nothing is locked at the root
    live = content.live()
    equal(holders[live].tolist(), content.column("own_locks")[live].tolist(), "requests that hold each node")


def check_tables(pages: Pages, columns: Columns, rows: np.ndarray, cached: list[list[int]], free: np.ndarray) -> None:
    """Raise AssertionError unless each row agrees with the tree and with its copies, and is free or in use.

    cached: the slots of the tree for each row. free: the free rows.
    """
    page, own = pages.page_size, pages.on_host(rows)
    table, copy = pages.page_table.cpu().numpy(), pages.slot_copy
    for query, row in enumerate(rows.tolist()):
        end = -(-int(columns.length[row]) // page)
        equal(
            own[query, : len(cached[query]) // page].tolist(),
            [slot // page for slot in cached[query][::page]],
            f"row {row}",
        )
        equal(table[row, :end].tolist(), own[query, :end].tolist(), f"row {row} of the page table")
        if copy is not None:
            slots = (own[query, :end, None] * page + np.arange(page)).reshape(-1)
            equal(copy[row, : end * page].tolist(), slots.tolist(), f"row {row} of the slot table")
    equal(sorted([*free.tolist(), *rows.tolist()]), list(range(len(columns.serial))), "rows that are free or in use")


def check_loans(loans: Loans, pages: Pages, columns: Columns, tokens: dict[int, np.ndarray]) -> None:
    """Raise AssertionError unless each loan is between running requests that have equal tokens and equal pages.

    tokens: those of each running request, by its row.
    """
    page = pages.page_size
    for row, (lender, borrowed) in loans.items():
        what = f"the loan of row {row}"
        equal(row in tokens and lender in tokens, True, f"{what}: both requests run")
        one, other = pages.on_host(np.array([row, lender]))
        equal(columns.names[row], columns.names[lender], f"{what}: namespaces")
        equal(borrowed % page, 0, f"{what}: tokens behind the last page")
        equal(int(columns.committed[row]), int(columns.committed[lender]), f"{what}: committed tokens")
        lent = loans[lender].borrowed if lender in loans else 0
        shortest = min(int(columns.length[row]), int(columns.length[lender]))
        equal(max(int(columns.committed[row]), lent) < borrowed <= shortest, True, f"{what}: its length fits")
        equal(tokens[row][:borrowed].tolist(), tokens[lender][:borrowed].tolist(), f"{what}: tokens")
        equal(one[: borrowed // page].tolist(), other[: borrowed // page].tolist(), f"{what}: pages")
    for row in tokens:
        computed = max(int(columns.committed[row]), loans[row].borrowed if row in loans else 0)
        equal(int(columns.cached[row]) <= computed, True, f"row {row}: its own tokens are computed")
