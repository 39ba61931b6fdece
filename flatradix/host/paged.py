"""PagedIndex: the index of a PrefixCache in host memory. It keeps the number of each page instead of its slots."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import numpy as np
import torch

from flatradix.errors import QueryError
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.host.core import NOTHING_TO_UNDO
from flatradix.host.index import HostIndex
from flatradix.host.slots import EvictionMemory, SlotBatch, SlotPool
from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.options import Options
from flatradix.inputs.ragged import Ragged, read_batch
from flatradix.inputs.refuse import refuse_slot
from flatradix.inputs.sequences import Batch, Buffer, address_of, read_one
from flatradix.kernels import cpu
from flatradix.layout import numbers, reasons
from flatradix.layout.state import pool_units

MAX_SLOT = 2**31 - 1
_NO_CODES = np.empty(0, np.int64)


class PageEvictionMemory(EvictionMemory):
    def __init__(self, pool: PageSlots, before: torch.Tensor | None, most: int, most_ranges: int) -> None:
        self.starts, self.lengths = np.empty((2, most_ranges), np.int32)
        self._pool = pool
        self._before = before
        self._pages = np.empty(most // pool.page_size, np.int32)

    def slots(self, tokens: int, ranges: int) -> torch.Tensor:
        pool = self._pool
        pages = self._pages[: tokens // pool.page_size]
        cpu.pages_of_ranges(address_of(pool.pages), self.starts, self.lengths, ranges, pool.page_size, pages)
        slots = pool.slots_of(pages)
        return torch.from_numpy(slots if self._before is None else np.concatenate([self._before.numpy(), slots]))


class PageSlots(SlotPool):
    """A slot pool that holds pages: page i has the slots i * page_size to (i + 1) * page_size - 1, int32.

    pages: int32, one for each page of the pools.
    """

    pool = 0
    wide = False
    limit = 0

    def __init__(self, units: int, page_size: int, addresses: int) -> None:
        self.page_size = page_size
        self.pages = np.zeros(-(-units // page_size), np.int32)
        self._addresses = addresses
        self._within = np.arange(page_size, dtype=np.int32)

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        """The slot of each unit, a copy."""
        return torch.from_numpy(self.slots_of(self.pages))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes

    def slots_of(self, pages: np.ndarray) -> np.ndarray:
        """Return the slots of pages, int32 [K * page_size]."""
        slots: np.ndarray = (pages[:, None] * np.int32(self.page_size) + self._within).reshape(-1)
        return slots

    def _pages_of(self, slots: np.ndarray, query: int) -> np.ndarray:
        """Return the pages of the slots of a query. Raises QueryError unless they are whole pages."""
        bad = np.flatnonzero((slots < 0) | (slots > MAX_SLOT))
        if len(bad):
            refuse_slot(int(slots[bad[0]]), query, int(bad[0]), torch.int32)
        whole = len(slots) // self.page_size * self.page_size
        pages = slots[: whole : self.page_size] // self.page_size
        other = np.flatnonzero(self.slots_of(pages.astype(np.int32)) != slots[:whole])
        if len(other):
            raise QueryError(
                f"slots of query {query}: {slots[other[0]]} at position {other[0]}: slots must be whole pages of "
                f"{self.page_size}, each from a multiple of {self.page_size} on",
                query,
            )
        return pages

    def read_one(self, slots: Any, check: bool) -> Buffer:
        found = read_one(slots, "slots")
        return 0, found[1], False, self._pages_of(np.asarray(found[3]), 0)

    def read(self, slots: Any, check: bool) -> SlotBatch:
        batch = read_batch(slots, "slots")
        if isinstance(slots, Ragged):
            parts = [slots[query].numpy() for query in range(len(slots))]
        else:
            parts = [np.asarray(buffer[3]) for buffer in batch.owner]
        pages = [self._pages_of(part, query) for query, part in enumerate(parts)]
        return SlotBatch(batch.addresses, batch.counts, False, pages)

    def _store(self, pages: np.ndarray, begin: int, end: int, start: int) -> None:
        page = self.page_size
        self.pages[start // page : (start + end - begin) // page] = pages[begin // page : end // page]

    def store_one(self, source: Buffer, begin: int, end: int, start: int) -> None:
        self._store(source[3], begin, end, start)

    def store(self, source: SlotBatch, begins: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> None:
        each = zip(source.owner, begins.tolist(), counts.tolist(), starts.tolist(), strict=True)
        for pages, begin, count, start in each:
            self._store(pages, begin, begin + count, start)

    def _pages_of_path(self, handle: int, length: int) -> np.ndarray | int:
        most = length // self.page_size  # nodes on the path, at most
        starts, lengths = np.empty((2, most), np.int32)
        nodes: int = cpu.path_ranges_one.call(self._addresses, handle, length, starts, lengths)
        if nodes < 0:
            return nodes
        pages = np.empty(most, np.int32)
        cpu.pages_of_ranges(address_of(self.pages), starts, lengths, nodes, self.page_size, pages)
        return pages

    def of_place(self, handle: int, length: int) -> torch.Tensor | int:
        pages = self._pages_of_path(handle, length)
        return pages if isinstance(pages, int) else torch.from_numpy(self.slots_of(pages))

    def of_places(self, handles: np.ndarray, lengths: np.ndarray) -> Ragged | int:
        total, nodes = cpu.count_paths(self._addresses, handles, lengths)
        if total < 0:
            return int(total)
        starts, counts = np.empty((2, nodes), np.int32)
        cpu.path_ranges(self._addresses, handles, lengths, starts, counts)
        pages = np.empty(total // self.page_size, np.int32)
        cpu.pages_of_ranges(address_of(self.pages), starts, counts, nodes, self.page_size, pages)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return Ragged.trusted(torch.from_numpy(self.slots_of(pages)), torch.from_numpy(offsets))

    def write_rows(self, handles: np.ndarray, lengths: np.ndarray, table: torch.Tensor, rows: np.ndarray) -> int:
        found = self.of_places(handles, lengths)
        if isinstance(found, int):
            return found
        target, values, offsets = table.numpy(), found.values.numpy(), found.offsets.tolist()
        for row, begin, end in zip(rows.tolist(), offsets, offsets[1:], strict=False):
            target[row, : end - begin] = values[begin:end]
        return 0

    def allocate_eviction(self, before: torch.Tensor | None, most: int, most_ranges: int) -> EvictionMemory:
        return PageEvictionMemory(self, before, most, most_ranges)

    def compact(self, call: int, nodes: int) -> None:
        cpu.compact_pages(self._addresses, call, address_of(self.pages), np.empty((3, nodes), np.int32))

    def finish_compaction(self) -> None:
        return

    def enlarged(self, units: int) -> torch.Tensor:
        raise AssertionError("a tree of page numbers does not grow")


class PagedIndex(HostIndex):
    """A HostIndex with whole calls of a PrefixCache, each in one kernel: see `kernels/cpu/paged.py`.

    `cache` is the address of the table of the cache's `Running`.
    """

    _slots: PageSlots

    def _make_slots(self, options: Options) -> SlotPool:
        units = pool_units(options.max_tokens, options.page_size)
        return PageSlots(units, options.page_size, self._addresses)

    @property
    def page_pool(self) -> np.ndarray:
        """int32: the page of each page of the tree's pools."""
        return self._slots.pages

    @public_call
    def find_prompts(
        self, cache: int, prompts: Batch, names: Namespace | list[Namespace], chunk: int, found: np.ndarray
    ) -> int:
        """Match and lock prompts, and return how many free pages they need; see `kernels.cpu.find_prompts`.

        found: int64 [3, B], gets the cached lengths, the lengths with slots and the handles.
        """
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._open = NOTHING_TO_UNDO  # PrefixCache undoes locks
            codes = _NO_CODES if names is None else self._codes(names, len(prompts))[0]
            self._calls += 1
            keys = prompts.addresses, prompts.wide, prompts.counts
            needed: int = cpu.find_prompts.call(self._addresses, cache, self._calls, *keys, codes, chunk, *found)
            if needed < 0:
                self._refuse("begin", needed)
            self._open = 0
            self.busy = FREE
            return needed
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def commit_requests(
        self, cache: int, rows: np.ndarray, known: np.ndarray, ends: np.ndarray, names: list[Namespace] | None
    ) -> np.ndarray:
        """Let requests know tokens and insert their whole pages; see `kernels.cpu.commit`.

        names: of each request that has committed nothing; None if none has a name. Returns int64 [3, K]: the rows that
        got other pages, and from where to where.
        """
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._open = NOTHING_TO_UNDO
            codes = _NO_CODES
            if names is not None:
                self._fresh = []
                nothing = np.zeros(len(rows), np.int64)
                codes, _named = self._codes_to_insert(names, ends, nothing)
            replaced = np.empty((3, len(rows)), np.int64)
            self._calls += 1
            arguments = self._addresses, cache, self._calls, rows, known, ends, codes, replaced
            inserted, others = cpu.commit.call(*arguments)
            if inserted == reasons.NO_POOL_SPACE:
                self._slots.compact(self._calls, self._numbers[numbers.NODES])
                inserted, others = cpu.commit.call(*arguments)
            if inserted < 0:
                self._refuse_insert(inserted, ())
            if names is not None:  # those that inserted no page
                self._namespaces.forget(self._fresh, self._arrays.namespace_children)
            self._open = 0
            self.busy = FREE
            return replaced[:, :others]
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def release_requests(self, cache: int, rows: np.ndarray, begins: np.ndarray) -> None:
        """End requests; see `kernels.cpu.release`."""
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._open = NOTHING_TO_UNDO
            self._calls += 1
            cpu.release.call(self._addresses, cache, self._calls, rows, begins)
            self._open = 0
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def admit_prompts(self, cache: int, prompts: Batch, arrays: tuple[np.ndarray, ...]) -> tuple[int, int]:
        """Let prompts run; see `kernels.cpu.admit`. arrays: rows, cached, begins, lengths, handles, priorities."""
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            rows, *others = arrays
            found: tuple[int, int] = cpu.admit.call(
                self._addresses, cache, rows, prompts.addresses, prompts.wide, prompts.counts, *others
            )
            self.busy = FREE
            return found
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def write_pages(self, cache: int, handles: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> None:
        """Write the pages of good places to rows; see `kernels.cpu.write_pages`."""
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            cpu.write_pages(self._addresses, cache, handles, lengths, rows)
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise
