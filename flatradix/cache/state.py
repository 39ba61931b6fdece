"""State: everything that a PrefixCache knows. The operations of the cache work on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flatradix.cache import share
from flatradix.cache.columns import Columns
from flatradix.cache.counts import Counts
from flatradix.cache.pages import Pages
from flatradix.cache.requests import Request, Requests
from flatradix.cache.share import Loans
from flatradix.layout import running
from flatradix.results import EvictResult
from flatradix.tree import RadixTree


class State:
    """The tree, the pages and the running requests of one cache.

    columns: the numbers of the running requests. views: those that were looked at, by row. loans: what requests share
    that is not committed; `set_loans` replaces them. refused, evicted_tokens: totals, as in `Counts`.
    """

    def __init__(self, tree: RadixTree, pages: Pages, columns: Columns) -> None:
        self.tree = tree
        self.pages = pages
        self.columns = columns
        self.page_size = tree.page_size
        self.max_requests = len(columns.serial)
        self.max_length = columns.counts[running.MOST_SLOTS]
        self.views: dict[int, Request] = {}
        self.loans: Loans = {}
        self.refused = self.evicted_tokens = 0

    def reset(self) -> None:
        """End all requests, and free all pages. Counters restart at 0."""
        self.columns.serial[:] = 0
        self.end_views()
        self.loans = {}
        self.refused = self.evicted_tokens = 0
        self.columns.reset()
        self.pages.reset()

    def in_pages(self, tokens: Any) -> Any:
        """Round numbers of tokens up to whole pages."""
        return -(-tokens // self.page_size) * self.page_size

    @property
    def available_slots(self) -> int:
        return self.pages.free_slots + self.tree.evictable_tokens

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
        if not self.views:
            return
        serial = self.columns.serial
        # A copy: reading a request of a batch, which any thread may do meanwhile, makes a view.
        for row, view in list(self.views.items()):
            if serial[row] != view.serial:
                view.end()
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
            self._give(self.tree.evict(short))

    def drop(self, namespace: Any) -> int:
        """Drop a namespace. Return how many slots became free."""
        dropped = self.tree.drop(namespace=namespace)
        self._give(dropped)
        return dropped.num_tokens

    def _give(self, evicted: EvictResult) -> None:
        """Free the pages of what was evicted or dropped."""
        self.pages.give_evicted(evicted)
        self.evicted_tokens += evicted.num_tokens

    def owned_from(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens before which each request's slots are not its own: cached or borrowed, int64 [B]."""
        owned: np.ndarray = np.maximum(self.columns.committed[rows], self.columns.borrowed[rows])
        return owned

    def set_loans(self, loans: Loans) -> None:
        """Replace the loans, also where kernels read them."""
        self.columns.borrowed[:] = 0
        for row, loan in loans.items():
            self.columns.borrowed[row] = loan.borrowed
        self.loans = loans

    def settle_loans(self) -> None:
        """End the loans of requests that have committed what they borrow."""
        rows = self.columns.rows.tolist()
        self.set_loans(share.unsettled(self.loans, {row: int(self.columns.committed[row]) for row in rows}))

    def release(self, rows: np.ndarray, touch: bool) -> None:
        if len(rows) == 0:
            return
        columns, pages = self.columns, self.pages
        if touch:
            held = columns.committed[rows]
            self.tree.match(pages.tokens(rows, held, held), columns.names_of(rows), start=pages.places(rows, held))
        if not self.loans:
            pages.release(self.tree, rows, None)
            self.end_views()
            return
        ending = share.end(self.loans, rows.tolist())
        pages.release(self.tree, rows, np.maximum(columns.committed[rows], ending.begins))
        self.end_views()
        self.inherit(ending)

    def inherit(self, ending: share.Ending) -> None:
        """Let heirs compute what a lender that has ended would have, and replace the loans."""
        columns = self.columns
        for row in ending.heirs:
            loan = ending.loans.get(row)
            left = loan.borrowed if loan else int(columns.committed[row])
            columns.cached[row] = min(int(columns.cached[row]), left)
        self.set_loans(ending.loans)  # last: before, a repair does all of this again

    def count(self) -> Counts:
        rows, totals = self.columns.rows, self.columns.counts
        return Counts(
            requests=totals[running.BEGUN],
            refused=self.refused,
            running=len(rows),
            prompt_tokens=totals[running.PROMPT_TOKENS],
            cached_tokens=totals[running.CACHED_TOKENS],
            evicted_tokens=self.evicted_tokens,
            duplicate_tokens=totals[running.DUPLICATE_TOKENS],
            shared_tokens=totals[running.SHARED_TOKENS],
            slots=self.pages.num_pages * self.page_size,
            free=self.pages.free_slots,
            evictable=self.tree.evictable_tokens,
            protected=self.tree.protected_tokens,
            held=int((self.in_pages(self.columns.length[rows]) - self.owned_from(rows)).sum()),
        )
