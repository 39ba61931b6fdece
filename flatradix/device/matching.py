"""Matching: prompts against a tree on a GPU."""

from __future__ import annotations

from array import array
from threading import get_ident
from typing import Any

from flatradix.device import interrupted
from flatradix.device.core import Core
from flatradix.device.input import as_batch, of_key, read_values
from flatradix.device.interrupted import NOTHING_YET
from flatradix.device.names import NAME_IN_GRAPH
from flatradix.device.results import Awaited
from flatradix.device.stages import Stages
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.inputs import namespaces
from flatradix.inputs.ragged import Ragged
from flatradix.inputs.sequences import Buffer, read_host_key, read_one
from flatradix.inputs.upload import HOST_IN_GRAPH
from flatradix.kernels import gpu
from flatradix.layout.desk import LONG_COUNT, LONG_TOKENS, STAGED_TOKENS
from flatradix.layout.queries import PlaceAddresses, Values
from flatradix.results import MatchResult, late_match


class Matching(Core):
    """Match, also from a known place."""

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
        self.busy = me if not self.busy else self.recover(me)
        try:
            hold = 1 if lock else 2 * bool(split)
            key = read_host_key(q, "tokens") if start is None else None
            if key is None:
                keys = read_values(q, self.device, "tokens")
                self._open = NOTHING_YET
                result = self._match_values(keys, namespace, bool(touch), hold, start)
            else:
                self._open = NOTHING_YET
                result = self._match_key(key, namespace, bool(touch), hold)
            if lock:
                self.last_result = result
                self._changes += 1
            self._open = None
            self.busy = FREE
            return result
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def lock_prompts(self, prompts: Ragged, namespace: Any) -> MatchResult:
        """Match prompts on the device without their last tokens and without a touch, and lock them. One launch."""
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            keys = read_values(prompts, self.device, "tokens")._replace(left_out=1)
            self._open = NOTHING_YET
            self.last_result = result = self._match_values(keys, namespace, False, 1, None)
            self._changes += 1
            self._open = None
            self.busy = FREE
            return result
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def match_array(
        self, tokens: array[int], limit: int | None = None, namespace: Any = None, split: bool = False
    ) -> MatchResult:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            if tokens.typecode != "q":
                raise ValueError(f"match_array takes an array of int64 ('q'), not of typecode {tokens.typecode!r}")
            key = read_one(tokens if limit is None else memoryview(tokens)[: max(limit, 0)], "tokens")
            self._open = NOTHING_YET
            result = self._match_key(key, namespace, True, 2 * bool(split))
            self._open = None
            self.busy = FREE
            return result
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _match_key(self, key: Buffer, namespace: Any, touch: bool, hold: int) -> MatchResult:
        """Match one key in host memory. Its kernel reads a short key from pinned memory. hold: `lock` of gpu.match."""
        if key[1] > LONG_TOKENS:
            return self._match_values(of_key(key, self.device), namespace, touch, hold, None)
        name = 0 if namespace is None else self._names.find(namespaces.only(namespace), 1).number
        call, stream, captured = self._calls.begin()
        if captured:
            raise RuntimeError(HOST_IN_GRAPH)
        chunk, at = self._results.reserve()
        lengths, handles = chunk.length_address + 4 * at, chunk.handle_address + 8 * at
        stages = self._stages if key[1] <= STAGED_TOKENS else self._for_long_keys()
        if hold == 1:
            self._note_locks(1, "match")
            place = PlaceAddresses(handles, lengths, 1, chunk)
            self._open = interrupted.LOCK, call, self._changes, place
        while not gpu.match_one(self._arrays, stages.desk, key, name, lengths, handles, call, touch, hold, stream):
            stages.wait()
        # The result is made while the kernel runs.
        self._calls.enqueued_outside(call, hold > 0)
        return late_match(Awaited(self, call, chunk, at))

    def _for_long_keys(self) -> Stages:
        if self._long_stages is None:
            self._long_stages = Stages(self.device, self.mailbox, LONG_TOKENS, LONG_COUNT)
        return self._long_stages

    def _match_values(self, keys: Values, namespace: Any, touch: bool, hold: int, start: Any) -> MatchResult:
        if namespace is not None and self._calls.is_capturing():
            raise RuntimeError(NAME_IN_GRAPH)
        names = self._names.find(namespace, keys.batch)
        starts = self._starts(start, keys.batch)
        if keys.batch == 0:
            return late_match(self._results.many(self, 0, 0))
        self._ensure_scratch(keys.batch)
        captured = self._calls.is_capturing()
        if keys.offsets == 0 and (captured or self._calls.rehearsing):
            keys = as_batch(keys, self.device)  # a single key's kernel would write its answer again at each replay
        call = self._calls.next()
        told = -1 if captured or keys.offsets == 0 else self.mailbox.reserve_lengths(keys.batch)
        late = self._late_result(keys, call, told, captured)
        if hold == 1:
            self._note_locks(keys.batch, "match")
            self._open = interrupted.LOCK, call, self._changes, late.places
        gpu.match(self._arrays, keys, names, starts, late.output(told), call, touch, hold)
        self._calls.enqueued(call, hold > 0, captured)
        return late_match(late)

    @public_call
    def rematch(self, q: Any, places: Any, namespace: Any = None) -> MatchResult:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            keys = read_values(q, self.device, "tokens")
            names = self._names.find(namespace, keys.batch)
            old = self._starts(places, keys.batch)
            self._open = NOTHING_YET
            call = self._calls.next()
            captured = self._calls.is_capturing()
            late = self._results.many(self, call, keys.batch, captured=captured)
            if keys.batch:
                self._ensure_scratch(keys.batch)
                gpu.rematch(self._arrays, keys, names, old, late.output(), call)
                self._calls.enqueued(call, False, captured)
            self._open = None
            self.busy = FREE
            return late_match(late)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise
