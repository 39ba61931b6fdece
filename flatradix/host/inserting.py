"""Inserting: prompts and their slots into a tree in host memory."""

from __future__ import annotations

from threading import get_ident
from typing import Any, NoReturn

import numpy as np
import torch

from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.host.core import Core
from flatradix.host.slots import SlotBatch
from flatradix.inputs import namespaces
from flatradix.inputs.arguments import check_counts, per_query, to_int64
from flatradix.inputs.places import read_starts
from flatradix.inputs.ragged import read_batch
from flatradix.inputs.refuse import refuse_slot, refuse_unequal
from flatradix.inputs.sequences import Batch, is_batch, read_one
from flatradix.kernels import cpu
from flatradix.kernels.cpu import insert_one
from flatradix.layout import numbers, reasons
from flatradix.layout.handles import NO_HANDLE
from flatradix.results import InsertResult, Places, one_insert


class Inserting(Core):
    """Insert."""

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
        self.busy = me if not self.busy else self.recover(me)
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
            if self.busy == me:
                self.busy = CUT_SHORT
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
            pool.compact(call, self._numbers[numbers.NODES])
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
            pool.compact(call, self._numbers[numbers.NODES])
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
