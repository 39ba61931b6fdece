"""Matching: prompts against a tree in host memory."""

from __future__ import annotations

from array import array
from threading import get_ident
from typing import Any

import torch

from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.host.core import NOTHING_TO_UNDO, Core
from flatradix.inputs.places import read_starts
from flatradix.inputs.ragged import read_batch
from flatradix.inputs.sequences import Batch, read_host_key
from flatradix.kernels import cpu
from flatradix.kernels.cpu import match_one
from flatradix.results import (
    MatchResult,
    one_match,
)


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
            key = read_host_key(q, "tokens") if start is None else None
            if key is None:
                return self._match_batch(read_batch(q, "tokens"), namespace, touch, lock, start, split)
            code = 0 if namespace is None else self._code(namespace)
            return self._match_one(key[0], key[2], key[1], code, touch, lock, split)
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
            address, count = tokens.buffer_info()
            if tokens.typecode != "q":
                raise ValueError(f"match_array takes an array of int64 ('q'), not of typecode {tokens.typecode!r}")
            if limit is not None and limit < count:
                count = max(limit, 0)
            code = 0 if namespace is None else self._code(namespace)
            return self._match_one(address, True, count, code, True, False, split)
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

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

    @public_call
    def rematch(self, q: Any, places: Any, namespace: Any = None) -> MatchResult:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
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
            if self.busy == me:
                self.busy = CUT_SHORT
            raise
