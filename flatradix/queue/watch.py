"""Watch: where the match of each waiting prompt ends in a tree."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from flatradix.host.index import HostIndex
from flatradix.kernels import cpu
from flatradix.layout import numbers, waiting
from flatradix.queue.prompts import Prompts


class Watch(ABC):
    """The places of waiting prompts in one tree. Its methods run within a call of the tree's index."""

    prompts: Prompts

    @abstractmethod
    def look(self) -> None:
        """Bring `row` and `length` of all prompts up to date, and the wants, if the queue keeps."""

    @abstractmethod
    def close(self) -> None:
        """Keep nothing from now on."""

    @abstractmethod
    def order_changed(self) -> None:
        """Note that the queue's order has changed."""

    @abstractmethod
    def remove(self, ids: np.ndarray) -> None:
        """Remove prompts that wait, each once."""

    @abstractmethod
    def remove_one(self, number: int) -> bool:
        """Remove the prompt with an id, if it waits; return whether it did."""


class HostWatch(Watch):
    """Reads the events of a tree in host memory, so a look costs what has changed.

    The wants of a queue that keeps are counted in the tree. (On a GPU, each eviction finds them from the places.)
    """

    def __init__(self, index: HostIndex, keep: bool, left: int) -> None:
        self._index = index
        tree = self._tree = index.watched
        rows = tree.numbers[numbers.ROW_CAPACITY]
        self.prompts = Prompts(tree.options.page_size, tree.options.bigram, rows, left)
        counts = self.prompts.arrays.counts
        counts[waiting.READ] = tree.numbers[numbers.EVENTS]
        counts[waiting.KEEP] = keep
        self._names_seen = -1, -1
        if keep:
            index.keep_for(self)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing() and hasattr(self, "prompts"):
            self.close()

    def close(self) -> None:
        cpu.forget_wants(self._tree.addresses, self.prompts.address)
        self._index.keep_no_longer(self)
        self.prompts.arrays.counts[waiting.KEEP] = 0

    def look(self) -> None:
        prompts, tree = self.prompts, self._tree
        prompts.ensure_rows(tree.numbers[numbers.ROW_CAPACITY])
        if (tree.namespaces.version, prompts.names_version) != self._names_seen:
            self._read_codes()
        cpu.look.call(tree.addresses, prompts.address, prompts.pool)

    def _read_codes(self) -> None:
        """Read the tree's code of each namespace. Codes are given out, and forgotten, as tokens come and go."""
        prompts, names = self.prompts, self._tree.namespaces
        seen = names.version, prompts.names_version
        codes = prompts.arrays.codes.copy()
        for space, name in prompts.names().items():
            codes[space] = names.find(name)
        cpu.recode(prompts.address, codes != prompts.arrays.codes)
        prompts.arrays.codes[:] = codes  # after the prompts are noted: if this is cut short, all is done again
        self._names_seen = seen

    def wanted_table(self) -> int:
        """Bring the wants up to date, within an eviction. Return the address of the queue's table."""
        self.look()
        return self.prompts.address

    def order_changed(self) -> None:
        return  # an eviction reads the order itself

    def remove(self, ids: np.ndarray) -> None:
        self.prompts.remove(ids, self._tree.addresses)

    def remove_one(self, number: int) -> bool:
        return self.prompts.remove_one(number, self._tree.addresses)
