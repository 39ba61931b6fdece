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
    """The places of waiting prompts in one tree."""

    prompts: Prompts

    @abstractmethod
    def look(self) -> None:
        """Bring `row` and `length` of all prompts up to date, and the wants, if the queue keeps."""

    @abstractmethod
    def names_changed(self) -> None:
        """Note that a namespace has got a number in the queue."""

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
    """Reads the events of a tree in host memory, so a look costs what has changed."""

    def __init__(self, index: HostIndex, keep: bool, left: int) -> None:
        self._index = index
        tree = self._tree = index.watched
        self.prompts = Prompts(tree.options.page_size, tree.options.bigram, len(tree.state.parent), left)
        counts = self.prompts.arrays.counts
        counts[waiting.READ] = int(tree.state.numbers[numbers.EVENTS])
        counts[waiting.KEEP] = keep
        self._names_seen = -1
        if keep:
            index.keep_for(self)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_finalizing() and hasattr(self, "prompts"):
            self.close()

    def close(self) -> None:
        counts = self.prompts.arrays.counts
        if counts[waiting.KEEP]:
            self.look()
            cpu.forget_wants(self._tree.addresses, self.prompts.address)
            counts[waiting.KEEP] = 0
            self._index.keep_no_longer(self)

    def look(self) -> None:
        prompts, tree = self.prompts, self._tree
        if tree.namespaces.version != self._names_seen:
            self._read_codes()
        cpu.look.call(tree.addresses, prompts.address, prompts.pool)

    def _read_codes(self) -> None:
        """Read the tree's code of each namespace. Codes are given out, and forgotten, as tokens come and go."""
        prompts, names = self.prompts, self._tree.namespaces
        version = names.version
        codes = prompts.arrays.codes
        changed = np.zeros(len(codes), np.bool_)
        for name, space in prompts.spaces.items():
            code = names.find(name)
            changed[space] = codes[space] != code
            codes[space] = code
        if changed.any():
            cpu.recode(prompts.address, changed)
        self._names_seen = version

    def names_changed(self) -> None:
        """Read all codes again at the next look: a namespace has got a number in this queue."""
        self._names_seen = -1

    def order_changed(self) -> None:
        return  # an eviction reads the order itself

    def wanted_table(self) -> int:
        self.look()
        return self.prompts.address

    def remove(self, ids: np.ndarray) -> None:
        self.prompts.remove(ids, self._tree.addresses)

    def remove_one(self, number: int) -> bool:
        return self.prompts.remove_one(number, self._tree.addresses)
