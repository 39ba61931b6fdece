"""Evicting: victims of a tree in host memory, and what drop removes."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import numpy as np
import torch

from flatradix import dropping
from flatradix.dropping import NOT_GIVEN, times_of
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.host.core import Core
from flatradix.host.rehearsal import tokens_freed
from flatradix.host.slots import EvictionMemory
from flatradix.inputs.arguments import check_out, token_count
from flatradix.inputs.places import read_places
from flatradix.inputs.policy import Nodes, Score, scores_of
from flatradix.inputs.refuse import refuse_out
from flatradix.kernels import cpu
from flatradix.layout import numbers
from flatradix.layout.state import FREE_ROW
from flatradix.results import EvictIntoResult, EvictResult, written

_NO_SCORES = np.empty(0, np.int64)


class Evicting(Core):
    """Evict, drop."""

    @public_call
    def evict(self, num_tokens: Any, out: torch.Tensor | None = None) -> EvictResult | EvictIntoResult:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
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
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _freed(self, room: EvictionMemory, tokens: int, ranges: int) -> torch.Tensor:
        """Return the slots that a kernel has freed, and note what else has gone."""
        slots = room.slots(tokens, ranges)
        self._note_victims(slots)
        if self._numbers[numbers.RELEASED]:
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

    def _most_freed(self, wanted: int) -> tuple[int, int]:
        """Return the most slots that an eviction frees, and the most pool ranges in which they lie.

        The eviction frees fewer tokens than `wanted` plus the longest edge, and by pages than `wanted` plus a page.
        """
        most, most_ranges, page = self._numbers[numbers.EVICTABLE], self._numbers[numbers.NODES], self.options.page_size
        beyond = page if self._by_page else self._numbers[numbers.LONGEST]
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

    def _scores(self, score: Score) -> np.ndarray:
        rows = self._numbers[numbers.ROWS]
        s = self._state
        created = torch.from_numpy(times_of(self._arrays.created[:rows]))
        columns = (s.tick, created, s.priority, s.hit_count, s.lock_ref, s.children, s.length, s.end)
        live = self._arrays.parent[:rows] != FREE_ROW
        live[0] = False
        return scores_of(score, Nodes(*(column[:rows] for column in columns)), torch.from_numpy(live)).numpy()

    def _forget_namespaces(self) -> None:
        released = self._arrays.released[: self._numbers[numbers.RELEASED]].tolist()
        self._namespaces.forget(released, self._arrays.namespace_children)
        self._numbers[numbers.RELEASED] = 0

    # Drop

    @public_call
    def drop(self, places: Any = None, namespace: Any = NOT_GIVEN) -> EvictResult:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
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
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _plan_drop(self, places: Any, namespace: Any) -> dropping.Plan:
        dropping.check_arguments(places, namespace)
        used, state = self._numbers[numbers.ROWS], self._arrays
        settings = dropping.Settings(self._numbers[numbers.GENERATION], self.options.page_size, self._by_page)
        columns = {name: getattr(state, name)[:used] for name in dropping.COLUMNS}
        rows = dropping.Rows(**columns, settings=settings)
        if places is None:
            return rows.plan(rows.tops_of(self._namespaces.find(namespace)))
        lengths, handles = read_places(places)
        return rows.plan(rows.of_places(handles.numpy(), lengths.numpy()))
