"""Core: the arrays of a tree in host memory, its calls under way, and what each of its operations needs.

The operations stand beside it: matching, locking, pinning, reading, inserting, evicting. `HostIndex` is all of them
together. An operation takes the gate, records in `_open` how to undo it, calls a kernel, and clears `_open`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch

from flatradix.gate import FREE, add_gate, public_call
from flatradix.host.freed import freed_last
from flatradix.host.growth import Larger, has_moved, larger_than, move
from flatradix.host.slots import EvictionMemory, HostSlots, SlotPool
from flatradix.host.slots_apart import SlotsApart
from flatradix.index import Index
from flatradix.inputs import namespaces
from flatradix.inputs.namespaces import Namespaces
from flatradix.inputs.options import Options
from flatradix.inputs.refuse import refuse, refuse_capacity
from flatradix.inputs.sequences import address_of
from flatradix.inspect.content import as_numpy
from flatradix.kernels import cpu
from flatradix.layout import numbers, reasons
from flatradix.layout.growth import most_tokens, next_capacity
from flatradix.layout.state import allocate_host, pool_units
from flatradix.victims import listener_of

NOTHING_TO_UNDO = -1  # `_open` in a call that takes several steps and leaves nothing to undo
_NO_PLACES = np.empty(0, np.int64)


class Core(Index):
    """What all operations of a tree in host memory share.

    Python cannot interrupt a kernel. Its last step is to store the number of its call, so the next call can tell what
    an interrupted call did, and undo it from its results. A match without lock needs no number.
    """

    def __init__(self, options: Options, device: torch.device, generation: int) -> None:
        """generation: added to the generation of each row in its handles."""
        add_gate(self)
        self.options = options
        self.device = device
        state = allocate_host(options.max_tokens, options.page_size, options.bigram, generation)
        state.numbers[numbers.POLICY] = options.order.code
        state.numbers[numbers.PROTECTED_THRESHOLD] = options.order.protected_threshold
        state.numbers[numbers.BY_PAGE] = self._by_page = options.evict_by == "page"
        self._state = state
        self._table = cpu.address_table(state)
        self._addresses = address_of(self._table)
        self._arrays: Any = as_numpy(state)
        self._numbers = memoryview(self._arrays.numbers.data)
        self._namespaces = Namespaces(self._arrays.namespace_hash)
        self._slots: SlotPool = self._make_slots(options)
        self._calls = 0  # the last number given to a call
        self._open = 0  # the number of the call that has begun and not ended, NOTHING_TO_UNDO, or 0
        self._results = 0, _NO_PLACES, _NO_PLACES, _NO_PLACES
        self._eviction: EvictionMemory | None = None
        self._unreturned: torch.Tensor | None = None
        self._fresh: list[int] = []  # namespace codes that the last insert gave out
        self._listener = listener_of(options.on_evict)
        self._larger: Larger | None = None  # the arrays of a growth under way

    def _make_slots(self, options: Options) -> SlotPool:
        units = pool_units(options.max_tokens, options.page_size)
        if options.slot_device is None:
            return HostSlots(units, options.slot_dtype, self._addresses)
        return SlotsApart(units, options.slot_dtype, options.slot_device, self._addresses)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._state) + self._slots.nbytes

    # Interrupted calls

    def _begin(self, handles: np.ndarray, lengths: np.ndarray, prefix_lengths: np.ndarray) -> int:
        """Begin a call on a batch and return its number. Its result arrays are kept to undo it.

        A call on a single key is undone from the state's numbers instead.
        """
        call = self._calls + 1
        # In this order: where only `_open` is set, no kernel can have run under its number.
        self._open = self._calls = call
        self._results = call, handles, lengths, prefix_lengths
        return call

    def _repair(self) -> None:
        if self._open == 0:
            return
        self._move_in()
        self._pins = self._pins.undone(self._open)
        if self._numbers[numbers.LAST_CALL] == self._open:
            self._take_back(self._numbers[numbers.LAST_OPERATION])
        self._namespaces.repair(self._arrays.namespace_children)
        self._numbers[numbers.RELEASED] = 0
        self._open = 0

    def _take_back(self, operation: int) -> None:
        if operation == numbers.RESET:
            self._unreturned = None
            self._forget_victims()
        elif operation == numbers.EVICTED:
            assert self._eviction is not None
            tokens, ranges = self._numbers[numbers.LAST_LENGTH], self._numbers[numbers.LAST_PREFIX]
            self._unreturned = freed = self._eviction.slots(tokens, ranges)
            self._note_victims(freed)
            self._numbers[numbers.LAST_CALL] = self._numbers[numbers.CALL_BEFORE]
        elif operation == numbers.COMPACTED:
            self._slots.finish_compaction()
            self._numbers[numbers.LAST_CALL] = self._numbers[numbers.CALL_BEFORE]
        else:
            self._undo(operation)

    def _undo(self, operation: int) -> None:
        call, handles, lengths, prefix_lengths = self._results
        if call != self._open:
            handles = np.array([self._numbers[numbers.LAST_HANDLE]])
            lengths = np.array([self._numbers[numbers.LAST_LENGTH]], np.int32)
            prefix_lengths = np.array([self._numbers[numbers.LAST_PREFIX]], np.int32)
        reason = 0
        if operation == numbers.LOCKED:
            reason = cpu.unlock(self._addresses, 0, handles, lengths)
        elif operation == numbers.UNLOCKED:
            reason = cpu.lock(self._addresses, 0, handles.copy(), lengths)
        elif operation == numbers.WANTED:
            reason = cpu.unwant(self._addresses, 0, handles, lengths)
        elif operation == numbers.UNWANTED:
            found = np.empty(len(handles), np.bool_)
            cpu.alive(self._addresses, handles, lengths, found)
            reason = cpu.want(self._addresses, 0, handles[found], lengths[found])
        else:
            cpu.take_back_insert(self._addresses, prefix_lengths, lengths, handles)
        assert reason == 0, "an interrupted lock or unlock could not be undone"

    def _refuse(self, operation: str, reason: int) -> NoReturn:
        query, value = self._numbers[numbers.ERROR_QUERY], self._numbers[numbers.ERROR_VALUE]
        evictable, protected = self._numbers[numbers.EVICTABLE], self._numbers[numbers.PROTECTED]
        max_tokens = most_tokens(self.options.page_size) if self.options.grows else self.options.max_tokens
        self._open = 0
        self.busy = FREE
        if reason == reasons.NO_CAPACITY:
            refuse_capacity(value, max_tokens - evictable - protected, evictable, max_tokens)
        refuse(operation, reason, query, value)

    # Growth

    def _fits_larger(self, reason: int) -> bool:
        """Grow if a tree without `max_tokens` refused an insert for `reason`. Return whether it fits now."""
        if reason != reasons.NO_CAPACITY or not self.options.grows:
            return False
        known = self._numbers
        return self._grow(known[numbers.EVICTABLE] + known[numbers.PROTECTED] + known[numbers.ERROR_VALUE])

    def _grow(self, needed: int) -> bool:
        """Move to arrays for `needed` tokens, at least twice as large if any; return False if they would be too large.

        The step from the old arrays to the new ones is one kernel.
        """
        options, most = self.options, most_tokens(self.options.page_size)
        if needed > most:
            return False
        capacity = next_capacity(options.max_tokens, needed, most)
        if capacity > options.max_tokens:
            larger = larger_than(self._state, self._slots, options, capacity)
            self._larger = larger
            move(self._addresses, larger)
            self._move_in()
        return True

    def _move_in(self) -> None:
        """Use the arrays of a growth, if the tree is there by now. May be called again."""
        larger = self._larger
        if larger is not None and has_moved(self._table, larger):
            self.options, self._state = larger.options, larger.state
            self._arrays = as_numpy(larger.state)
            self._namespaces.move_to(self._arrays.namespace_hash)
            self._slots.move_to(larger.slots)
        self._larger = None

    # Namespaces and victims

    def _code(self, namespace: Any) -> int:
        """Return the namespace code of a single query. It is valid until another call begins."""
        self._open = NOTHING_TO_UNDO
        return self._namespaces.find(namespaces.only(namespace))

    def _codes(self, namespace: Any, queries: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the namespace code of each query, int64 [B], and whether the caller gave a namespace, bool [B]."""
        if not isinstance(namespace, list | tuple):  # one for all
            code = self._namespaces.find(namespaces.only(namespace))
            return np.full(queries, code, np.int64), np.full(queries, namespace is not None)
        names = namespaces.spread(namespace, queries)
        codes = np.array([self._namespaces.find(name) for name in names], np.int64)
        return codes, np.array([name is not None for name in names], np.bool_)

    def _note_victims(self, slots: torch.Tensor) -> None:
        """Note the victims of the last eviction for the callback. slots: what it returns, in order."""
        if self._listener is not None:
            self._listener.note(freed_last(self._arrays, self._numbers, self._namespaces, slots))

    def _forget_victims(self) -> None:
        if self._listener is not None:
            self._listener.forget()

    # Sizes

    @property
    @public_call
    def evictable_tokens(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[numbers.EVICTABLE]

    @property
    @public_call
    def protected_tokens(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[numbers.PROTECTED]

    @property
    @public_call
    def total_tokens(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[numbers.EVICTABLE] + self._numbers[numbers.PROTECTED]

    @property
    @public_call
    def num_nodes(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[numbers.NODES]

    @public_call
    def changes(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[numbers.LAST_CALL]
