"""HostTree: the tree in host memory. Everything happens at once, so every error is raised by its own call."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch

from flatradix import meta, namespaces
from flatradix import policy as policies
from flatradix.arguments import (
    check_counts,
    check_table,
    nothing_behind,
    per_query,
    starts,
    to_int64,
    token_count,
)
from flatradix.buffers import Batch, is_single, read_batch, read_one
from flatradix.device_input import upload_numbers
from flatradix.layout import FREE_ROW, TreeState, allocate, pool_units
from flatradix.namespaces import Namespaces
from flatradix.policy import Policy
from flatradix.ragged import Ragged
from flatradix.refusals import BAD_SLOT, NO_CAPACITY, NO_ROOM, refuse, refuse_capacity
from flatradix.results import EvictResult, InsertResult, MatchResult, Places, places_of
from flatradix.slot_pool import DeviceSlots, HostSlots, Ranges, refuse_slot
from flatradix.tree import RadixTree

_NO_SCORES = np.empty(0, np.int64)

_ERROR_QUERY, _ERROR_VALUE = meta.ERROR_QUERY, meta.ERROR_VALUE
_EVICTABLE, _PROTECTED, _NODES = meta.EVICTABLE, meta.PROTECTED, meta.NODES
_RELEASED, _ROWS = meta.RELEASED, meta.ROWS


class HostTree(RadixTree):
    """A RadixTree on the CPU; numba kernels do the work."""

    def _allocate(self, generation: int) -> None:
        state = allocate(self.max_tokens, self.page_size, self.bigram, generation)
        state.meta[meta.POLICY] = self._policy_code
        state.meta[meta.THRESHOLD] = policies.SLRU_THRESHOLD
        self._state = state
        self._table = self._kernels.address_table(state)
        arrays: list[Any] = [tensor.numpy() for tensor in state]
        host: Any = TreeState(*arrays)
        self._host = host
        self._ranges = np.empty((2, 64), np.int32)
        self._meta = memoryview(host.meta.data)
        self._namespaces = Namespaces(host.namespace_hash)
        units = pool_units(self.max_tokens, self.page_size)
        self._slots: HostSlots | DeviceSlots
        if self.slot_device is None:
            self._slots = HostSlots(units, self.slot_dtype, self._kernels)
        else:
            self._slots = DeviceSlots(units, self.slot_dtype, self.slot_device)
        self._pool = self._slots.values

    def match(
        self, q: Any, namespace: Any = None, touch: bool = True, lock: bool = False, start: Any = None
    ) -> MatchResult:
        if start is None and is_single(q):
            key = read_one(q, "tokens")
            code = 0 if namespace is None else self._namespaces.find(namespaces.only(namespace))
            length, handle = self._kernels.match_one(self._table, key[0], key[2], key[1], code, bool(touch), bool(lock))
            if length < 0:
                self._refuse("match", length)
            return MatchResult.single(length, handle)
        return self._match_batch(
            read_batch(nothing_behind(start, q), "tokens"), namespace, bool(touch), bool(lock), start
        )

    def _match_batch(self, keys: Batch, namespace: Any, touch: bool, lock: bool, start: Any) -> MatchResult:
        names = namespaces.spread(namespace, len(keys))
        codes = np.array([self._namespaces.find(name) for name in names], np.int64)
        named = np.array([name is not None for name in names], np.bool_)
        start_lengths, start_handles = starts(start, len(keys))
        lengths = torch.empty(len(keys), dtype=torch.int32, device="cpu")
        handles = torch.empty(len(keys), dtype=torch.int64, device="cpu")
        reason = self._kernels.match(
            self._table, keys.addresses, keys.wide, keys.counts, codes, named, start_handles, start_lengths,
            touch, lock, lengths.numpy(), handles.numpy(),
        )  # fmt: skip
        if reason < 0:
            self._refuse("match", reason)
        return MatchResult(lengths, handles)

    def slots(self, places: Any) -> Ragged:
        if isinstance(places, Places) and places._handles is None:
            values = self._path_slots(places)
            return Ragged.trusted(values, upload_numbers(np.array([0, len(values)]), values.device))
        ranges, offsets = self._paths(*places_of(places))
        values = self._slots.gather(ranges)
        return Ragged.trusted(values, upload_numbers(offsets, values.device))

    def _paths(self, lengths: torch.Tensor, handles: torch.Tensor) -> tuple[Ranges, np.ndarray]:
        """The ranges of the paths to places, and where among them those of each begin: int64 [B + 1]."""
        ends, rows = lengths.contiguous().numpy(), handles.contiguous().numpy()
        nodes = self._kernels.count_path_nodes(self._table, rows, ends)
        if nodes < 0:
            self._refuse("slots", nodes)
        starts, counts = self._room_for_ranges(nodes)
        self._kernels.path_ranges(self._table, rows, ends, starts, counts)
        offsets = np.zeros(len(ends) + 1, np.int64)
        np.cumsum(ends, out=offsets[1:])
        return Ranges(starts, counts, int(offsets[-1])), offsets

    def _path_slots(self, place: Places) -> torch.Tensor:
        """The slots of a single place, int64 [length]."""
        handle, length = place.handle, place.length
        nodes = self._kernels.path_ranges_one(self._table, handle, length, self._ranges[0], self._ranges[1])
        if nodes < 0:
            self._refuse("slots", nodes)
        if nodes > self._ranges.shape[1]:
            self._room_for_ranges(nodes)
            return self._path_slots(place)
        return self._slots.gather(Ranges(self._ranges[0, :nodes], self._ranges[1, :nodes], length))

    def _room_for_ranges(self, nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of that many ranges, int32, to be filled; the arrays are used again by the next call."""
        if nodes > self._ranges.shape[1]:
            self._ranges = np.empty((2, 2 * nodes), np.int32)
        return self._ranges[0, :nodes], self._ranges[1, :nodes]

    def lock(self, places: Any) -> None:
        if isinstance(places, Places) and places._handles is None:
            handle = self._kernels.lock_one(self._table, places._handle, places._length)
            if handle < 0:
                self._refuse("lock", handle)
            places._handle = handle
            return
        lengths, handles = places_of(places)
        if len(handles) > 1 and handles.stride(0) == 0:
            raise ValueError("lock: the handles share memory, and each may be renewed; pass handles.clone()")
        renewed = handles.contiguous()
        reason = self._kernels.lock(self._table, renewed.numpy(), lengths.numpy())
        if reason < 0:
            self._refuse("lock", reason)
        if renewed is not handles:
            handles.copy_(renewed)

    def unlock(self, places: Any) -> None:
        if isinstance(places, Places) and places._handles is None:
            reason = self._kernels.unlock_one(self._table, places._handle, places._length)
        else:
            lengths, handles = places_of(places)
            reason = self._kernels.unlock(self._table, handles.contiguous().numpy(), lengths.numpy())
        if reason < 0:
            self._refuse("unlock", reason)

    def insert(
        self,
        q: Any,
        slots: Any,
        namespace: Any = None,
        priority: Any = 0,
        start: Any = None,
        inserted_lengths: Any = 0,
    ) -> InsertResult:
        if is_single(q) and isinstance(priority, int) and isinstance(inserted_lengths, int):
            priority = to_int64(priority, "priority")
            inserted_lengths = to_int64(inserted_lengths, "inserted_lengths")
            if start is None:
                return self._insert_one(q, slots, namespace, priority, meta.NO_HANDLE, 0, inserted_lengths)
            if isinstance(start, Places) and start._handles is None:
                place = (start._handle, start._length)
                return self._insert_one(q, slots, namespace, priority, *place, inserted_lengths)
        q, slots = nothing_behind(start, q), nothing_behind(start, slots)
        keys = read_batch(q, "tokens")
        priorities = per_query(priority, len(keys), "priority")
        inserted = per_query(inserted_lengths, len(keys), "inserted_lengths")
        return self._insert_batch(keys, slots, namespace, priorities, start, inserted)

    def _insert_one(
        self, q: Any, slots: Any, namespace: Any, priority: int, handle: int, start: int, inserted: int
    ) -> InsertResult:
        address, count, wide, _owner = read_one(q, "tokens")
        if isinstance(slots, Ragged) or (isinstance(slots, list | tuple) and len(slots) and not is_single(slots)):
            if len(slots) != 1:
                raise ValueError(f"insert: 1 queries, but slots for {len(slots)}")
            slots = slots[0]
        source = self._slots.read_one(slots, self.check_slots)
        if source[1] != count:
            raise ValueError(f"insert: query 0: it has {count} tokens, but {source[1]} slots; give one slot a token")
        if namespace is not None:
            namespace = namespaces.only(namespace)
        code = 0 if namespace is None else self._namespaces.find(namespace)
        fresh = code < 0 and start == 0 and count - self.bigram >= self.page_size
        if fresh:
            code = self._namespaces.give(namespace)
        pool, pool_wide, limit = self._slots.arguments
        arguments = (
            address, wide, count, code, namespace is not None, handle, start, priority, inserted,
            source[0], source[2], pool, pool_wide, limit,
        )  # fmt: skip
        try:
            prefix, length, end, place = self._kernels.insert_one(self._table, *arguments)
            if prefix == NO_ROOM:
                self._compact()
                prefix, length, end, place = self._kernels.insert_one(self._table, *arguments)
            if prefix == BAD_SLOT:
                self._refuse_slot(np.asarray(source[3]))
            if prefix < 0:
                self._refuse("insert", prefix)
        except BaseException:
            if fresh and not self._holds(code):
                self._namespaces.take_back(code)
            raise
        if isinstance(self._slots, DeviceSlots):
            self._slots.write_one(place, source, prefix - start, length - prefix)
        return InsertResult.single_insert(prefix, length, end)

    def _insert_batch(
        self, keys: Batch, slots: Any, namespace: Any, priorities: np.ndarray, start: Any, inserted: np.ndarray
    ) -> InsertResult:
        source: Any = self._slots.read(slots, self.check_slots)
        check_counts(keys.counts, source.counts)
        names = namespaces.spread(namespace, len(keys))
        start_lengths, start_handles = starts(start, len(keys))
        codes, fresh = self._codes_to_insert(names, keys.counts, start_lengths)
        named = np.array([name is not None for name in names], np.bool_)
        prefixes = torch.empty(len(keys), dtype=torch.int32, device="cpu")
        lengths = torch.empty(len(keys), dtype=torch.int32, device="cpu")
        handles = torch.empty(len(keys), dtype=torch.int64, device="cpu")
        places = np.empty(len(keys), np.int64)
        arguments = (
            self._table, keys.addresses, keys.wide, keys.counts, codes, named, start_handles, start_lengths,
            priorities, inserted, source.addresses, source.wide, *self._slots.arguments,
            prefixes.numpy(), lengths.numpy(), handles.numpy(), places,
        )  # fmt: skip
        try:
            reason = self._kernels.insert(*arguments)
            if reason == NO_ROOM:
                self._compact()
                reason = self._kernels.insert(*arguments)
            if reason == BAD_SLOT:
                self._refuse_slot(np.asarray(slots if is_single(slots) else slots[self._meta[_ERROR_QUERY]]))
            if reason < 0:
                self._refuse("insert", reason)
        except BaseException:
            for code in fresh:
                if not self._holds(code):
                    self._namespaces.take_back(code)
            raise
        if isinstance(self._slots, DeviceSlots):
            new = (lengths - prefixes).numpy()
            self._slots.write(places, source, prefixes.numpy() - start_lengths, new)
        return InsertResult(prefixes, lengths, handles)

    def _codes_to_insert(
        self, names: Any, counts: np.ndarray, start_lengths: np.ndarray
    ) -> tuple[np.ndarray, list[int]]:
        """The namespace code of each query, and those given out for it: only to a key that will store something."""
        codes = np.zeros(len(names), np.int64)
        fresh: list[int] = []
        for query, name in enumerate(names):
            code = self._namespaces.find(name)
            stores = counts[query] - self.bigram >= self.page_size and start_lengths[query] == 0
            if code < 0 and stores:
                code = self._namespaces.give(name)
                fresh.append(code)
            codes[query] = code
        return codes, fresh

    def _holds(self, code: int) -> bool:
        """Whether a namespace has nodes. A batch that does not fit may have been given codes beyond the array."""
        children = self._host.namespace_children
        return code < len(children) and bool(children[code])

    def _compact(self) -> None:
        """Slide all edges to the front of the pools: O(cached tokens); happens when no free range is long enough."""
        if isinstance(self._slots, DeviceSlots):
            moves = [np.empty(self.num_nodes, np.int32) for _ in range(3)]
            self._kernels.plan_compaction(self._table, *moves)
            self._slots.move(*moves)
        self._kernels.compact(self._table, *self._slots.arguments[:2])

    def _rebuild(self) -> None:
        """Make what is derived, after rows and pools were filled from a file or another tree."""
        self._kernels.rebuild(self._table)
        if isinstance(self._slots, DeviceSlots):
            self._slots.longest = int(self._host.length[: self._meta[_ROWS]].max(initial=0))

    def _first_unit(self) -> int:
        """Where the pools begin once they are compacted."""
        return 0

    def evict(self, num_tokens: int) -> EvictResult:
        wanted = token_count(num_tokens)
        room = None
        if isinstance(self._slots, DeviceSlots):
            self._slots.refuse_capture()
            room = self._slots.room_for(
                wanted, self.evictable_tokens, min(self.num_nodes, -(-wanted // self.page_size))
            )
        scores = _NO_SCORES if self._score is None else self._scores(self._score)
        tokens, nodes = self._kernels.evict(self._table, wanted, scores)
        if self._meta[_RELEASED]:
            self._forget_namespaces()
        starts, counts = self._room_for_ranges(nodes)
        self._kernels.victim_ranges(self._table, starts, counts)
        ranges = Ranges(starts, counts, tokens)
        return EvictResult(self._slots.gather(ranges, room), tokens, nodes)

    def _scores(self, policy: Policy) -> np.ndarray:
        rows = self._meta[_ROWS]
        s = self._state
        columns = (s.tick, s.created, s.priority, s.hit_count, s.lock_ref, s.children, s.length, s.end)
        live = s.parent[:rows] != FREE_ROW
        live[0] = False
        return policies.scores_of(policy, policies.Nodes(*(column[:rows] for column in columns)), live).numpy()

    def _forget_namespaces(self) -> None:
        for code in self._host.released[: self._meta[_RELEASED]].tolist():
            self._namespaces.take_back(code)
        self._meta[_RELEASED] = 0

    @property
    def evictable_tokens(self) -> int:
        return self._meta[_EVICTABLE]

    @property
    def protected_tokens(self) -> int:
        return self._meta[_PROTECTED]

    @property
    def num_nodes(self) -> int:
        return self._meta[_NODES]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._state) + self._pool.nbytes

    def digest(self) -> str:
        slots = self._pool.cpu()
        pool = (slots.data_ptr(), slots.dtype == torch.int64)
        lanes = [self._kernels.digest(self._table, *pool, lane) for lane in (0, 1)]
        return "".join(f"{lane & (2**64 - 1):016x}" for lane in lanes)

    def reset(self) -> None:
        self._kernels.reset(self._table)
        self._namespaces.clear()

    def _refuse_slot(self, slots: np.ndarray) -> None:
        position = self._meta[_ERROR_VALUE]
        refuse_slot(int(slots[position]), self._meta[_ERROR_QUERY], position, self.slot_dtype)

    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None:
        lengths, handles = (tensor.contiguous() for tensor in places_of(places))
        numbers = check_table(table, rows, len(handles), self._slots.device, self.slot_dtype).cpu().numpy()
        pool = self._slots.arguments[:2]
        reason = self._kernels.write_slots(
            self._table, handles.numpy(), lengths.numpy(), numbers, *pool,
            table.data_ptr(), table.dtype == torch.int64, table.stride(0), *table.shape,
        )  # fmt: skip
        if reason < 0:
            self._refuse("write_slots", reason)
        if isinstance(self._slots, DeviceSlots):
            self._slots.write_rows(*self._paths(lengths, handles), table, numbers)

    def raise_pending(self) -> None:
        return

    @property
    def total_tokens(self) -> int:
        return self._meta[_EVICTABLE] + self._meta[_PROTECTED]

    def _refuse(self, operation: str, reason: int) -> NoReturn:
        if reason == NO_CAPACITY:
            free = self.max_tokens - self.total_tokens
            refuse_capacity(self._meta[_ERROR_VALUE], free, self.evictable_tokens, self.max_tokens)
        refuse(operation, reason, self._meta[_ERROR_QUERY], self._meta[_ERROR_VALUE])
