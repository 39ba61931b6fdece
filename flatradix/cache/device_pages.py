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


def before_each(counts: np.ndarray) -> np.ndarray:
    """Return the sum of the counts before each, int64 [B]."""
    before: np.ndarray = np.cumsum(counts) - counts
    return before


def ranges_of(begins: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the description of ranges that `gpu.copy_ranges` reads, int64 [3, B]."""
    ends = np.cumsum(counts)
    before = ends - counts
    return np.stack([ends, begins - before, targets - before])


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
        self.prompt_device = device = index.device
        self._arrays = gpu.no_arrays(device)
        self.page_table = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(rows, self._most_known, dtype=torch.int32, device=device)
        self._stack = torch.empty(num_pages, dtype=torch.int32, device=device)
        self._handles = torch.zeros(rows, dtype=torch.int64, device=device)
        self.within = torch.arange(self.page_size, dtype=torch.int32, device=device)
        self.slot_copy = None
        self._pending: deque[_Pending] = deque()
        self.reset()

    def _send(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Bring int64 arrays to the device in one copy, each [K] or [3, K]; return them, each [K] or [3 * K]."""
        sizes = [array.size for array in arrays]
        device = self._index.device
        packed = torch.empty(sum(sizes), dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        np.concatenate([array.reshape(-1) for array in arrays], out=packed.numpy())
        return list(packed.to(device, non_blocking=True).split(sizes))

    def _copy_ranges(self, source: torch.Tensor, target: torch.Tensor, ranges: torch.Tensor, total: int) -> None:
        """Copy ranges, as `ranges_of` describes them, on the device, of so many elements in all, in one launch."""
        if total:
            addresses = source.data_ptr(), source.dtype == torch.int64, target.data_ptr(), target.dtype == torch.int64
            gpu.copy_ranges(self._arrays, ranges.data_ptr(), len(ranges) // 3, total, *addresses)

    def _copy(
        self, source: torch.Tensor, begins: np.ndarray, target: torch.Tensor, targets: np.ndarray, counts: np.ndarray
    ) -> None:
        """Copy `counts` elements from each of `begins` in one tensor to each of `targets` in another."""
        total = int(counts.sum())
        if total:
            (ranges,) = self._send(ranges_of(begins, targets, counts))
            self._copy_ranges(source, target, ranges, total)

    def _columns(self, rows: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Return where columns, in pages, lie in the page table."""
        return rows * self.page_table.shape[1] + begins

    def _table_ranges(self, rows: np.ndarray, begins: np.ndarray, counts: np.ndarray, taken: bool) -> np.ndarray:
        """Return the ranges of `counts` pages from a list to the page table if `taken`, else from there to a list."""
        table, places = self._columns(rows, begins), before_each(counts)
        return ranges_of(places, table, counts) if taken else ranges_of(table, places, counts)

    # Begin

    def keys(self, prompts: Prompts) -> list[np.ndarray]:
        return [prompts.array(query)[:-1] for query in range(len(prompts))]

    def find(self, tree: RadixTree, prompts: Prompts, chunk: int) -> Found:
        if prompts.on_device is None:
            place = tree.match(self.keys(prompts), prompts.names, touch=False, lock=True)
        else:
            place = self._index.lock_prompts(prompts.on_device, prompts.names)
        cached = place.host_lengths.numpy().astype(np.int64)
        tree.raise_pending()
        return self.plan(Found(place, cached, cached, 0), prompts, cached, chunk)

    def unlock(self, tree: RadixTree, found: Found) -> None:
        tree.unlock(found.place)

    def admit(self, prompts: Prompts, place: Places, grant: Grant) -> None:
        rows, cached, begins, lengths = grant
        first, counts = self._new_pages(begins, lengths)
        taken, store = self._table_ranges(rows, first, counts, True), np.empty((3, 0), np.int64)
        if prompts.on_device is None:
            self._stage_prompts(rows, prompts.tokens, cached)
        else:
            store = ranges_of(
                before_each(prompts.counts) + cached, rows * self._most_known + cached, prompts.counts - cached
            )  # fmt: skip
        where, taken_there, stored = self._send(rows, taken, store)
        if prompts.on_device is not None:
            self._copy_ranges(prompts.on_device.values, self._tokens, stored, int(store[0, -1]))
        self._index.write_pages(place, self.page_table, where)
        self._handles.index_copy_(0, where, place.handles)
        self._take(int(counts.sum()), taken_there)
        self._changed(where)
        cpu.start_requests(self.columns.address, rows, prompts.counts, lengths, cached, begins, prompts.priorities)

    # Commit

    def commit(self, tree: RadixTree, rows: np.ndarray, known: np.ndarray, ends: np.ndarray) -> np.ndarray:
        columns, page = self.columns, self.page_size
        chosen = np.empty((4, len(rows)), np.int64)
        count = cpu.begin_commit(columns.address, rows, known, ends, chosen)
        rows, begins, ends, owned = chosen[:, :count]
        if count == 0:
            return rows
        tokens, first, own = ends - begins, owned // page, np.maximum(ends - owned, 0) // page
        where, held, offsets, of_tokens, of_pages, of_own = self._send(
            rows,
            begins,
            np.append(0, np.cumsum(tokens)),
            self._row_ranges(rows, begins, tokens),
            self._table_ranges(rows, begins // page, tokens // page, False),
            self._table_ranges(rows, first, own, False),
        )
        total, brought = int(tokens.sum()), self._empty(int(own.sum()))
        values, pages = self._empty(total), self._empty(total // page)
        self._copy_ranges(self._tokens, values, of_tokens, total)
        self._copy_ranges(self.page_table, pages, of_pages, total // page)
        self._copy_ranges(self.page_table, brought, of_own, len(brought))
        keys, slots = Ragged.trusted(values, offsets), Ragged.trusted(self.slots_of(pages).view(-1), offsets)
        before = Places(held.to(torch.int32), self._handles[where])
        names, priorities, counted = columns.names_of(rows), columns.priority[rows], columns.counted[rows]
        result = tree.insert(keys, slots, names, priorities, before, counted)
        tree.lock(result)
        self._handles.index_copy_(0, where, result.handles)
        cpu.end_commit(columns.address, rows, ends)
        tree.unlock(before)
        self._index.write_pages(result, self.page_table, where)
        self._changed(where)
        self._pending.append(_Pending(result, owned, brought, own))
        if len(self._pending) > _MOST_PENDING:
            self.give_back_duplicates()
        return rows

    def _empty(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32, device=self._index.device)

    def _row_ranges(self, rows: np.ndarray, begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the ranges of `counts` tokens of each row, from `begins` on, to a list."""
        return ranges_of(rows * self._most_known + begins, before_each(counts), counts)

    def give_back_duplicates(self) -> None:
        while self._pending:
            result, owned, brought, counts = self._pending[0]
            prefixes = np.array(result.prefix_lengths.tolist(), np.int64)
            self._pending.popleft()
            given = np.minimum(np.maximum(prefixes - owned, 0) // self.page_size, counts)
            self._push(brought, np.cumsum(counts) - counts, given)
            self.columns.counts[running.DUPLICATE_TOKENS] += int(given.sum()) * self.page_size

    # Grow and end

    def _new_pages(self, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first page, and how many, that tokens `begins` to `ends` need behind the page of `begins`."""
        first = -(-begins // self.page_size)
        return first, -(-ends // self.page_size) - first

    def take(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        first, counts = self._new_pages(begins, ends)
        where, taken = self._send(rows, self._table_ranges(rows, first, counts, True))
        self._take(int(counts.sum()), taken)
        self._changed(where)

    def _take(self, total: int, ranges: torch.Tensor) -> None:
        """Move free pages to the ranges of the page table."""
        free = self.free_pages
        self.ensure_free(total * self.page_size)
        self._copy_ranges(self._stack[free - total : free].flip(0), self.page_table, ranges, total)
        self.columns.counts[running.FREE_PAGES] = free - total  # last: the steps above may run out of memory

    def _push(self, source: torch.Tensor, begins: np.ndarray, counts: np.ndarray) -> None:
        """Put pages back on the stack."""
        total, free = int(counts.sum()), self.free_pages
        self.ensure_out(total)
        self._copy(source, begins, self._stack, free + np.cumsum(counts) - counts, counts)
        self.columns.counts[running.FREE_PAGES] = free + total

    def give_evicted(self, evicted: EvictResult) -> None:
        first, free = evicted.slots[:: self.page_size], self.free_pages
        self.ensure_out(len(first))
        pages = self._stack[free : free + len(first)]
        torch.div(first, self.page_size, rounding_mode="floor", out=pages)  # allocates no memory: no slot is lost
        self.columns.counts[running.FREE_PAGES] = free + len(first)

    def release(self, tree: RadixTree, rows: np.ndarray, begins: np.ndarray | None) -> None:
        columns, page, free = self.columns, self.page_size, self.free_pages
        held, lengths = columns.committed[rows], columns.length[rows]
        begins = (np.maximum(held, columns.borrowed[rows]) if begins is None else begins) // page
        counts = np.maximum(-(-lengths // page) - begins, 0)
        total = int(counts.sum())
        self.ensure_out(total)
        targets = free + before_each(counts)
        where, paths, given = self._send(rows, held, ranges_of(self._columns(rows, begins), targets, counts))
        tree.unlock(Places(paths.to(torch.int32), self._handles[where]))
        cpu.end_requests(columns.address, rows)
        self._copy_ranges(self.page_table, self._stack, given, total)
        self.columns.counts[running.FREE_PAGES] = free + total

    # Pages of rows

    def write_cached(self, places: Places, rows: np.ndarray) -> None:
        if len(rows):
            where = upload_numbers(rows, self._index.device)
            self._index.write_pages(places, self.page_table, where)
            self._changed(where)

    def copy(self, source: int, rows: np.ndarray, begin: int, end: int) -> None:
        first, count = begin // self.page_size, np.full(len(rows), (end - begin) // self.page_size)
        origin = self._columns(np.full(len(rows), source), np.full(len(rows), first))
        self._copy(self.page_table, origin, self.page_table, self._columns(rows, np.full(len(rows), first)), count)
        self.copy_rows(rows, count)

    def copy_rows(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        self._changed(upload_numbers(rows, self._index.device))

    # The table of slots

    def _changed(self, where: torch.Tensor) -> None:
        """Let the table of slots follow the page table in some rows, int64 on the device."""
        if self.slot_copy is not None and self.page_size > 1:
            self.slot_copy[where] = self.slots_of(self.page_table[where]).view(len(where), -1)

    # Tokens

    def _stage_prompts(self, rows: np.ndarray, tokens: Batch, skips: np.ndarray) -> None:
        query, position = self._stage_tokens(rows, skips, tokens, skips)
        if query >= 0:
            refuse_token(tokens, query, position)

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

    def tokens(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Ragged:
        counts = ends - begins
        ranges, offsets = self._send(self._row_ranges(rows, begins, counts), np.append(0, np.cumsum(counts)))
        out = self._empty(int(counts.sum()))
        self._copy_ranges(self._tokens, out, ranges, len(out))
        return Ragged.trusted(out, offsets)

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
