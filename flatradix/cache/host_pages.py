"""HostPages: the pages of a cache whose index is in host memory. A KV cache on a GPU gets copies of changes."""

from __future__ import annotations

import numpy as np
import torch

from flatradix.cache.columns import Columns
from flatradix.cache.input import Prompts, refuse_token
from flatradix.cache.pages import Inserted, Pages
from flatradix.host.index import HostIndex, PageRanges
from flatradix.inputs.sequences import Batch, address_of
from flatradix.inputs.upload import upload
from flatradix.kernels import cpu
from flatradix.results import EvictResult, Places
from flatradix.tree import RadixTree


class HostPages(Pages):
    """Everything is kept in host memory, where kernels work on it without a GPU.

    If the KV cache is elsewhere, its tables are copies: each call enqueues one copy of the pages that it changed.
    """

    def __init__(
        self, index: HostIndex, num_pages: int, page_size: int, rows: int, length: int, kv: torch.device, apart: bool
    ) -> None:
        """length: tokens of a row, whole pages. apart: whether the tables of the KV cache are copies."""
        self.page_size, self.num_pages = page_size, num_pages
        self._index = index
        self.most_tokens = length + page_size  # what was generated last has no slot
        self._pages = np.zeros((rows, length // page_size), np.int32)
        self._tokens = np.empty((rows, self.most_tokens), np.int32)
        self._tokens_at = address_of(self._tokens)
        self._stack = np.empty(num_pages, np.int32)
        self._handles = np.zeros(rows, np.int64)
        self.slot_copy = None
        self._apart = apart
        self.page_table = torch.from_numpy(self._pages)
        if apart:
            self.page_table = torch.zeros(self._pages.shape, dtype=torch.int32, device=kv)
        self.within = torch.arange(page_size, dtype=torch.int32, device=kv)
        self.reset()

    # Pages

    def take(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        begins, ends = begins // self.page_size, ends // self.page_size
        count = int((ends - begins).sum())
        if count > self.free_pages:
            raise RuntimeError(f"slots were lost: {count} pages should be free, but {self.free_pages} are")
        if count:
            self.free_pages = cpu.take_pages(self._stack, self.free_pages, self._pages, rows, begins, ends)
            self._changed(rows, begins, ends)

    def give(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        begins, ends = begins // self.page_size, ends // self.page_size
        self._ensure_out(int((ends - begins).sum()))
        self.free_pages = cpu.give_pages(self._stack, self.free_pages, self._pages, rows, begins, ends)

    def give_evicted(self, evicted: EvictResult) -> None:
        slots = evicted.slots.numpy()
        self._ensure_out(len(slots) // self.page_size)
        self.free_pages = cpu.give_slots(self._stack, self.free_pages, slots, self.page_size)

    def _ensure_out(self, count: int) -> None:
        if self.free_pages + count > self.num_pages:
            raise RuntimeError(f"{count} pages came back, but only {self.num_pages - self.free_pages} were out")

    def write_cached(self, places: Places, rows: np.ndarray) -> None:
        lengths = places.lengths.numpy()
        if not lengths.any():
            return
        self._index.write_pages(places.handles.numpy(), lengths, self._pages, rows)
        self._changed(rows, np.zeros_like(rows), lengths.astype(np.int64) // self.page_size)

    def grow(self, columns: Columns, rows: np.ndarray, more: np.ndarray) -> bool:
        chosen = np.empty((3, len(rows)), np.int64)
        self.free_pages, count = cpu.grow(
            columns.data, rows, more, self.page_size, self._stack, self.free_pages, self._pages, chosen
        )
        if count > 0:
            self._changed(*chosen[:, :count])
        return bool(count >= 0)

    def insert(
        self, tree: RadixTree, columns: Columns, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> Inserted:
        index, before = self._index, self.held(rows, begins)
        found = index.insert_arrays(
            self.tokens(rows, begins, ends), self.slots(rows, begins, ends), columns.names_of(rows),
            (columns.priority[rows], columns.counted[rows]), (before[0], begins),
        )  # fmt: skip
        _prefixes, lengths, handles = found
        index.lock_arrays(handles, lengths)
        self._handles[rows] = handles
        return Inserted(found, before, ends)

    def replace(self, found: Inserted, rows: np.ndarray, begins: np.ndarray, owned: np.ndarray) -> np.ndarray | None:
        prefixes, lengths, handles = found.result
        other: np.ndarray = prefixes > begins
        if other.any():
            page = self.page_size
            ranges = PageRanges(begins // page, owned // page, np.maximum(prefixes, begins) // page)
            self._ensure_out(int((ranges.ends - np.maximum(ranges.begins, ranges.owned)).clip(0).sum()))
            before = self.free_pages
            self.free_pages = self._index.replace_pages(
                handles, lengths, self._pages, rows, ranges, self._stack, before
            )
            self.duplicates += (self.free_pages - before) * page
            self._changed(rows, ranges.begins, ranges.ends)
        return other

    def held(self, rows: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._handles[rows], lengths.astype(np.int32)

    def unlock(self, tree: RadixTree, places: tuple[np.ndarray, np.ndarray]) -> None:
        self._index.unlock_arrays(*places)

    def give_back_duplicates(self) -> None:
        return

    def copy(self, source: int, rows: np.ndarray, begin: int, end: int) -> None:
        first, last = begin // self.page_size, end // self.page_size
        self._pages[rows, first:last] = self._pages[source, first:last]
        self._changed(rows, np.full(len(rows), first), np.full(len(rows), last))

    def copy_rows(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self._changed(rows, np.zeros_like(rows), -(-lengths // self.page_size))

    # Copies for the KV cache

    def _changed(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        """Copy columns of some rows, in pages, to the tables of the KV cache."""
        if not self._apart and self.slot_copy is None:
            return
        counts = ends - begins
        total = int(counts.sum())
        if total == 0:
            return
        shifts = rows * self._pages.shape[1] + begins - (np.cumsum(counts) - counts)
        places = np.repeat(shifts, counts) + np.arange(total)
        packed = np.stack([places.astype(np.int32), self._pages.reshape(-1)[places]])
        where, pages = upload(torch.from_numpy(packed), self.kv_device)
        where = where.to(torch.int64)
        if self._apart:
            self.page_table.view(-1)[where] = pages
        if self.slot_copy is not None:
            self.slot_copy.view(-1, self.page_size)[where] = self.slots_of(pages)

    # Tokens

    def find_cached(self, tree: RadixTree, prompts: Prompts, lock: bool) -> tuple[Places, np.ndarray]:
        match = tree.match(prompts.keys(), prompts.names, touch=False, lock=lock)
        return match, match.lengths.numpy().astype(np.int64)

    def store_prompts(self, rows: np.ndarray, prompts: Prompts, skips: np.ndarray) -> None:
        query, position = self.store_tokens(rows, skips, prompts.tokens, skips)
        if query >= 0:
            refuse_token(prompts.tokens, query, position)

    def copy_tokens(self, source: int, rows: np.ndarray) -> None:
        self._tokens[rows] = self._tokens[source]

    def own_tokens(self, row: int, begin: int, end: int) -> np.ndarray:
        return self._tokens[row, begin:end].copy()

    def store_tokens(self, rows: np.ndarray, begins: np.ndarray, tokens: Batch, skips: np.ndarray) -> tuple[int, int]:
        query, position = cpu.store_tokens(
            self._tokens_at, self.most_tokens, rows, begins, tokens.addresses, tokens.wide, tokens.counts, skips
        )
        return int(query), int(position)

    def tokens(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Batch:
        addresses = self._tokens_at + 4 * (rows * self.most_tokens + begins)
        return Batch(addresses, ends - begins, False, self._tokens)

    def slots(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Batch:
        counts = ends - begins
        out = np.empty(int(counts.sum()), np.int32)
        page = self.page_size
        cpu.slots_of_pages(self._pages, page, rows, begins // page, ends // page, out)
        return Batch(address_of(out) + 4 * (np.cumsum(counts) - counts), counts, False, out)

    # Places

    def set_places(self, rows: np.ndarray, places: Places) -> None:
        self._handles[rows] = places.handles.numpy()

    def places(self, rows: np.ndarray, lengths: np.ndarray) -> Places:
        return Places(torch.from_numpy(lengths.astype(np.int32)), torch.from_numpy(self._handles[rows]))

    # The whole

    def free_list(self) -> np.ndarray:
        return self._stack[: self.free_pages].astype(np.int64)

    def set_free(self, pages: np.ndarray) -> None:
        self.free_pages = 0
        self._stack[: len(pages)] = pages
        self.free_pages = len(pages)

    def on_host(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._pages[rows]
        return found
