"""State: everything that a PrefixCache knows. The operations of the cache work on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flatradix.cache import share
from flatradix.cache.columns import Columns
from flatradix.cache.counts import Counts
from flatradix.cache.pages import Pages
from flatradix.cache.requests import Request, Requests
from flatradix.cache.share import Loans
from flatradix.tree import RadixTree


@dataclass
class Totals:
    """Counters since the start, as in `Counts`."""

    begun: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    evicted_tokens: int = 0
    shared_tokens: int = 0


class State:
    """The tree, the pages and the running requests of one cache.

    columns: the numbers of the running requests. views: those that were looked at, by row. free_rows: a stack. loans:
    what requests share that is not committed. serial: the number of the next request.
    """

    def __init__(self, tree: RadixTree, pages: Pages, max_requests: int, max_length: int) -> None:
        self.tree = tree
        self.pages = pages
        self.page_size = tree.page_size
        self.max_requests = max_requests
        self.max_length = max_length
        self.serial = 1
        self.begin_afresh()

    def begin_afresh(self) -> None:
        self.columns = Columns(self.max_requests)
        self.views: dict[int, Request] = {}
        self.free_rows = list(range(self.max_requests - 1, -1, -1))
        self.loans: Loans = {}
        self.totals = Totals()

    def in_pages(self, tokens: Any) -> Any:
        """Round numbers of tokens up to whole pages."""
        return -(-tokens // self.page_size) * self.page_size

    @property
    def rows(self) -> np.ndarray:
        """The rows of the running requests, int64 [N]."""
        return np.flatnonzero(self.columns.serial)

    @property
    def available_slots(self) -> int:
        return self.pages.free_slots + self.tree.evictable_tokens

    def start(self, rows: np.ndarray) -> None:
        """Number new requests, which have the last of the free rows. From then on, they run."""
        del self.free_rows[len(self.free_rows) - len(rows) :]
        self.serial += len(rows)
        self.columns.serial[rows] = np.arange(self.serial - len(rows), self.serial)

    def batch(self, rows: np.ndarray) -> Requests:
        return Requests(self, rows, self.columns.serial[rows])

    def view(self, row: int, serial: int) -> Request:
        """Return the view of a request: always the same object while it runs."""
        view = self.views.get(row)
        if view is not None and view.serial == serial:
            return view
        if self.columns.serial[row] != serial:
            return Request(self, -1, serial, None, 0)
        view = Request(self, row, serial, self.columns.names[row], int(self.columns.priority[row]))
        self.views[row] = view
        return view

    def end_views(self) -> None:
        """Let the views of requests that have ended keep their numbers, before their rows are used again."""
        serial = self.columns.serial
        for row in [row for row, view in self.views.items() if serial[row] != view.serial]:
            self.views[row].end()
            del self.views[row]

    def tokens_of(self, row: int) -> np.ndarray:
        """Return the known tokens of a row, int64: those that were cached from the tree, the others from the row."""
        kept, known = int(self.columns.kept[row]), int(self.columns.num_tokens[row])
        own = self.pages.own_tokens(row, kept, known)
        rows = np.array([row])
        if kept:
            cached = self.tree.tokens(self.pages.places(rows, self.columns.committed[rows])).values[:kept]
            own = np.concatenate([cached.cpu().numpy(), own])
        return own.astype(np.int64)

    def pages_of(self, row: int, length: int) -> torch.Tensor:
        return self.pages.page_table[row, : -(-length // self.page_size)]

    def slots_of(self, row: int, length: int) -> torch.Tensor:
        return self.pages.slots_of_row(row)[:length]

    def loan_of(self, request: Request) -> tuple[Request | None, int]:
        """Return what `Request.lender` and `Request.borrowed` say."""
        loan = self.loans.get(request.row)
        if loan is None:
            return None, 0
        serial = int(self.columns.serial[loan.lender])
        return self.view(loan.lender, serial) if serial else None, loan.borrowed

    def make_space(self, slots: int) -> None:
        """Evict until so many slots are free. Enough must be free or evictable."""
        short = slots - self.pages.free_slots
        if short > 0:
            evicted = self.tree.evict(short)
            self.pages.give_evicted(evicted)
            self.totals.evicted_tokens += evicted.num_tokens

    def owned_from(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens before which each request's slots are not its own: cached or borrowed, int64 [B]."""
        owned: np.ndarray = self.columns.committed[rows]
        for query, row in enumerate(rows.tolist()) if self.loans else ():
            if row in self.loans:
                owned[query] = max(owned[query], self.loans[row].borrowed)
        return owned

    def settle_loans(self) -> None:
        """End the loans of requests that have committed what they borrow."""
        rows = np.flatnonzero(self.columns.serial).tolist()
        self.loans = share.unsettled(self.loans, {row: int(self.columns.committed[row]) for row in rows})

    def release(self, rows: np.ndarray, touch: bool) -> None:
        if len(rows) == 0:
            return
        columns, pages = self.columns, self.pages
        ending = share.end(self.loans, rows.tolist()) if self.loans else None
        begins = columns.committed[rows]
        if ending is not None:
            begins = np.maximum(begins, ending.begins)
        ends = np.maximum(self.in_pages(columns.length[rows]), begins)
        if touch:
            place = pages.places(rows, columns.committed[rows])
            self.tree.match(pages.tokens(rows, begins, begins), columns.names_of(rows), start=place)
        pages.unlock(self.tree, pages.held(rows, columns.committed[rows]))
        columns.serial[rows] = 0
        self.end_views()
        self.free_rows.extend(rows.tolist())
        if ending is not None:
            self.inherit(ending)
        pages.give(rows, begins, ends)

    def inherit(self, ending: share.Ending) -> None:
        """Let heirs compute what a lender that has ended would have, and replace the loans."""
        columns = self.columns
        for row in ending.heirs:
            loan = ending.loans.get(row)
            left = loan.borrowed if loan else int(columns.committed[row])
            columns.cached[row] = min(int(columns.cached[row]), left)
        self.loans = ending.loans  # last: before, a repair does all of this again

    def count(self) -> Counts:
        rows = np.flatnonzero(self.columns.serial)
        return Counts(
            requests=self.totals.begun,
            refused=self.totals.refused,
            running=len(rows),
            prompt_tokens=self.totals.prompt_tokens,
            cached_tokens=self.totals.cached_tokens,
            evicted_tokens=self.totals.evicted_tokens,
            duplicate_tokens=self.pages.duplicates,
            shared_tokens=self.totals.shared_tokens,
            slots=self.pages.num_pages * self.page_size,
            free=self.pages.free_slots,
            evictable=self.tree.evictable_tokens,
            protected=self.tree.protected_tokens,
            held=int((self.in_pages(self.columns.length[rows]) - self.owned_from(rows)).sum()),
        )
