"""Inserting: prompts and their slots into a tree on a GPU."""

from __future__ import annotations

from threading import get_ident
from typing import Any

from flatradix.device import interrupted
from flatradix.device.core import Core
from flatradix.device.input import as_batch, read_keys, read_numbers, read_slots
from flatradix.device.interrupted import NOTHING_YET
from flatradix.device.mailbox import is_later
from flatradix.device.names import NAME_IN_GRAPH
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.inputs import namespaces
from flatradix.inputs.upload import HOST_IN_GRAPH
from flatradix.kernels import gpu
from flatradix.layout import mail
from flatradix.layout.queries import Values
from flatradix.results import InsertResult, late_insert


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
            device = self.device
            keys = read_keys(q, device)
            source = read_slots(slots, keys, device, self._arrays.pool_wide)
            priorities = read_numbers(priority, keys.batch, device, "priority")
            inserted = read_numbers(inserted_lengths, keys.batch, device, "inserted_lengths")
            starts = self._starts(start, keys.batch)
            if keys.batch == 0:
                namespaces.spread(namespace, 0)  # raises for a bad namespace
                nothing = late_insert(self._results.many(self, 0, 0))
                self.busy = FREE
                return nothing
            captured = self._calls.is_capturing()
            if captured:
                self._check_graph_holds_insert(keys, source, namespace)
            self._ensure_scratch(keys.batch)
            self._open = NOTHING_YET
            if self.options.grows:
                self._make_room(keys.total)
            names = self._names.give(namespace, keys, self._wait)
            may_compact = captured or self._may_compact(keys.total)
            one = not may_compact and gpu.is_one(keys, names, priorities, inserted)
            if not one and keys.offsets == 0:
                keys, source = as_batch(keys, device), source if source.offsets else as_batch(source, device)
            call = self._calls.next()
            late = self._late_result(keys, call, captured=captured)
            self._open = interrupted.INSERT, call, self._changes, None, keys.batch
            arrays, out = self._arrays, late.output()
            if one:
                numbers_of_key = names.number, starts, priorities.number, inserted.number
                while not gpu.insert_one(arrays, self._stages.desk, keys, source, *numbers_of_key, out, call):
                    self._stages.wait()
            else:
                gpu.insert(arrays, keys, source, names, starts, priorities, inserted, out, call, may_compact)
            self._calls.enqueued(call, True, captured)
            if captured:
                self._graph_inserts = True
                self._unseen_inserts.clear()
            elif not self._graph_inserts:
                self._unseen_inserts.append((call, keys.total))
            self.last_result = result = late_insert(late)
            self._changes += 1
            self._open = None
            self.busy = FREE
            return result
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _check_graph_holds_insert(self, keys: Values, slots: Values, namespace: Any) -> None:
        """Raise RuntimeError for an insert that needs the host."""
        if keys.on_host or slots.on_host:
            raise RuntimeError(HOST_IN_GRAPH)
        if namespace is not None:
            raise RuntimeError(NAME_IN_GRAPH)
        if self.options.grows:
            raise RuntimeError(
                "a CUDA graph cannot hold an insert into a tree without max_tokens, as that may grow: give max_tokens"
            )

    def _may_compact(self, total: int) -> bool:
        """Return whether the pools may lack space for `total` units, as far as the host knows now."""
        if self._graph_inserts or self._calls.rehearsing:
            return True  # replays may have inserted anything
        told, room = self.mailbox.latest(mail.FREE_UNITS)
        while self._unseen_inserts and not is_later(self._unseen_inserts[0][0], told):
            self._unseen_inserts.popleft()
        return room - sum([count for _, count in self._unseen_inserts]) < total
