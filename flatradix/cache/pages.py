"""Pages: the KV pages and the tokens of a cache's requests, in host memory (`HostPages`) or on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.cache.columns import Columns
from flatradix.cache.input import Prompts
from flatradix.inputs.sequences import Batch
from flatradix.kernels import cpu
from flatradix.layout import running
from flatradix.results import EvictResult, Places
from flatradix.tree import RadixTree


class Found(NamedTuple):
    """Prompts that were matched and locked, int64 [B]: `cached` tokens of each, and `lengths` that are to have slots.

    place: what they hold, for `admit` and `unlock`. needed: free pages for that.
    """

    place: Any
    cached: np.ndarray
    lengths: np.ndarray
    needed: int


class Grant(NamedTuple):
    """What prompts get that begin, int64 [B]: rows, and slots for `lengths` tokens.

    Tokens before `cached` are cached, and those before `begins` need no computing: they are cached or borrowed.
    """

    rows: np.ndarray
    cached: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray


class Pages(ABC):
    """Which pages are free, which page each running request has, its tokens, and the place that it holds.

    Page i has the slots i * page_size to (i + 1) * page_size - 1. Requests are given by their rows, int64 [B] numpy
    arrays; begins and ends are int64 [B], in tokens. The host knows how many pages are free, so no method waits for a
    device unless it says so.

    num_pages: all pages. prompt_device: where a Ragged of prompts is read in place, None for host memory. page_table:
    int32 [R, W] on the device of the KV cache: the page of each `page_size` tokens of each row. slot_copy: the table of
    slots, if it was ever asked for and is not the page table itself. within: int32 [page_size], the numbers from 0 on,
    on the same device.
    """

    page_size: int
    num_pages: int
    prompt_device: torch.device | None = None
    page_table: torch.Tensor
    slot_copy: torch.Tensor | None
    within: torch.Tensor
    columns: Columns

    @property
    def free_pages(self) -> int:
        return self.columns.counts[running.FREE_PAGES]

    @property
    def free_slots(self) -> int:
        return self.free_pages * self.page_size

    @property
    def kv_device(self) -> torch.device:
        return self.page_table.device

    def ensure_free(self, tokens: int) -> None:
        """Raise RuntimeError unless so many slots are free, which the caller knows from its own count."""
        if tokens > self.free_slots:
            raise RuntimeError(f"slots were lost: {tokens} should be free, but {self.free_slots} are")

    def ensure_out(self, pages: int) -> None:
        """Raise RuntimeError unless so many pages are not free, which come back now."""
        if self.free_pages + pages > self.num_pages:
            raise RuntimeError(f"{pages} pages came back, but only {self.num_pages - self.free_pages} were out")

    # Begin

    @abstractmethod
    def keys(self, prompts: Prompts) -> Any:
        """Return prompts without their last tokens as queries of the tree. They must be in host memory."""

    @abstractmethod
    def find(self, tree: RadixTree, prompts: Prompts, chunk: int) -> Found:
        """Match prompts without their last tokens, without a touch, and lock them. Waits for an index on a GPU.

        chunk: how many tokens that are not cached get slots at most, 0 for all. Raises QueryError for a bad token.
        """

    def plan(self, found: Found, prompts: Prompts, begins: np.ndarray, chunk: int) -> Found:
        """Return what was found, with the pages that are needed if the first `begins` tokens have slots."""
        lengths = np.empty_like(begins)
        needed = cpu.plan_begin.call(self.columns.address, prompts.counts, begins, chunk, lengths)
        return found._replace(lengths=lengths, needed=needed)

    @abstractmethod
    def unlock(self, tree: RadixTree, found: Found) -> None:
        """Unlock what `find` locked."""

    @abstractmethod
    def admit(self, prompts: Prompts, place: Any, grant: Grant) -> None:
        """Let prompts run that hold `place`: with their tokens, the cached pages, and free pages for the rest.

        Enough pages must be free. Raises QueryError for a bad token; then nothing has changed.
        """

    # Commit

    @abstractmethod
    def commit(self, tree: RadixTree, rows: np.ndarray, known: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Let requests know `known` tokens, of which `ends` are computed; insert, lock and hold their whole pages.

        Where another request has committed the same tokens before, its pages replace those of the request. Returns the
        rows whose pages were replaced; with an index on a GPU, rows whose pages may be.
        """

    @abstractmethod
    def give_back_duplicates(self) -> None:
        """Free the pages of commits before whose results the host has not read. Waits for an index on a GPU."""

    # Grow and end

    def grow(self, rows: np.ndarray, more: np.ndarray) -> bool:
        """Give requests slots for `more` tokens, int64 [B], and set `length` and `missing`; return True.

        Returns False with nothing changed if too few pages are free. On a GPU it always does: use `take`.
        """
        return False

    @abstractmethod
    def take(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        """Take free pages for tokens of some rows. Raises RuntimeError if too few are free."""

    @abstractmethod
    def give_evicted(self, evicted: EvictResult) -> None:
        """Free the pages that an eviction took from the tree."""

    @abstractmethod
    def release(self, tree: RadixTree, rows: np.ndarray, begins: np.ndarray | None) -> None:
        """End requests: unlock what they hold, and free their rows and their pages from `begins` on.

        begins: None for the pages that are neither cached nor borrowed.
        """

    # Places, tokens and pages of rows

    @abstractmethod
    def places(self, rows: np.ndarray, lengths: np.ndarray) -> Places:
        """Return the places that rows hold, of these path lengths."""

    @abstractmethod
    def set_places(self, rows: np.ndarray, places: Places) -> None:
        """Note the places that rows hold."""

    @abstractmethod
    def write_cached(self, places: Places, rows: np.ndarray) -> None:
        """Write the tree's pages of each place to its row, from the first column on."""

    @abstractmethod
    def copy(self, source: int, rows: np.ndarray, begin: int, end: int) -> None:
        """Copy the pages of row `source` from token `begin` to `end`, whole pages, to other rows."""

    @abstractmethod
    def copy_tokens(self, source: int, rows: np.ndarray) -> None:
        """Copy the tokens of row `source` to other rows."""

    @abstractmethod
    def own_tokens(self, row: int, begin: int, end: int) -> np.ndarray:
        """Return the tokens of a row from `begin` to `end`, int32 in host memory: a copy."""

    @abstractmethod
    def store_tokens(self, rows: np.ndarray, begins: np.ndarray, tokens: Batch) -> tuple[int, int]:
        """Store tokens of each query in its row from `begins` on, any positions.

        Returns (the first query with a token out of range, its position), or (-1, 0).
        """

    @abstractmethod
    def tokens(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Any:
        """Return the tokens of each row from `begins` to `ends`, any positions, as queries of the tree."""

    # The whole

    @abstractmethod
    def free_list(self) -> np.ndarray:
        """Return the free pages, int64 [K], the one that is allocated first last."""

    @abstractmethod
    def set_free(self, pages: np.ndarray) -> None:
        """Make exactly these pages free, int64 [K]; the last is allocated first. Forget commits that are not read."""

    @abstractmethod
    def on_host(self, rows: np.ndarray) -> np.ndarray:
        """Return the pages of some rows, int32 [B, W] in host memory."""

    @abstractmethod
    def copy_rows(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Copy the first `lengths` tokens' pages of some rows to the tables of the KV cache again."""

    def slots_of(self, pages: torch.Tensor) -> torch.Tensor:
        """Return the slots of pages on the device of the KV cache, int32 [..., page_size]."""
        if not pages.is_cpu:
            return pages[..., None] * self.page_size + self.within
        slots = pages.numpy()[..., None] * np.int32(self.page_size) + self.within.numpy()
        return torch.from_numpy(slots)

    def slots_of_row(self, row: int) -> torch.Tensor:
        """Return the slots of a row, int32 [W * page_size] on the device of the KV cache; a view if pages have one."""
        return self.page_table[row] if self.page_size == 1 else self.slots_of(self.page_table[row]).view(-1)

    def slot_table(self) -> torch.Tensor:
        """Return int32 [R, W * page_size]: the slot of each token. Made when it is first asked for, then kept up."""
        if self.page_size == 1:
            return self.page_table
        if self.slot_copy is None:
            with torch.inference_mode(False):
                self.slot_copy = self.slots_of(self.page_table).view(len(self.page_table), -1)
        return self.slot_copy

    def reset(self) -> None:
        """Free all pages. The lowest pages are allocated first."""
        self.set_free(np.arange(self.num_pages - 1, -1, -1))
