"""Pages: the KV pages and the tokens of a cache's requests, in host memory (`HostPages`) or on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.cache.columns import Columns
from flatradix.cache.input import Prompts
from flatradix.inputs.sequences import Batch
from flatradix.results import EvictResult, Places
from flatradix.tree import RadixTree


class Inserted(NamedTuple):
    """What an insert has found: its numbers, the places that its requests held before, and the ends as given."""

    result: Any
    before: Any
    ends: np.ndarray


class Pages(ABC):
    """Which pages are free, which page each running request has, its tokens, and the place that it holds.

    Page i has the slots i * page_size to (i + 1) * page_size - 1. Requests are given by their rows, int64 [B] numpy
    arrays; begins and ends are int64 [B], in tokens, at page boundaries unless a method says otherwise. The host knows
    how many pages are free, so no method waits for a device unless it says so.

    num_pages: all pages. free_pages: how many are free. duplicates: tokens of duplicates that were freed so far.
    most_tokens: how many tokens of a request can be known: a page more than can have slots.
    page_table: int32 [R, W] on the device of the KV cache: the page of each `page_size` tokens of each row.
    slot_copy: the table of slots, if it was ever asked for and is not the page table itself. within: int32 [page_size],
    the numbers from 0 on, on the same device.
    """

    page_size: int
    num_pages: int
    free_pages: int
    duplicates: int
    most_tokens: int
    page_table: torch.Tensor
    slot_copy: torch.Tensor | None
    within: torch.Tensor

    @property
    def free_slots(self) -> int:
        return self.free_pages * self.page_size

    @property
    def kv_device(self) -> torch.device:
        return self.page_table.device

    # Pages

    @abstractmethod
    def take(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        """Take free pages for the columns of some rows. Raises RuntimeError if too few are free."""

    @abstractmethod
    def give(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        """Free the pages of the columns of some rows."""

    @abstractmethod
    def give_evicted(self, evicted: EvictResult) -> None:
        """Free the pages that an eviction took from the tree."""

    @abstractmethod
    def write_cached(self, places: Places, rows: np.ndarray) -> None:
        """Write the tree's pages of each place to its row, from the first column on."""

    def grow(self, columns: Columns, rows: np.ndarray, more: np.ndarray) -> bool:
        """Give requests slots for `more` tokens, int64 [B], if enough pages are free and this is quick; return whether.

        Sets `length` and `missing`.
        """
        return False

    @abstractmethod
    def insert(
        self, tree: RadixTree, columns: Columns, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> Inserted:
        """Insert the tokens from `begins`, where the rows hold a place, to `ends`; lock and hold the new places."""

    @abstractmethod
    def replace(self, found: Inserted, rows: np.ndarray, begins: np.ndarray, owned: np.ndarray) -> np.ndarray | None:
        """After an insert of tokens from `begins` on, let rows have the tree's pages. Frees duplicates.

        Of a row, only pages from `owned` on are freed. Returns which rows have other pages now, bool [B], or None if
        only the device knows: `give_back_duplicates` then frees the pages.
        """

    @abstractmethod
    def unlock(self, tree: RadixTree, places: Any) -> None:
        """Unlock places: those of `held`, or those that were held before an insert."""

    @abstractmethod
    def held(self, rows: np.ndarray, lengths: np.ndarray) -> Any:
        """Return the places that rows hold, of these path lengths, for `unlock`."""

    @abstractmethod
    def give_back_duplicates(self) -> None:
        """Free the pages of inserts before whose results the host has not read. Waits for an index on a GPU."""

    @abstractmethod
    def copy(self, source: int, rows: np.ndarray, begin: int, end: int) -> None:
        """Copy the pages of row `source` from token `begin` to `end` to other rows."""

    # Tokens

    @abstractmethod
    def find_cached(self, tree: RadixTree, prompts: Prompts, lock: bool) -> tuple[Places, np.ndarray]:
        """Match prompts without their last tokens, without a touch; return the places and their lengths, int64 [B].

        lock: also lock them. Waits for an index on a GPU.
        """

    @abstractmethod
    def store_prompts(self, rows: np.ndarray, prompts: Prompts, skips: np.ndarray) -> None:
        """Store the tokens of new prompts, but the first `skips` of each. Raises QueryError for a bad token."""

    @abstractmethod
    def copy_tokens(self, source: int, rows: np.ndarray) -> None:
        """Copy the tokens of row `source` to other rows."""

    @abstractmethod
    def own_tokens(self, row: int, begin: int, end: int) -> np.ndarray:
        """Return the tokens of a row from `begin` to `end`, int32 in host memory: a copy."""

    @abstractmethod
    def store_tokens(self, rows: np.ndarray, begins: np.ndarray, tokens: Batch, skips: np.ndarray) -> tuple[int, int]:
        """Store tokens of each query, but its first `skips`, in its row from `begins` on, any positions.

        Returns (the first query with a token out of range, its position), or (-1, 0).
        """

    @abstractmethod
    def tokens(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Any:
        """Return the tokens of each row from `begins` to `ends`, any positions, as queries of the tree."""

    @abstractmethod
    def slots(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> Any:
        """Return the slots of each row from `begins` to `ends`, as slots for an insert."""

    # Places

    @abstractmethod
    def set_places(self, rows: np.ndarray, places: Places) -> None:
        """Note the places that rows hold."""

    @abstractmethod
    def places(self, rows: np.ndarray, lengths: np.ndarray) -> Places:
        """Return the places that rows hold, of these path lengths."""

    # The whole

    @abstractmethod
    def free_list(self) -> np.ndarray:
        """Return the free pages, int64 [K], the one that is allocated first last."""

    @abstractmethod
    def set_free(self, pages: np.ndarray) -> None:
        """Make exactly these pages free, int64 [K]; the last is allocated first. Forget inserts that are not read."""

    @abstractmethod
    def on_host(self, rows: np.ndarray) -> np.ndarray:
        """Return the pages of some rows, int32 [B, W] in host memory."""

    @abstractmethod
    def copy_rows(self, rows: np.ndarray, lengths: np.ndarray) -> None:
        """Copy the first `lengths` tokens' pages of some rows to the tables of the KV cache again."""

    def slots_of(self, pages: torch.Tensor) -> torch.Tensor:
        """Return the slots of pages on the device of the KV cache, int32 [..., page_size]."""
        return pages[..., None] * self.page_size + self.within

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
        """Free all pages, and count duplicates from 0. The lowest pages are allocated first."""
        self.duplicates = 0
        self.set_free(np.arange(self.num_pages - 1, -1, -1))
