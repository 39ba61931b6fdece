"""HostIndex: the index in host memory. A call returns when its work is done, so it raises its own errors."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from threading import get_ident
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from flatradix import dropping
from flatradix.dropping import NOT_GIVEN, times_of
from flatradix.gate import FREE, cut_short, public_call
from flatradix.host.freed import freed_last
from flatradix.host.growth import Larger, has_moved, larger_than, move
from flatradix.host.rehearsal import tokens_freed
from flatradix.host.slots import EvictionMemory, HostSlots, SlotBatch, SlotPool
from flatradix.host.slots_apart import SlotsApart
from flatradix.index import Index
from flatradix.inputs import namespaces
from flatradix.inputs.arguments import check_counts, check_out, check_write_table, per_query, to_int64, token_count
from flatradix.inputs.namespaces import Namespaces
from flatradix.inputs.options import Options
from flatradix.inputs.places import contiguous, read_places, read_starts, refuse_shared_handles
from flatradix.inputs.policy import Nodes, Score, scores_of
from flatradix.inputs.ragged import Ragged, read_batch
from flatradix.inputs.refuse import refuse, refuse_capacity, refuse_out, refuse_slot, refuse_unequal
from flatradix.inputs.sequences import Batch, address_of, is_batch, read_host_key, read_one
from flatradix.inputs.upload import upload_numbers
from flatradix.inspect.content import Content, Paths, Saved, as_numpy, fill, tokens_for
from flatradix.kernels import cpu
from flatradix.kernels.cpu import insert_one, lock_one, match_one, unlock_one
from flatradix.layout import numbers, reasons
from flatradix.layout.growth import most_tokens, next_capacity
from flatradix.layout.handles import NO_HANDLE
from flatradix.layout.state import FREE_ROW, allocate_host, pool_units
from flatradix.pins import read_ends
from flatradix.results import (
    EvictIntoResult,
    EvictResult,
    InsertResult,
    MatchResult,
    Places,
    one_insert,
    one_match,
    written,
)
from flatradix.victims import listener_of

NOTHING_TO_UNDO = -1  # `_open` in a call that takes several steps and leaves nothing to undo
_NO_SCORES = np.empty(0, np.int64)
_EVICTABLE, _PROTECTED, _NODES = numbers.EVICTABLE, numbers.PROTECTED, numbers.NODES
_RELEASED, _ROWS, _LONGEST, _LAST_CALL = numbers.RELEASED, numbers.ROWS, numbers.LONGEST, numbers.LAST_CALL


class Watched(NamedTuple):
    """What a waiting queue reads of an index. addresses: of its address table. numbers: `TreeState.numbers`.

    Both stay when the tree grows; then ROW_CAPACITY is another number.
    """

    addresses: int
    numbers: memoryview
    namespaces: Namespaces
    options: Options


class HostIndex(Index):
    """A tree in host memory; numba kernels do the work.

    Python cannot interrupt a kernel. Its last step is to store the number of its call, so the next call can tell what
    an interrupted call did, and undo it from its results. A match without lock needs no number.
    """

    def __init__(self, options: Options, device: torch.device, generation: int) -> None:
        """generation: added to the generation of each row in its handles."""
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
        self._results = 0, _NO_SCORES, _NO_SCORES, _NO_SCORES
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
        if self._numbers[_LAST_CALL] == self._open:
            self._take_back(self._numbers[numbers.LAST_OPERATION])
        self._namespaces.repair(self._arrays.namespace_children)
        self._numbers[_RELEASED] = 0
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
            self._numbers[_LAST_CALL] = self._numbers[numbers.CALL_BEFORE]
        elif operation == numbers.COMPACTED:
            self._slots.finish_compaction()
            self._numbers[_LAST_CALL] = self._numbers[numbers.CALL_BEFORE]
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
        evictable, protected = self._numbers[_EVICTABLE], self._numbers[_PROTECTED]
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
        return self._grow(known[_EVICTABLE] + known[_PROTECTED] + known[numbers.ERROR_VALUE])

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

    # Match

    @public_call
    def match(
        self,
        q: Any,
        namespace: Any = None,
        touch: bool = True,
        lock: bool = False,
        start: Any = None,
        split: bool = False,
    ) -> MatchResult:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            key = read_host_key(q, "tokens") if start is None else None
            if key is None:
                return self._match_batch(read_batch(q, "tokens"), namespace, touch, lock, start, split)
            code = 0 if namespace is None else self._code(namespace)
            return self._match_one(key[0], key[2], key[1], code, touch, lock, split)
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def match_array(
        self, tokens: array[int], limit: int | None = None, namespace: Any = None, split: bool = False
    ) -> MatchResult:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            address, count = tokens.buffer_info()
            if tokens.typecode != "q":
                raise ValueError(f"match_array takes an array of int64 ('q'), not of typecode {tokens.typecode!r}")
            if limit is not None and limit < count:
                count = max(limit, 0)
            code = 0 if namespace is None else self._code(namespace)
            return self._match_one(address, True, count, code, True, False, split)
        except BaseException:
            cut_short(self, me)
            raise

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

    def _match_one(
        self, address: int, wide: bool, count: int, code: int, touch: bool, lock: bool, split: bool
    ) -> MatchResult:
        if lock:
            self._open = self._calls = self._calls + 1
        length, handle = match_one.call(self._addresses, self._calls, address, wide, count, code, touch, lock, split)
        if length < 0:
            self._refuse("match", length)
        result = one_match(length, handle)
        if lock:
            self.last_result = result
        self._open = 0
        self.busy = FREE
        return result

    def _match_batch(
        self, keys: Batch, namespace: Any, touch: bool, lock: bool, start: Any, split: bool
    ) -> MatchResult:
        self._open = NOTHING_TO_UNDO
        codes, named = self._codes(namespace, len(keys))
        start_handles, start_lengths = read_starts(start, len(keys))
        lengths = torch.empty(len(keys), dtype=torch.int32, device="cpu")
        handles = torch.empty(len(keys), dtype=torch.int64, device="cpu")
        result = MatchResult(lengths, handles)
        out = lengths.numpy(), handles.numpy()
        call = self._begin(out[1], out[0], out[0]) if lock else self._calls
        reason = cpu.match(
            self._addresses, call, keys.addresses, keys.wide, keys.counts, codes, named, start_handles, start_lengths,
            bool(touch), bool(lock), bool(split), *out,
        )  # fmt: skip
        if reason < 0:
            self._refuse("match", reason)
        if lock:
            self.last_result = result
        self._open = 0
        self.busy = FREE
        return result

    # Slots

    @public_call
    def slots(self, places: Any) -> Ragged:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            if isinstance(places, Places) and places.late is None:
                values = self._slots_of(places.handle, places.length)
                return Ragged.trusted(values, upload_numbers(np.array([0, len(values)]), values.device))
            lengths, handles = read_places(places)
            self._open = NOTHING_TO_UNDO
            found = self._slots.of_places(contiguous(handles).numpy(), lengths.numpy())
            if isinstance(found, int):
                self._refuse("slots", found)
            self._open = 0
            self.busy = FREE
            return found
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def tokens(self, places: Any) -> Ragged:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            lengths, handles = (contiguous(tensor).numpy() for tensor in read_places(places))
            self._open = NOTHING_TO_UNDO
            total, _nodes = cpu.count_paths(self._addresses, handles, lengths)
            if total < 0:
                self._refuse("tokens", total)
            out, offsets = np.empty(total, np.int32), np.zeros(len(lengths) + 1, np.int64)
            np.cumsum(lengths, out=offsets[1:])
            tokens = self._state.tokens.data_ptr()
            cpu.path_slots(self._addresses, handles, lengths, tokens, False, address_of(out))
            self._open = 0
            self.busy = FREE
            return Ragged.trusted(torch.from_numpy(out), torch.from_numpy(offsets))
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def path_slots(self, place: Any) -> torch.Tensor:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            return self._slots_of(place.handle, place.length)
        except BaseException:
            cut_short(self, me)
            raise

    def _slots_of(self, handle: int, length: int) -> torch.Tensor:
        self._open = NOTHING_TO_UNDO
        found = self._slots.of_place(handle, length)
        if isinstance(found, int):
            self._refuse("slots", found)
        self._open = 0
        self.busy = FREE
        return found

    @public_call
    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            lengths, handles = (contiguous(tensor).numpy() for tensor in read_places(places))
            pool = self._slots
            pool.refuse_capture()  # before rows on a GPU are copied
            numbered = check_write_table(table, rows, len(handles), pool.device, self.options.slot_dtype).cpu().numpy()
            self._open = NOTHING_TO_UNDO
            reason = cpu.write_slots(
                self._addresses, handles, lengths, numbered, pool.pool, pool.wide, table.data_ptr(),
                table.dtype == torch.int64, table.stride(0), *table.shape,
            )  # fmt: skip
            reason = reason or pool.write_rows(handles, lengths, table, numbered)
            if reason < 0:
                self._refuse("write_slots", reason)
            self._open = 0
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    # Lock

    @public_call
    def lock(self, places: Any) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            try:
                late = places.late
            except AttributeError:  # not a result of this library; isinstance would take longer
                late = True
            if late is None:
                self._open = call = self._calls = self._calls + 1
                handle = lock_one.call(self._addresses, call, places.handle, places.length)
                if handle < 0:
                    self._refuse("lock", handle)
                places.handle = handle
                self._open = 0
                self.busy = FREE
                return
            lengths, handles = read_places(places)
            refuse_shared_handles(handles)
            renewed = contiguous(handles)
            call = self._begin(renewed.numpy().copy(), kept := lengths.numpy().copy(), kept)
            reason = cpu.lock(self._addresses, call, renewed.numpy(), lengths.numpy())
            if reason < 0:
                self._refuse("lock", reason)
            if renewed is not handles:
                handles.numpy()[:] = renewed.numpy()
            self._open = 0
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def unlock(self, places: Any) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            try:
                late = places.late
            except AttributeError:  # not a result of this library; isinstance would take longer
                late = True
            if late is None:
                self._open = call = self._calls = self._calls + 1
                reason = unlock_one.call(self._addresses, call, places.handle, places.length)
            else:
                lengths, handles = (contiguous(tensor).numpy() for tensor in read_places(places))
                call = self._begin(handles.copy(), kept := lengths.copy(), kept)
                reason = cpu.unlock(self._addresses, call, handles, lengths)
            if reason < 0:
                self._refuse("unlock", reason)
            self._open = 0
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def split(self, places: Any) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            lengths, handles = read_places(places)
            refuse_shared_handles(handles)
            renewed = contiguous(handles)
            self._open = NOTHING_TO_UNDO  # a split is not undone
            reason = cpu.split(self._addresses, renewed.numpy(), lengths.numpy())
            if reason < 0:
                self._refuse("split", reason)
            if renewed is not handles:
                handles.numpy()[:] = renewed.numpy()
            self._open = 0
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    # Waiting queues and soft pins

    @public_call
    def rematch(self, q: Any, places: Any, namespace: Any = None) -> MatchResult:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            keys = read_batch(q, "tokens")
            old_handles, old_lengths = read_starts(places, len(keys))
            self._open = NOTHING_TO_UNDO
            codes, named = self._codes(namespace, len(keys))
            lengths = torch.empty(len(keys), dtype=torch.int32, device="cpu")
            handles = torch.empty(len(keys), dtype=torch.int64, device="cpu")
            reason = cpu.rematch(
                self._addresses, keys.addresses, keys.wide, keys.counts, codes, named, old_handles, old_lengths,
                lengths.numpy(), handles.numpy(),
            )  # fmt: skip
            if reason < 0:
                self._refuse("rematch", reason)
            self._open = 0
            self.busy = FREE
            return MatchResult(lengths, handles)
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def alive(self, places: Any) -> torch.Tensor:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            lengths, handles = read_places(places)
            found = self.are_alive(contiguous(handles).numpy(), lengths.numpy())
            self.busy = FREE
            return torch.from_numpy(found)
        except BaseException:
            cut_short(self, me)
            raise

    def are_alive(self, handles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        found = np.empty(len(handles), np.bool_)
        cpu.alive(self._addresses, handles, lengths, found)
        return found

    def read_own_wants(self) -> np.ndarray:
        found: np.ndarray = self._arrays.own_wants[: self._numbers[_ROWS]]
        return found

    @public_call
    def want(self, places: Any, until: Any = None) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            lengths, handles = read_places(places)
            refuse_shared_handles(handles)
            ends = None if until is None else read_ends(until, len(handles))
            renewed = contiguous(handles)
            self._check_budget(renewed.numpy(), lengths.numpy())
            call = self._begin(renewed.numpy().copy(), kept := lengths.numpy().copy(), kept)
            reason = cpu.want(self._addresses, call, renewed.numpy(), lengths.numpy())
            if reason < 0:
                self._refuse("want", reason)
            if renewed is not handles:
                handles.numpy()[:] = renewed.numpy()
            if ends is not None:
                self._replace_pins(self._pins.with_more(renewed.numpy(), kept, ends), call)
            self._open = 0
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def unwant(self, places: Any, until: Any = None) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            lengths, handles = (contiguous(tensor).numpy() for tensor in read_places(places))
            left = None if until is None and self._pins.size == 0 else self._pins_left(handles, lengths, until)
            call = self._begin(handles.copy(), kept := lengths.copy(), kept)
            reason = cpu.unwant(self._addresses, call, handles, lengths)
            if reason < 0:
                self._refuse("unwant", reason)
            if left is not None:
                self._replace_pins(left, call)
            self._open = 0
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def expire(self, now: Any) -> int:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            over, left = self._pins_at(now)
            if over.size:
                call = self._begin(over.handles, over.lengths, over.lengths)
                reason = cpu.unwant(self._addresses, call, over.handles, over.lengths)
                assert reason == 0, "a pin with an end is not counted at its node"
                self._replace_pins(left, call)
                self._open = 0
            else:
                self._pins = left
            self.busy = FREE
            return over.size
        except BaseException:
            cut_short(self, me)
            raise

    def read_paths(self) -> Paths:
        s, rows = self._arrays, self._numbers[_ROWS]
        sizes = self._numbers[_EVICTABLE], self._numbers[_PROTECTED]
        return Paths(s.parent[:rows], s.length[:rows], s.end[:rows], s.lock_ref[:rows], *sizes)

    @property
    def watched(self) -> Watched:
        """What a waiting queue needs to watch this index."""
        return Watched(self._addresses, self._numbers, self._namespaces, self.options)

    # Insert

    @public_call
    def insert(
        self,
        q: Any,
        slots: Any,
        namespace: Any = None,
        priority: Any = 0,
        start: Any = None,
        inserted_lengths: Any = 0,
    ) -> InsertResult:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            priority = 0 if priority is None else priority
            single = start is None or (isinstance(start, Places) and start.late is None)
            if single and isinstance(priority, int) and isinstance(inserted_lengths, int) and not is_batch(q):
                return self._insert_one(q, slots, namespace, priority, start, inserted_lengths)
            keys = read_batch(q, "tokens")
            priorities = per_query(priority, len(keys), "priority")
            inserted = per_query(inserted_lengths, len(keys), "inserted_lengths")
            return self._insert_batch(keys, slots, namespace, priorities, start, inserted)
        except BaseException:
            cut_short(self, me)
            raise

    def _insert_one(
        self, q: Any, slots: Any, namespace: Any, priority: int, place: Places | None, inserted: int
    ) -> InsertResult:
        address, count, wide, _owner = read_one(q, "tokens")
        priority, inserted = to_int64(priority, "priority"), to_int64(inserted, "inserted_lengths")
        if is_batch(slots):
            if len(slots) != 1:
                raise ValueError(f"insert: 1 queries, but slots for {len(slots)}")
            slots = slots[0]
        pool = self._slots
        source = pool.read_one(slots, self.options.check_slots)
        if source[1] != count:
            refuse_unequal(0, count, source[1])
        handle, start = (NO_HANDLE, 0) if place is None else (place.handle, place.length)
        name = None if namespace is None else namespaces.only(namespace)
        self._fresh = []
        self._open = call = self._calls = self._calls + 1
        code = 0 if name is None else self._code_to_insert(name, count, start)
        arguments = (
            address, wide, count, code, name is not None, handle, start, priority, inserted,
            source[0], source[2],
        )  # fmt: skip
        into = pool.pool, pool.wide, pool.limit
        prefix, length, end, pool_start = insert_one.call(self._addresses, call, *arguments, *into)
        if prefix < 0 and self._fits_larger(prefix):
            into = pool.pool, pool.wide, pool.limit
            prefix, length, end, pool_start = insert_one.call(self._addresses, call, *arguments, *into)
        if prefix == reasons.NO_POOL_SPACE:
            pool.compact(call, self._numbers[_NODES])
            prefix, length, end, pool_start = insert_one.call(self._addresses, call, *arguments, *into)
        if prefix < 0:
            self._refuse_insert(prefix, [slots])
        if pool.pool == 0:
            pool.store_one(source, prefix - start, length - start, pool_start)
        self.last_result = result = one_insert(prefix, length, end)
        self._open = 0
        self.busy = FREE
        return result

    def _insert_batch(
        self, keys: Batch, slots: Any, namespace: Any, priorities: np.ndarray, start: Any, inserted: np.ndarray
    ) -> InsertResult:
        pool = self._slots
        source = pool.read(slots, self.options.check_slots)
        check_counts(keys.counts, source.counts)
        start_handles, start_lengths = read_starts(start, len(keys))
        if isinstance(namespace, list | tuple):
            namespaces.spread(namespace, len(keys))  # checks the names
        else:
            namespaces.check(namespace)
        prefixes = torch.empty(len(keys), dtype=torch.int32, device="cpu")
        lengths = torch.empty(len(keys), dtype=torch.int32, device="cpu")
        handles = torch.empty(len(keys), dtype=torch.int64, device="cpu")
        result = InsertResult(prefixes, lengths, handles)
        out = prefixes.numpy(), lengths.numpy(), handles.numpy()
        starts = start_handles, start_lengths
        self._insert_arrays(keys, source, namespace, (priorities, inserted), starts, out, slots)
        self.last_result = result
        self._open = 0
        self.busy = FREE
        return result

    def _insert_arrays(
        self, keys: Batch, source: SlotBatch, namespace: Any, columns: tuple[np.ndarray, np.ndarray],
        starts: tuple[np.ndarray, np.ndarray], out: tuple[np.ndarray, np.ndarray, np.ndarray], slots: Any,
    ) -> None:  # fmt: skip
        pool = self._slots
        start_handles, start_lengths = starts
        pool_starts = np.empty(len(keys), np.int64)
        self._fresh = []
        call = self._begin(out[2], out[1], out[0])
        codes, named = self._codes_to_insert(namespace, keys.counts, start_lengths)
        arguments = (
            keys.addresses, keys.wide, keys.counts, codes, named, start_handles, start_lengths, *columns,
            source.addresses, source.wide,
        )  # fmt: skip
        into = pool.pool, pool.wide, pool.limit
        reason = cpu.insert(self._addresses, call, *arguments, *into, *out, pool_starts)
        if reason < 0 and self._fits_larger(reason):
            into = pool.pool, pool.wide, pool.limit
            reason = cpu.insert(self._addresses, call, *arguments, *into, *out, pool_starts)
        if reason == reasons.NO_POOL_SPACE:
            pool.compact(call, self._numbers[_NODES])
            reason = cpu.insert(self._addresses, call, *arguments, *into, *out, pool_starts)
        if reason < 0:
            self._refuse_insert(reason, slots if is_batch(slots) else [slots])
        if pool.pool == 0:
            pool.store(source, out[0] - start_lengths, out[1] - out[0], pool_starts)

    def _codes_to_insert(self, namespace: Any, counts: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the namespace code of each key, int64 [B], and whether the caller gave a namespace, bool [B]."""
        if isinstance(namespace, list | tuple):
            each = zip(namespace, counts, starts, strict=True)
            codes = np.array([self._code_to_insert(*key) for key in each], np.int64)
            return codes, np.array([name is not None for name in namespace], np.bool_)
        most = int(counts.max(where=starts == 0, initial=0))
        code = self._code_to_insert(namespace, most, 0)
        return np.full(len(counts), code, np.int64), np.full(len(counts), namespace is not None)

    def _code_to_insert(self, name: namespaces.Namespace, count: int, start: int) -> int:
        """Return the code of a key's namespace; give out a new code only if the key stores units."""
        code = self._namespaces.find(name)
        if code < 0 and start == 0 and count - self.options.bigram >= self.options.page_size:
            code = self._namespaces.give(name)
            self._fresh.append(code)
        return code

    def _refuse_insert(self, reason: int, slots: Any) -> NoReturn:
        """Forget the namespace codes that the insert gave out, and raise its error. slots: one sequence per query."""
        self._namespaces.forget(self._fresh, self._arrays.namespace_children)
        if reason == reasons.BAD_SLOT:
            query, position = self._numbers[numbers.ERROR_QUERY], self._numbers[numbers.ERROR_VALUE]
            self._open = 0
            self.busy = FREE
            refuse_slot(int(slots[query][position]), query, position, self.options.slot_dtype)
        self._refuse("insert", reason)

    # Evict

    @public_call
    def evict(self, num_tokens: Any, out: torch.Tensor | None = None) -> EvictResult | EvictIntoResult:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            wanted = token_count(num_tokens)
            if out is not None:
                check_out(out, self._slots.device, self.options.slot_dtype)
            self._open = call = self._calls = self._calls + 1
            before = self._unreturned
            known = 0 if before is None else len(before)
            wanted = wanted - known if wanted > known else 0
            if self._listener is not None:
                self._listener.begin()
            score = self.options.order.score
            scores = _NO_SCORES if score is None or wanted == 0 else self._scores(score)
            keeper = None if self._keeper is None else self._keeper()
            kept = 0 if keeper is None else keeper.wanted_table()
            most, most_ranges = self._most_freed(wanted)
            if out is not None and len(out) < known + most:
                self._refuse_overflow(out, known, wanted, scores, most_ranges)
            pool, room = self._slots, self._slots.allocate_eviction(before, most, most_ranges)
            self._eviction = room
            tokens, nodes, ranges = cpu.evict.call(
                self._addresses, call, wanted, scores, kept, pool.pool, pool.wide, room.starts, room.lengths,
                room.target,
            )  # fmt: skip
            slots = self._freed(room, tokens, ranges)
            result = EvictResult(slots, known + tokens, nodes) if out is None else written(out, slots, nodes)
            self._end_eviction(result)
            return result
        except BaseException:
            cut_short(self, me)
            raise

    def _freed(self, room: EvictionMemory, tokens: int, ranges: int) -> torch.Tensor:
        """Return the slots that a kernel has freed, and note what else has gone."""
        slots = room.slots(tokens, ranges)
        self._note_victims(slots)
        if self._numbers[_RELEASED]:
            self._forget_namespaces()
        return slots

    def _end_eviction(self, result: EvictResult | EvictIntoResult) -> None:
        self.last_result = result
        if self._listener is not None:
            self._listener.tell()
        self._unreturned = None
        self._open = 0
        self._eviction = None  # now: until then, it may have to be returned by the next eviction
        self.busy = FREE

    @public_call
    def drop(self, places: Any = None, namespace: Any = NOT_GIVEN) -> EvictResult:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            plan = self._plan_drop(places, namespace)
            self._open = call = self._calls = self._calls + 1
            before = self._unreturned
            known = 0 if before is None else len(before)
            if self._listener is not None:
                self._listener.begin()
            pool, room = self._slots, self._slots.allocate_eviction(before, plan.tokens, len(plan.victims))
            self._eviction = room
            tokens, ranges = cpu.drop(
                self._addresses, call, plan.kept, plan.less, plan.victims, pool.pool, pool.wide, room.starts,
                room.lengths, room.target,
            )  # fmt: skip
            slots = self._freed(room, tokens, ranges)
            result = EvictResult(slots, known + tokens, len(plan.victims))
            self._end_eviction(result)
            return result
        except BaseException:
            cut_short(self, me)
            raise

    def _plan_drop(self, places: Any, namespace: Any) -> dropping.Plan:
        dropping.check_arguments(places, namespace)
        used, state = self._numbers[_ROWS], self._arrays
        settings = dropping.Settings(self._numbers[numbers.GENERATION], self.options.page_size, self._by_page)
        columns = {name: getattr(state, name)[:used] for name in dropping.COLUMNS}
        rows = dropping.Rows(**columns, settings=settings)
        if places is None:
            return rows.plan(rows.tops_of(self._namespaces.find(namespace)))
        lengths, handles = read_places(places)
        return rows.plan(rows.of_places(handles.numpy(), lengths.numpy()))

    def _most_freed(self, wanted: int) -> tuple[int, int]:
        """Return the most slots that an eviction frees, and the most pool ranges in which they lie.

        The eviction frees fewer tokens than `wanted` plus the longest edge, and by pages than `wanted` plus a page.
        """
        most, most_ranges, page = self._numbers[_EVICTABLE], self._numbers[_NODES], self.options.page_size
        beyond = page if self._by_page else self._numbers[_LONGEST]
        if wanted == 0:
            most = most_ranges = 0
        elif wanted + beyond < most:
            most = wanted + beyond
            most_ranges = min(most_ranges, -(-wanted // page))
        return most, most_ranges

    def _refuse_overflow(self, out: torch.Tensor, known: int, wanted: int, scores: np.ndarray, ranges: int) -> None:
        """Raise ValueError if the slots of an eviction do not fit into `out` behind `known` others."""
        keeper = None if self._keeper is None else self._keeper()
        queue = None if keeper is None else keeper.prompts.arrays
        tokens = tokens_freed(self._state, queue, wanted, scores, ranges)
        if known + tokens > len(out):
            self._open = 0
            self.busy = FREE
            refuse_out(known + tokens, len(out))

    def _note_victims(self, slots: torch.Tensor) -> None:
        """Note the victims of the last eviction for the callback. slots: what it returns, in order."""
        if self._listener is not None:
            self._listener.note(freed_last(self._arrays, self._numbers, self._namespaces, slots))

    def _forget_victims(self) -> None:
        if self._listener is not None:
            self._listener.forget()

    def _scores(self, score: Score) -> np.ndarray:
        rows = self._numbers[_ROWS]
        s = self._state
        created = torch.from_numpy(times_of(self._arrays.created[:rows]))
        columns = (s.tick, created, s.priority, s.hit_count, s.lock_ref, s.children, s.length, s.end)
        live = self._arrays.parent[:rows] != FREE_ROW
        live[0] = False
        return scores_of(score, Nodes(*(column[:rows] for column in columns)), torch.from_numpy(live)).numpy()

    def _forget_namespaces(self) -> None:
        released = self._arrays.released[: self._numbers[_RELEASED]].tolist()
        self._namespaces.forget(released, self._arrays.namespace_children)
        self._numbers[_RELEASED] = 0

    # Sizes

    @property
    @public_call
    def evictable_tokens(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[_EVICTABLE]

    @property
    @public_call
    def protected_tokens(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[_PROTECTED]

    @property
    @public_call
    def total_tokens(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[_EVICTABLE] + self._numbers[_PROTECTED]

    @property
    @public_call
    def num_nodes(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[_NODES]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._state) + self._slots.nbytes

    @public_call
    def changes(self) -> int:
        if self.busy:
            self._settle()
        return self._numbers[_LAST_CALL]

    # The whole tree

    def pack(self) -> None:
        self._open = call = self._calls = self._calls + 1
        self._slots.compact(call, self._numbers[_NODES])
        self._open = 0

    @public_call
    def digest(self) -> str:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            self._open = NOTHING_TO_UNDO
            slots = self._slots.values.cpu()
            lanes = [cpu.digest(self._addresses, slots.data_ptr(), slots.dtype == torch.int64, lane) for lane in (0, 1)]
            self._open = 0
            self.busy = FREE
            return "".join(f"{lane & (2**64 - 1):016x}" for lane in lanes)
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def reset(self) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            self._open = call = self._calls = self._calls + 1
            cpu.reset(self._addresses, call)
            self._namespaces.clear()
            self._unreturned = None
            self._forget_victims()
            self._open = 0
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def raise_pending(self) -> None:
        if self.busy:
            self._settle()

    def read_content(self, slots: bool, only: Collection[str] | None = None) -> Content:
        sizes = self._numbers[_EVICTABLE], self._numbers[_PROTECTED], self._numbers[_NODES]
        pool = self._slots.values if slots else self._slots.values[:0]
        return Content(self.options, self._arrays, pool.numpy(force=True), 0, self._namespaces.items(), *sizes)

    def restore(self, saved: Saved) -> None:
        if self.options.grows:
            self._grow(tokens_for(saved, self.options.page_size))
        fill(self._state, self._slots.values, saved)
        self._namespaces.restore(saved["names"])
        cpu.rebuild(self._addresses)
