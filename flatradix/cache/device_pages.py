"""DevicePages: the pages and tokens of a cache whose index is on a GPU, beside the index. Nothing visits the host."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from flatradix.cache.columns import Columns
from flatradix.cache.input import Prompts, refuse_token
from flatradix.cache.pages import Found, Grant, Pages
from flatradix.device.index import DeviceIndex
from flatradix.inputs.ragged import Ragged
from flatradix.inputs.sequences import Batch, address_of
from flatradix.inputs.upload import upload, upload_numbers
from flatradix.kernels import cpu, gpu
from flatradix.layout import running
from flatradix.results import EvictResult, InsertResult, Places
from flatradix.tree import RadixTree

_MOST_PENDING = 64


class _Pending(NamedTuple):
    """A commit for which the host does not know yet how many of its tokens were cached before.

    owned: tokens before which pages were not the request's own, int64 [B]. pages: those that each request brought from
    there on, one after the other; counts: how many.
    """

    result: InsertResult
    owned: np.ndarray
    pages: torch.Tensor
    counts: np.ndarray


class DevicePages(Pages):
    """Tables, tokens, places and free pages as tensors on the device; each method enqueues a few launches.

    The host knows how many pages are free, but not which.
    """

    def __init__(self, index: DeviceIndex, num_pages: int, columns: Columns) -> None:
        self.columns, counts = columns, columns.counts
        columns.complete()
        rows, width, self._most_known = counts[running.ROWS], counts[running.WIDTH], counts[running.MOST_KNOWN]
        self.page_size, self.num_pages = counts[running.PAGE], num_pages
        self._index = index
        device = index.device
        self._arrays = gpu.no_arrays(device)
        self.page_table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(rows, self._most_known, dtype=torch.int32, device=device)
        self._stack = torch.empty(num_pages, dtype=torch.int32, device=device)
        self._handles = torch.zeros(rows, dtype=torch.int64, device=device)
        self.within = torch.arange(self.page_size, dtype=torch.int32, device=device)
        self.slot_copy = None
        self._pending: deque[_Pending] = deque()
        self.reset()

    def _copy(
        self, source: torch.Tensor, begins: np.ndarray, target: torch.Tensor, targets: np.ndarray, counts: np.ndarray
    ) -> None:
        """Copy `counts` elements from each of `begins` in one tensor to each of `targets` in another, in one launch."""
        total = int(counts.sum())
        if total == 0:
            return
        ends = np.cumsum(counts)
        ranges = upload_numbers(
            np.stack([ends, begins - (ends - counts), targets - (ends - counts)]), self._index.device
        )
        addresses = source.data_ptr(), source.dtype == torch.int64, target.data_ptr(), target.dtype == torch.int64
        gpu.copy_ranges(self._arrays, ranges.data_ptr(), len(counts), total, *addresses)

    def _columns(self, rows: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Return where columns, in pages, lie in the page table."""
        return rows * self.page_table.shape[1] + begins

    # Begin

    def find(self, tree: RadixTree, prompts: Prompts, chunk: int) -> Found:
        if prompts.on_device is None:
            keys = [prompts.array(query)[:-1] for query in range(len(prompts))]
            place: Places = tree.match(keys, prompts.names, touch=False, lock=True)
            cached = np.array(place.lengths.tolist(), np.int64)
        else:
            place, cached = self._find_on_device(tree, prompts, prompts.on_device)
        return self.plan(Found(place, cached, cached, 0), prompts, cached, chunk)

    def _find_on_device(self, tree: RadixTree, prompts: Prompts, ragged: Ragged) -> tuple[Places, np.ndarray]:
        """Match whole prompts, cut the places back to what is cached of each without its last token, and lock."""
        places: Places = tree.match(ragged, prompts.names, touch=False)
        lengths = np.array(places.lengths.tolist(), np.int64)
        tree.raise_pending()
        most = (prompts.counts - 1) // self.page_size * self.page_size
        if (lengths > most).any():
            lengths = np.minimum(lengths, most)
            places = Places(upload(torch.from_numpy(lengths.astype(np.int32)), tree.device), places.handles)
        tree.lock(places)
        return places, lengths

    def unlock(self, tree: RadixTree, found: Found) -> None:
        tree.unlock(found.place)

    def admit(self, prompts: Prompts, place: Places, grant: Grant) -> None:
        rows, cached, begins, lengths = grant
        self._store_prompts(rows, prompts, cached)
        self.write_cached(place, rows)
        self.set_places(rows, place)
        self.take(rows, begins, lengths)
        cpu.start_requests(self.columns.address, rows, prompts.counts, lengths, cached, begins, prompts.priorities)

    # Commit

    def commit(self, tree: RadixTree, rows: np.ndarray, known: np.ndarray, ends: np.ndarray) -> np.ndarray:
        columns = self.columns
        chosen = np.empty((4, len(rows)), np.int64)
        count = cpu.begin_commit(columns.address, rows, known, ends, chosen)
        rows, begins, ends, owned = chosen[:, :count]
        if count == 0:
            return rows
        before = self.places(rows, begins)
        result = tree.insert(
            self.tokens(rows, begins, ends), self._slots(rows, begins, ends), columns.names_of(rows),
            columns.priority[rows], before, columns.counted[rows],
        )  # fmt: skip
        tree.lock(result)
        self.set_places(rows, result)
        cpu.end_commit(columns.address, rows, ends)
        tree.unlock(before)
        self._replace(result, rows, owned, ends)
        return rows

    def _replace(self, result: InsertResult, rows: np.ndarray, owned: np.ndarray, ends: np.ndarray) -> None:
        """Let rows have the tree's pages. Keep those that they brought from `owned` on until the host can read more."""
        first, counts = owned // self.page_size, np.maximum(ends - owned, 0) // self.page_size
        brought = torch.empty(int(counts.sum()), dtype=torch.int32, device=self._index.device)
        self._copy(self.page_table, self._columns(rows, first), brought, np.cumsum(counts) - counts, counts)
        self.write_cached(result, rows)
        self._pending.append(_Pending(result, owned, brought, counts))
        if len(self._pending) > _MOST_PENDING:
            self.give_back_duplicates()

    def give_back_duplicates(self) -> None:
        while self._pending:
            result, owned, brought, counts = self._pending[0]
            prefixes = np.array(result.prefix_lengths.tolist(), np.int64)
            self._pending.popleft()
            given = np.minimum(np.maximum(prefixes - owned, 0) // self.page_size, counts)
            self._push(brought, np.cumsum(counts) - counts, given)
            self.columns.counts[running.DUPLICATE_TOKENS] += int(given.sum()) * self.page_size

    # Grow and end

    def take(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        begins, ends = -(-begins // self.page_size), -(-ends // self.page_size)
        counts, free = ends - begins, self.free_pages
        total = int(counts.sum())
        self.ensure_free(total * self.page_size)
        taken = self._stack[free - total : free].flip(0)
        self._copy(taken, np.cumsum(counts) - counts, self.page_table, self._columns(rows, begins), counts)
        self._changed(rows)
        self.columns.counts[running.FREE_PAGES] = free - total  # last: the steps above may run out of memory

    def _push(self, source: torch.Tensor, begins: np.ndarray, counts: np.ndarray) -> None:
        """Put pages back on the stack."""
        total, free = int(counts.sum()), self.free_pages
        if free + total > self.num_pages:
            raise RuntimeError(f"{total} pages came back, but only {self.num_pages - free} were out")
        self._copy(source, begins, self._stack, free + np.cumsum(counts) - counts, counts)
        self.columns.counts[running.FREE_PAGES] = free + total

    def give_evicted(self, evicted: EvictResult) -> None:
        first, free = evicted.slots[:: self.page_size], self.free_pages
        pages = self._stack[free : free + len(first)]
        if len(pages) < len(first):
            raise RuntimeError(f"{len(first)} pages came back, but only {len(pages)} were out")
        torch.div(first, self.page_size, rounding_mode="floor", out=pages)  # allocates no memory: no slot is lost
        self.columns.counts[running.FREE_PAGES] = free + len(first)

    def release(self, tree: RadixTree, rows: np.ndarray, begins: np.ndarray | None) -> None:
        columns, page = self.columns, self.page_size
        held, lengths = columns.committed[rows], columns.length[rows]
        begins = (np.maximum(held, columns.borrowed[rows]) if begins is None else begins) // page
        tree.unlock(self.places(rows, held))
        cpu.end_requests(columns.address, rows)
        self._push(self.page_table, self._columns(rows, begins), np.maximum(-(-lengths // page) - begins, 0))

    # Pages of rows

    def write_cached(self, places: Places, rows: np.ndarray) -> None:
        if len(rows):
            self._index.write_pages(places, self.page_table, rows)
            self._changed(rows)

    def copy(self, source: int, rows: np.ndarray, begin: int, end: int) -> None:
        first, count = begin // self.page_size, np.full(len(rows), (end - begin) // self.page_size)
        origin = self._columns(np.full(len(rows), source), np.full(len(rows), first))
        self._copy(self.page_table, origin, self.page_table, self._columns(rows, np.full(len(rows), first)), count)
        self._changed(rows)

    def copy_rows(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self._changed(rows)

    # The table of slots

    def _changed(self, rows: np.ndarray) -> None:
        if self.slot_copy is not None and self.page_size > 1:
            where = upload_numbers(rows, self._index.device)
            self.slot_copy[where] = self.slots_of(self.page_table[where]).view(len(rows), -1)

    # Tokens

    def _store_prompts(self, rows: np.ndarray, prompts: Prompts, skips: np.ndarray) -> None:
        ragged = prompts.on_device
        if ragged is None:
            query, position = self._stage_tokens(rows, skips, prompts.tokens, skips)
            if query >= 0:
                refuse_token(prompts.tokens, query, position)
            return
        begins = np.cumsum(prompts.counts) - prompts.counts + skips
        self._copy(ragged.values, begins, self._tokens, rows * self._most_known + skips, prompts.counts - skips)

    def store_tokens(self, rows: np.ndarray, begins: np.ndarray, tokens: Batch) -> tuple[int, int]:
        return self._stage_tokens(rows, begins, tokens, np.zeros_like(rows))

    def _stage_tokens(self, rows: np.ndarray, begins: np.ndarray, tokens: Batch, skips: np.ndarray) -> tuple[int, int]:
        """Do what `store_tokens` does, without the first `skips` tokens of each query."""
        counts = tokens.counts - skips
        offsets = np.cumsum(counts) - counts
        staged = np.empty(int(counts.sum()), np.int32)
        query, position = cpu.store_tokens(
            address_of(staged), 0, rows, offsets, tokens.addresses, tokens.wide, tokens.counts, skips
        )
        if query < 0 and len(staged):
            values = upload(torch.from_numpy(staged), self._index.device)
            self._copy(values, offsets, self._tokens, rows * self._most_known + begins, counts)
        return int(query), int(position)

    def _ragged(self, values: torch.Tensor, counts: np.ndarray) -> Ragged:
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        return Ragged.trusted(values, upload_numbers(offsets, self._index.device))

    def tokens(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Ragged:
        counts = ends - begins
        out = torch.empty(int(counts.sum()), dtype=torch.int32, device=self._index.device)
        self._copy(self._tokens, rows * self._most_known + begins, out, np.cumsum(counts) - counts, counts)
        return self._ragged(out, counts)

    def _slots(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Ragged:
        """Return the slots of each row from `begins` to `ends`, whole pages, as slots for an insert."""
        counts = (ends - begins) // self.page_size
        pages = torch.empty(int(counts.sum()), dtype=torch.int32, device=self._index.device)
        first = self._columns(rows, begins // self.page_size)
        self._copy(self.page_table, first, pages, np.cumsum(counts) - counts, counts)
        return self._ragged(self.slots_of(pages).view(-1), ends - begins)

    def copy_tokens(self, source: int, rows: np.ndarray) -> None:
        self._tokens[upload_numbers(rows, self._index.device)] = self._tokens[source].clone()

    def own_tokens(self, row: int, begin: int, end: int) -> np.ndarray:
        found: np.ndarray = self._tokens[row, begin:end].cpu().numpy()
        return found

    # Places

    def set_places(self, rows: np.ndarray, places: Places) -> None:
        self._handles[upload_numbers(rows, self._index.device)] = places.handles

    def places(self, rows: np.ndarray, lengths: np.ndarray) -> Places:
        device = self._index.device
        handles = self._handles[upload_numbers(rows, device)]
        return Places(upload(torch.from_numpy(lengths.astype(np.int32)), device), handles)

    # The whole

    def free_list(self) -> np.ndarray:
        return self._stack[: self.free_pages].cpu().numpy().astype(np.int64)

    def set_free(self, pages: np.ndarray) -> None:
        stack = self._stack.clone()
        stack[: len(pages)] = upload_numbers(pages, self._index.device)
        self._pending.clear()
        self.columns.counts[running.FREE_PAGES] = 0
        self._stack = stack
        self.columns.counts[running.FREE_PAGES] = len(pages)

    def on_host(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.page_table.cpu().numpy()[rows]
        return found
