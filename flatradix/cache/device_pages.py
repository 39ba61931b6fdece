"""DevicePages: the pages and tokens of a cache whose index is on a GPU, beside the index. Nothing visits the host."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch

from flatradix.cache.columns import Columns
from flatradix.cache.input import Prompts, refuse_token
from flatradix.cache.pages import Inserted, Pages
from flatradix.device.index import DeviceIndex
from flatradix.inputs.ragged import Ragged
from flatradix.inputs.sequences import Batch, address_of
from flatradix.inputs.upload import upload, upload_numbers
from flatradix.kernels import cpu, gpu
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

    def __init__(self, index: DeviceIndex, num_pages: int, page_size: int, rows: int, length: int) -> None:
        """length: tokens of a row, whole pages."""
        self.page_size, self.num_pages = page_size, num_pages
        self._index = index
        self.most_tokens = length + page_size  # what was generated last has no slot
        device = index.device
        self._arrays = gpu.no_arrays(device)
        self.page_table = torch.zeros(rows, length // page_size, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(rows, self.most_tokens, dtype=torch.int32, device=device)
        self._stack = torch.empty(num_pages, dtype=torch.int32, device=device)
        self._handles = torch.zeros(rows, dtype=torch.int64, device=device)
        self.within = torch.arange(page_size, dtype=torch.int32, device=device)
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

    # Pages

    def take(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        begins, counts = begins // self.page_size, (ends - begins) // self.page_size
        total = int(counts.sum())
        left = self.free_pages - total
        if left < 0:
            raise RuntimeError(f"slots were lost: {total} pages should be free, but {self.free_pages} are")
        taken = self._stack[left : self.free_pages].flip(0)
        self._copy(taken, np.cumsum(counts) - counts, self.page_table, self._columns(rows, begins), counts)
        self._changed(rows)
        self.free_pages = left  # last: the steps above may run out of memory

    def give(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        begins, counts = begins // self.page_size, (ends - begins) // self.page_size
        self._push(self.page_table, self._columns(rows, begins), counts)

    def _push(self, source: torch.Tensor, begins: np.ndarray, counts: np.ndarray) -> None:
        """Put pages back on the stack."""
        total = int(counts.sum())
        if self.free_pages + total > self.num_pages:
            raise RuntimeError(f"{total} pages came back, but only {self.num_pages - self.free_pages} were out")
        self._copy(source, begins, self._stack, self.free_pages + np.cumsum(counts) - counts, counts)
        self.free_pages += total

    def give_evicted(self, evicted: EvictResult) -> None:
        first = evicted.slots[:: self.page_size]
        pages = self._stack[self.free_pages : self.free_pages + len(first)]
        if len(pages) < len(first):
            raise RuntimeError(f"{len(first)} pages came back, but only {len(pages)} were out")
        torch.div(first, self.page_size, rounding_mode="floor", out=pages)  # allocates no memory: no slot is lost
        self.free_pages += len(first)

    def write_cached(self, places: Places, rows: np.ndarray) -> None:
        if len(rows):
            self._index.write_pages(places, self.page_table, rows)
            self._changed(rows)

    def insert(
        self, tree: RadixTree, columns: Columns, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> Inserted:
        before = self.places(rows, begins)
        result = tree.insert(
            self.tokens(rows, begins, ends), self.slots(rows, begins, ends), columns.names_of(rows),
            columns.priority[rows], before, columns.counted[rows],
        )  # fmt: skip
        tree.lock(result)
        self.set_places(rows, result)
        return Inserted(result, before, ends)

    def replace(self, found: Inserted, rows: np.ndarray, begins: np.ndarray, owned: np.ndarray) -> np.ndarray | None:
        first, counts = owned // self.page_size, np.maximum(found.ends - owned, 0) // self.page_size
        brought = torch.empty(int(counts.sum()), dtype=torch.int32, device=self._index.device)
        self._copy(self.page_table, self._columns(rows, first), brought, np.cumsum(counts) - counts, counts)
        self.write_cached(found.result, rows)
        self._pending.append(_Pending(found.result, owned, brought, counts))
        if len(self._pending) > _MOST_PENDING:
            self.give_back_duplicates()
        return None

    def held(self, rows: np.ndarray, lengths: np.ndarray) -> Places:
        return self.places(rows, lengths)

    def unlock(self, tree: RadixTree, places: Places) -> None:
        tree.unlock(places)

    def give_back_duplicates(self) -> None:
        while self._pending:
            result, owned, brought, counts = self._pending[0]
            prefixes = np.array(result.prefix_lengths.tolist(), np.int64)
            self._pending.popleft()
            given = np.minimum(np.maximum(prefixes - owned, 0) // self.page_size, counts)
            self._push(brought, np.cumsum(counts) - counts, given)
            self.duplicates += int(given.sum()) * self.page_size

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

    def find_cached(self, tree: RadixTree, prompts: Prompts, lock: bool) -> tuple[Places, np.ndarray]:
        if prompts.on_device is not None:
            return self._find_on_device(tree, prompts, prompts.on_device, lock)
        keys = [prompts.array(query)[:-1] for query in range(len(prompts))]
        match = tree.match(keys, prompts.names, touch=False, lock=lock)
        return match, np.array(match.lengths.tolist(), np.int64)

    def _find_on_device(
        self, tree: RadixTree, prompts: Prompts, ragged: Ragged, lock: bool
    ) -> tuple[Places, np.ndarray]:
        """Match whole prompts, then cut the places back to what is cached of each without its last token."""
        places: Places = tree.match(ragged, prompts.names, touch=False)
        lengths = np.array(places.lengths.tolist(), np.int64)
        tree.raise_pending()
        most = (prompts.counts - 1) // self.page_size * self.page_size
        if (lengths > most).any():
            lengths = np.minimum(lengths, most)
            places = Places(upload(torch.from_numpy(lengths.astype(np.int32)), tree.device), places.handles)
        if lock:
            tree.lock(places)
        return places, lengths

    def store_prompts(self, rows: np.ndarray, prompts: Prompts, skips: np.ndarray) -> None:
        ragged = prompts.on_device
        if ragged is None:
            query, position = self.store_tokens(rows, skips, prompts.tokens, skips)
            if query >= 0:
                refuse_token(prompts.tokens, query, position)
            return
        begins = np.cumsum(prompts.counts) - prompts.counts + skips
        self._copy(ragged.values, begins, self._tokens, rows * self.most_tokens + skips, prompts.counts - skips)

    def store_tokens(self, rows: np.ndarray, begins: np.ndarray, tokens: Batch, skips: np.ndarray) -> tuple[int, int]:
        counts = tokens.counts - skips
        offsets = np.cumsum(counts) - counts
        staged = np.empty(int(counts.sum()), np.int32)
        query, position = cpu.store_tokens(
            address_of(staged), 0, rows, offsets, tokens.addresses, tokens.wide, tokens.counts, skips
        )
        if query < 0 and len(staged):
            values = upload(torch.from_numpy(staged), self._index.device)
            self._copy(values, offsets, self._tokens, rows * self.most_tokens + begins, counts)
        return int(query), int(position)

    def _ragged(self, values: torch.Tensor, counts: np.ndarray) -> Ragged:
        offsets = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=offsets[1:])
        return Ragged.trusted(values, upload_numbers(offsets, self._index.device))

    def tokens(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Ragged:
        counts = ends - begins
        out = torch.empty(int(counts.sum()), dtype=torch.int32, device=self._index.device)
        self._copy(self._tokens, rows * self.most_tokens + begins, out, np.cumsum(counts) - counts, counts)
        return self._ragged(out, counts)

    def slots(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Ragged:
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
        self.free_pages = 0
        self._stack = stack
        self.free_pages = len(pages)

    def on_host(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = self.page_table.cpu().numpy()[rows]
        return found
