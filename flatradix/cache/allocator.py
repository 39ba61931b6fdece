"""SlotAllocator: the free KV slots, page by page."""

from __future__ import annotations

import torch


class SlotAllocator:
    """A stack of the free pages among `num_slots // page_size` pages, on the device of the KV cache.

    Page i has the slots i * page_size to (i + 1) * page_size - 1. The host keeps the number of free pages, so nothing
    here waits for the device.
    """

    def __init__(self, num_slots: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self.num_pages = num_slots // page_size
        self._stack = torch.empty(self.num_pages, dtype=torch.int64, device=device)
        self._within = torch.arange(page_size, device=device)
        self.reset()

    def reset(self) -> None:
        """Free all pages. The lowest pages are allocated first."""
        self.free_pages = self.num_pages
        self._stack.copy_(torch.arange(self.num_pages - 1, -1, -1, device=self._stack.device))

    @property
    def free_slots(self) -> int:
        return self.free_pages * self.page_size

    def take(self, pages: int) -> torch.Tensor:
        """Allocate pages. Return their slots, int64 [pages * page_size]. Raises RuntimeError if fewer are free."""
        if pages > self.free_pages:
            raise RuntimeError(f"slots were lost: {pages} pages should be free, but {self.free_pages} are")
        left = self.free_pages - pages
        taken = self._stack[left : self.free_pages].flip(0)
        if self.page_size > 1:
            taken = (taken[:, None] * self.page_size + self._within).view(-1)
        self.free_pages = left  # last: the steps above may run out of memory
        return taken

    def give(self, slots: torch.Tensor) -> None:
        """Free the slots of whole pages, int32 or int64 [K * page_size], page by page.

        Raises RuntimeError if more pages would be free than exist.
        """
        first = slots[:: self.page_size]
        pages = self._stack[self.free_pages : self.free_pages + len(first)]
        if len(pages) < len(first):
            raise RuntimeError(f"{len(first)} pages came back, but only {len(pages)} were out")
        # Allocates no memory: if an allocation failed, these slots would be lost.
        torch.div(first, self.page_size, rounding_mode="floor", out=pages)
        self.free_pages += len(first)

    def set_free(self, pages: torch.Tensor) -> None:
        """Make exactly these pages free, int64 [K]. The last page is allocated first."""
        stack = self._stack.clone()
        stack[: len(pages)] = pages
        self.free_pages = 0
        self._stack = stack
        self.free_pages = len(pages)

    def free_list(self) -> torch.Tensor:
        """Return the free slots, int64 [free_slots], in no particular order."""
        pages = self._stack[: self.free_pages]
        return (pages[:, None] * self.page_size + self._within).view(-1)
