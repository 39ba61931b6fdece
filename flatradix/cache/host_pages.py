"""HostPages: the pages of a cache whose index is in host memory. A KV cache on a GPU gets copies of changes."""

from __future__ import annotations

import numpy as np
import torch

from flatradix.cache.columns import Columns
from flatradix.cache.input import Prompts, refuse_token
from flatradix.cache.pages import Found, Grant, Pages
from flatradix.cache.table_copy import TableCopy, changed_places
from flatradix.host.paged import PagedIndex
from flatradix.inputs.sequences import Batch, address_of
from flatradix.kernels import cpu
from flatradix.layout import running
from flatradix.results import EvictResult, Places
from flatradix.tree import RadixTree

_NO_ROWS = np.empty(0, np.int64)


class HostPages(Pages):
    """Everything is kept in host memory, where one kernel does the work of a call.

    If the KV cache is elsewhere, its tables are copies: each call enqueues one copy of the pages that it changed.
    """

    def __init__(self, index: PagedIndex, num_pages: int, columns: Columns, kv: torch.device, apart: bool) -> None:
        """apart: whether the tables of the KV cache are copies."""
        self.columns, counts = columns, columns.counts
        rows, width, self._most_known = counts[running.ROWS], counts[running.WIDTH], counts[running.MOST_KNOWN]
        self.page_size, self.num_pages = counts[running.PAGE], num_pages
        self._index = index
        self._pages = np.zeros((rows, width), np.int32)
        self._tokens = np.empty((rows, self._most_known), np.int32)
        self._tokens_at = address_of(self._tokens)
        self._stack = np.empty(num_pages, np.int32)
        self._handles = np.zeros(rows, np.int64)
        columns.complete(self._pages, self._stack, self._handles, index.page_pool, self._tokens)
        self.slot_copy = None
        self.page_table = torch.from_numpy(self._pages)
        self._table_copy: TableCopy | None = None
        if apart:
            self.page_table = torch.zeros(self._pages.shape, dtype=torch.int32, device=kv)
            self._table_copy = TableCopy(columns.address, self._pages, self.page_size, self.page_table)
        self.within = torch.arange(self.page_size, dtype=torch.int32, device=kv)
        self.reset()

    # Begin

    def keys(self, prompts: Prompts) -> Batch:
        addresses, counts, wide, owner = prompts.tokens
        return Batch(addresses, counts - 1, wide, owner)

    def find(self, tree: RadixTree, prompts: Prompts, chunk: int) -> Found:
        found = np.empty((3, len(prompts)), np.int64)
        needed = self._index.find_prompts(self.columns.address, prompts.tokens, prompts.names, chunk, found)
        cached, lengths, handles = found
        return Found(handles, cached, lengths, needed)

    def unlock(self, tree: RadixTree, found: Found) -> None:
        tree.unlock(Places(torch.from_numpy(found.cached.astype(np.int32)), torch.from_numpy(found.place)))

    def admit(self, prompts: Prompts, place: np.ndarray, grant: Grant) -> None:
        rows, cached, begins, lengths = grant
        arrays = rows, cached, begins, lengths, place, prompts.priorities
        query, position = self._index.admit_prompts(self.columns.address, prompts.tokens, arrays)
        if query >= 0:
            refuse_token(prompts.tokens, query, position)
        self._changed(rows, None, lengths)

    # Commit

    def commit(self, tree: RadixTree, rows: np.ndarray, known: np.ndarray, ends: np.ndarray) -> np.ndarray:
        columns = self.columns
        names = columns.names_to_commit(rows) if columns.has_names else None
        replaced = self._index.commit_requests(columns.address, rows, known, ends, names)
        if replaced.shape[1]:
            self._changed(*replaced)
        rows_replaced: np.ndarray = replaced[0]
        return rows_replaced

    def give_back_duplicates(self) -> None:
        return

    # Grow and end

    def grow(self, rows: np.ndarray, more: np.ndarray) -> bool:
        changed = np.empty((3, len(rows)), np.int64)
        count = cpu.grow.call(self.columns.address, rows, more, changed)
        if count > 0:
            self._changed(*changed[:, :count])
        return bool(count >= 0)

    def take(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        count = int((-(-ends // self.page_size) - -(-begins // self.page_size)).sum())
        self.ensure_free(count * self.page_size)
        if count:
            cpu.take_pages(self.columns.address, rows, begins, ends)
            self._changed(rows, begins, ends)

    def give_evicted(self, evicted: EvictResult) -> None:
        pages = evicted.slots.numpy()[:: self.page_size] // np.int32(self.page_size)
        self.ensure_out(len(pages))
        cpu.give_page_list(self.columns.address, pages)

    def release(self, tree: RadixTree, rows: np.ndarray, begins: np.ndarray | None) -> None:
        self._index.release_requests(self.columns.address, rows, _NO_ROWS if begins is None else begins)

    # Copies for the KV cache

    def _changed(self, rows: np.ndarray, begins: np.ndarray | None, ends: np.ndarray) -> None:
        """Copy the pages of tokens of some rows to the tables of the KV cache. begins: None for the first token."""
        if self._table_copy is None and self.slot_copy is None:
            return
        begins = np.zeros_like(ends) if begins is None else begins
        if self._table_copy is not None:
            self._table_copy.send(rows, begins, ends)
        if self.slot_copy is not None:
            where = changed_places(self.columns.address, rows, begins, ends)
            copy, pages = self.slot_copy.view(-1, self.page_size), self.page_table.view(-1)
            if copy.is_cpu:
                copy.numpy()[where] = self.slots_of(torch.from_numpy(pages.numpy()[where])).numpy()
            else:
                places = torch.from_numpy(where).to(self.kv_device)
                copy[places] = self.slots_of(pages[places])

    def copy_rows(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self._changed(rows, None, lengths)

    # Places, tokens and pages of rows

    def places(self, rows: np.ndarray, lengths: np.ndarray) -> Places:
        return Places(torch.from_numpy(lengths.astype(np.int32)), torch.from_numpy(self._handles[rows]))

    def set_places(self, rows: np.ndarray, places: Places) -> None:
        self._handles[rows] = places.handles.numpy()

    def write_cached(self, places: Places, rows: np.ndarray) -> None:
        lengths = places.lengths.numpy()
        self._index.write_pages(self.columns.address, places.handles.numpy(), lengths, rows)
        self._changed(rows, None, lengths.astype(np.int64))

    def copy(self, source: int, rows: np.ndarray, begin: int, end: int) -> None:
        first, last = begin // self.page_size, end // self.page_size
        self._pages[rows, first:last] = self._pages[source, first:last]
        self._changed(rows, np.full(len(rows), begin), np.full(len(rows), end))

    def copy_tokens(self, source: int, rows: np.ndarray) -> None:
        self._tokens[rows] = self._tokens[source]

    def own_tokens(self, row: int, begin: int, end: int) -> np.ndarray:
        return self._tokens[row, begin:end].copy()

    def store_tokens(self, rows: np.ndarray, begins: np.ndarray, tokens: Batch) -> tuple[int, int]:
        query, position = cpu.store_tokens(
            self._tokens_at, self._most_known, rows, begins, tokens.addresses, tokens.wide, tokens.counts, _NO_ROWS
        )
        return int(query), int(position)

    def tokens(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Batch:
        addresses = self._tokens_at + 4 * (rows * self._most_known + begins)
        return Batch(addresses, ends - begins, False, self._tokens)

    # The whole

    def free_list(self) -> np.ndarray:
        return self._stack[: self.free_pages].astype(np.int64)

    def set_free(self, pages: np.ndarray) -> None:
        self.columns.counts[running.FREE_PAGES] = 0
        self._stack[: len(pages)] = pages
        self.columns.counts[running.FREE_PAGES] = len(pages)

    def on_host(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._pages[rows]
        return found
