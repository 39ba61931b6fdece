"""DeviceTree: the tree on a GPU. Enqueues kernels, and waits for none of them unless it returns what they found."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flatradix import backend, meta, namespaces
from flatradix import policy as policies
from flatradix.arguments import check_table, nothing_behind, token_count
from flatradix.buffers import Buffer, is_single, read_one
from flatradix.device_arguments import DeviceArguments
from flatradix.device_input import HOST_IN_GRAPH, STAGED_BYTES, Stages, read_values, upload_numbers
from flatradix.device_results import AwaitedInsert, AwaitedMatch, Singles
from flatradix.errors import TooLargeForDeviceError
from flatradix.layout import FREE_ROW, MAX_UNITS, Workspace, allocate_device, pool_units
from flatradix.mailbox import abandon, is_later
from flatradix.namespaces import Namespaces, name_hash
from flatradix.ragged import Ragged
from flatradix.results import EvictResult, InsertResult, MatchResult, places_of

_SMALLEST_BATCH = 1024


class DeviceTree(DeviceArguments):
    """A RadixTree on a GPU; Triton kernels do the work."""

    def _allocate(self, generation: int) -> None:
        if backend.interpreted():
            self.device = torch.device("cpu")
        units = pool_units(self.max_tokens, self.page_size)
        if 2 * units > MAX_UNITS:
            raise TooLargeForDeviceError(
                f"max_tokens {self.max_tokens} is too large for a tree on a GPU: at most 8.5e8 tokens"
            )
        device = self.device
        state = allocate_device(self.max_tokens, self.page_size, self.bigram, generation, device)
        self._state = state
        self._pool = torch.zeros(2 * units, dtype=self.slot_dtype, device=device)
        self._wide = self.slot_dtype == torch.int64
        self._limit = int(torch.iinfo(self.slot_dtype).max)
        self._begin_calls()
        self._mail.words[meta.MAIL_ROOM] = units
        self._stages = Stages(device, self._mail)
        self._singles = Singles(device)
        self._staged = torch.empty(STAGED_BYTES, dtype=torch.int8, device=device)
        self._staging = self._staged.data_ptr()
        # Names are compared on the host; only the digest wants their hashes on the device.
        self._namespaces = Namespaces(np.zeros(len(state.namespace_hash), np.int64))
        self._unbooked: deque[tuple[int, int]] = deque()
        self._retired: list[Workspace] = []
        self._workspace = self._make_workspace(_SMALLEST_BATCH)
        self._bound = self._kernels.bind(state, self._workspace)

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "_stages") and not is_finalizing():  # else there was no memory for it, or all is going
            abandon(self._mail, self._stages)

    def _make_workspace(self, batch: int, old: Workspace | None = None) -> Workspace:
        """Scratch for batches of up to so many queries; what does not depend on that is taken over from `old`."""
        device, rows = self.device, len(self._state.parent)

        def zeros(*shape: int, kind: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        if old is None:
            old = Workspace(
                place=zeros(rows, kind=torch.int32),
                undo=zeros(rows),
                above=zeros(meta.HINTS * rows, kind=torch.int32),
                key=zeros(rows),
                number=zeros(meta.NUMBERS),
                partial=zeros(meta.PARTIALS),
                query=zeros(0, kind=torch.int32),
                value=zeros(0),
                claims=zeros(0, kind=torch.int32),
                victims=zeros(2, rows, kind=torch.int32),
                mail=self._mail.words,
            )
            old.number[meta.ERROR] = meta.NO_ERROR
        claims = torch.full((2, 4 * batch), -1, dtype=torch.int32, device=device)
        query = zeros(meta.QUERY_COLUMNS, batch, kind=torch.int32)
        return old._replace(query=query, value=zeros(batch), claims=claims)

    @property
    def _by_tick(self) -> bool:
        return self._score is None and self._policy_code == meta.LRU

    def _room_for(self, batch: int) -> None:
        """Have scratch for a batch. Its memory stays until the tree goes: a stream may still work in the old one."""
        if batch <= len(self._workspace.value):
            return
        if self._is_capturing():
            raise RuntimeError(f"run a batch of {batch} once before a CUDA graph is captured with it")
        self._retired.append(self._workspace)
        self._workspace = self._make_workspace(1 << (batch - 1).bit_length(), self._workspace)
        self._bound = self._kernels.bind(self._state, self._workspace)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._state, *self._workspace)) + self._pool.nbytes

    # Match

    def match(
        self, q: Any, namespace: Any = None, touch: bool = True, lock: bool = False, start: Any = None
    ) -> MatchResult:
        if start is None and is_single(q) and not (isinstance(q, torch.Tensor) and not q.is_cpu):
            key = read_one(q, "tokens")
            if key[1] * 8 <= STAGED_BYTES:
                return self._match_one(key, namespace, bool(touch), bool(lock))
        keys = read_values(nothing_behind(start, q), self.device, "tokens")
        batch = keys.batch
        if namespace is not None and self._is_capturing():
            raise RuntimeError("a CUDA graph cannot hold a namespace: what it is called inside changes as others go")
        names, name, _names_owner = self._read_names(namespace, batch)
        handles, lengths, _start_owner = self._read_starts(start, batch)
        if batch == 0:
            return MatchResult(*self._outputs(0))
        self._room_for(batch)
        call = self._next_call()
        if keys.offsets == 0 and self._is_capturing():
            keys = keys.as_batch(self.device)  # a single key answers, and each replay would answer again
        if keys.offsets == 0:
            chunk, place = self._singles.take()
            single = AwaitedMatch(self, call, chunk, place)
            handle_out, length_out = single.addresses()
            result: MatchResult = single
        else:
            out = self._outputs(batch)
            length_out, handle_out = (tensor.data_ptr() for tensor in out)
            result = MatchResult(*out)
        self._kernels.match(
            self._bound, keys.address, keys.wide, keys.offsets, keys.total, batch, names, name,
            handles, lengths, length_out, handle_out, call,
            self.page_size, self.bigram, bool(touch), bool(lock),
        )  # fmt: skip
        self._enqueued(call, bool(lock))
        return result

    def _match_one(self, key: Buffer, namespace: Any, touch: bool, lock: bool) -> MatchResult:
        """A short key in host memory, which the kernel reads from pinned memory."""
        address, count, wide, _owner = key
        name = 0 if namespace is None else self._read_names(namespaces.only(namespace), 1)[1]
        if self._is_capturing():
            raise RuntimeError(HOST_IN_GRAPH)
        values = self._stages.put(address, count * 8 if wide else count * 4)
        call = self._next_call()
        chunk, place = self._singles.take()
        result = AwaitedMatch(self, call, chunk, place)
        handle_out, length_out = result.addresses()
        self._kernels.match_one(
            self._bound, values, wide, count, name, length_out, handle_out, self._staging, call,
            self.page_size, self.bigram, touch, lock,
        )  # fmt: skip
        self._stages.commit(call)
        self._mail.last = call
        if lock:
            self._mail.last_change = call
        return result

    def _outputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [B] lengths and int64 [B] handles, uninitialised."""
        lengths = torch.empty(batch, dtype=torch.int32, device=self.device)
        return lengths, torch.empty(batch, dtype=torch.int64, device=self.device)

    # Lock

    def lock(self, places: Any) -> None:
        if isinstance(places, AwaitedMatch | AwaitedInsert):
            self._lock(*self._addresses(places), 1)
            places.forget_handle()
            return
        lengths, handles = places_of(places, self.device)
        if len(handles) > 1 and handles.stride(0) == 0:
            raise ValueError("lock: the handles share memory, and each may be renewed; pass handles.clone()")
        renewed = handles.contiguous()
        self._lock(renewed.data_ptr(), lengths.data_ptr(), len(handles))
        if renewed is not handles:
            handles.copy_(renewed)

    def _lock(self, handles: int, lengths: int, batch: int) -> None:
        if batch:
            self._room_for(batch)
            call = self._next_call()
            self._kernels.lock(self._bound, handles, lengths, batch, call, self.page_size, self.bigram)
            self._enqueued(call)

    def unlock(self, places: Any) -> None:
        if isinstance(places, AwaitedMatch | AwaitedInsert):
            self._unlock(*self._addresses(places), 1)
            return
        lengths, handles = self._places(places)
        self._unlock(handles.data_ptr(), lengths.data_ptr(), len(handles))

    def _unlock(self, handles: int, lengths: int, batch: int) -> None:
        if batch:
            self._room_for(batch)
            call = self._next_call()
            self._kernels.unlock(self._bound, handles, lengths, batch, call, self.page_size)
            self._enqueued(call)

    def _addresses(self, places: AwaitedMatch | AwaitedInsert) -> tuple[int, int]:
        """Of the handle and the length of a single result, which must be of this device."""
        if places._tree.device != self.device:
            places_of(places, self.device)  # raises
        return places.addresses()

    # Slots

    def slots(self, places: Any) -> Ragged:
        self._settle()
        lengths, handles = self._places(places)
        batch = len(handles)
        self._room_for(batch)
        offsets = torch.zeros(batch + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(lengths.clamp(0, self.max_tokens), 0, out=offsets[1:])
        values = torch.empty(int(offsets[-1]), dtype=torch.int64, device=self.device)
        if batch:
            call = self._next_call()
            self._kernels.gather_slots(
                self._bound, handles.data_ptr(), lengths.data_ptr(), offsets.data_ptr(), self._pool.data_ptr(),
                self._wide, values.data_ptr(), batch, call, self.page_size,
            )  # fmt: skip
            self._enqueued(call, False)
            self._settle()
        found = Ragged.trusted(values, offsets)
        return found if self.slot_device is None else found.to(self.slot_device)

    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None:
        lengths, handles = self._places(places)
        if self.slot_device is not None and torch.empty(0, device=self.slot_device).device != self.device:
            raise ValueError(f"write_slots: the slots are returned on {self.slot_device}, and the tree is not there")
        numbers = check_table(table, rows, len(handles), self.device, self.slot_dtype)
        if len(handles) == 0:
            return
        self._room_for(len(handles))
        numbers = upload_numbers(numbers.numpy(), self.device) if numbers.is_cpu else numbers.to(self.device)
        call = self._next_call()
        self._kernels.write_slots(
            self._bound, handles.data_ptr(), lengths.data_ptr(), numbers.data_ptr(), self._pool.data_ptr(), self._wide,
            table.data_ptr(), table.dtype == torch.int64, table.stride(0), *table.shape, len(handles), call,
            self.page_size,
        )  # fmt: skip
        self._enqueued(call, False)

    # Insert

    def insert(
        self,
        q: Any,
        slots: Any,
        namespace: Any = None,
        priority: Any = 0,
        start: Any = None,
        inserted_lengths: Any = 0,
    ) -> InsertResult:
        keys = read_values(nothing_behind(start, q), self.device, "tokens")
        batch = keys.batch
        source = self._read_slots(nothing_behind(start, slots), keys)
        priorities, one_priority, _priority_owner = self._read_numbers(priority, batch, "priority")
        inserteds, inserted, _inserted_owner = self._read_numbers(inserted_lengths, batch, "inserted_lengths")
        handles, lengths, _start_owner = self._read_starts(start, batch)
        if batch == 0:
            namespaces.spread(namespace, 0)  # raises for what is no namespace
            return InsertResult(torch.empty(0, dtype=torch.int32, device=self.device), *self._outputs(0))
        if self._is_capturing():
            raise RuntimeError(
                "insert cannot be part of a CUDA graph: whether it has to compact is decided anew each time"
            )
        self._room_for(batch)
        names, name, _names_owner = self._read_names(namespace, batch, self._codes_to_insert(namespace, keys))
        may_compact = self._may_compact(keys.total)
        call = self._next_call()
        if keys.offsets == 0:
            chunk, place = self._singles.take()
            single = AwaitedInsert(self, call, chunk, place)
            handle_out, length_out = single.addresses()
            prefix_out = single.prefix_lengths.data_ptr()
            result: InsertResult = single
        else:
            out = self._outputs(batch)
            prefixes = torch.empty(batch, dtype=torch.int32, device=self.device)
            length_out, handle_out = (tensor.data_ptr() for tensor in out)
            prefix_out = prefixes.data_ptr()
            result = InsertResult(prefixes, *out)
        try:
            self._kernels.insert(
                self._bound, keys.address, keys.wide, keys.offsets, keys.total, batch, names, name, handles, lengths,
                source.address, source.wide, source.offsets if keys.offsets else 0, source.total, self._limit,
                self._pool.data_ptr(), self._wide, priorities, one_priority, inserteds, inserted,
                prefix_out, length_out, handle_out, call, self.page_size, self.bigram, may_compact,
            )  # fmt: skip
        except BaseException:
            self._clean_scratch()
            raise
        self._enqueued(call)
        self._unbooked.append((call, keys.total))
        return result

    def _clean_scratch(self) -> None:
        """After an insert whose launches were interrupted: what the first of them left must not reach the next call."""
        self._workspace.number.zero_()
        self._workspace.number[meta.ERROR] = meta.NO_ERROR
        self._workspace.claims.fill_(-1)
        self._unsure = True

    def _may_compact(self, total: int) -> bool:
        """Whether the pools may have no room for so many units, as far as the host knows by now."""
        told, room = self._mail.latest(meta.MAIL_ROOM)
        while self._unbooked and not is_later(self._unbooked[0][0], told):
            self._unbooked.popleft()
        return room - sum(count for _, count in self._unbooked) < total

    def _compact(self) -> None:
        """Copy all edges to the other half of the pools, without gaps."""
        self._kernels.compact(self._bound, self._pool.data_ptr(), self._wide, True)
        self._tell()

    def _rebuild(self) -> None:
        self._state.meta[meta.POOL_CURSOR] = self._state.meta[meta.EVICTABLE] + self._state.meta[meta.PROTECTED]
        self._kernels.rebuild(self._bound)
        self._tell()
        self._settle()  # the next insert goes by the room that is told now

    def _first_unit(self) -> int:
        return int(self._state.meta[meta.POOL_END]) - pool_units(self.max_tokens, self.page_size)

    # Evict

    def evict(self, num_tokens: int) -> EvictResult:
        wanted = token_count(num_tokens)
        self._settle()
        if not self._by_tick:
            self._kernels.effective_keys(self._bound, self._scores())
        call = self._next_call()
        self._kernels.select(self._bound, min(wanted, MAX_UNITS), self._by_tick, call)
        tokens, nodes = (self._mail.wait(place, call) for place in (meta.MAIL_TOKENS, meta.MAIL_VICTIMS))
        unordered, nodes = nodes & self._kernels.UNORDERED, nodes & ~self._kernels.UNORDERED
        # All memory before anything changes: slots must not be lost.
        slots = torch.empty(tokens, dtype=torch.int64, device=self.device)
        returned = None if self.slot_device is None else torch.empty_like(slots, device=self.slot_device)
        if nodes:
            if unordered:
                self._kernels.order_victims(self._bound, nodes, self._by_tick)
            call = self._next_call()
            pool = (self._pool.data_ptr(), self._wide)
            self._kernels.free(self._bound, nodes, tokens, call, *pool, slots.data_ptr())
            self._enqueued(call)
            if len(self._namespaces) > 1:
                self._forget_namespaces(self._mail.wait(meta.MAIL_RELEASED, call))
        return EvictResult(slots if returned is None else returned.copy_(slots), tokens, nodes)

    def _forget_namespaces(self, count: int) -> None:
        for code in self._state.released[:count].tolist() if count else ():
            self._namespaces.take_back(code)

    def _scores(self) -> torch.Tensor:
        """int64 [R]: what the policy orders by, before the tick; smaller goes first."""
        s = self._state
        columns = (s.tick, s.created, s.priority, s.hit_count, s.lock_ref, s.children, s.length, s.end)
        nodes = policies.Nodes(*columns)
        if self._score is None:
            return policies.built_in_scores(self._policy_code, nodes)
        live = s.parent != FREE_ROW
        live[0] = False
        return policies.scores_of(self._score, nodes, live)

    # The whole tree

    def digest(self) -> str:
        self._settle()
        hashes = np.array([name_hash(name) for _, name in self._namespaces.items()], np.int64)
        codes = torch.tensor([code for code, _ in self._namespaces.items()], device="cpu").to(self.device)
        self._state.namespace_hash[codes] = torch.from_numpy(hashes).to(self.device)
        lanes = self._kernels.digest(self._bound, self._pool.data_ptr(), self._wide)
        return "".join(f"{lane & (2**64 - 1):016x}" for lane in lanes)

    def reset(self) -> None:
        call = self._next_call()
        self._kernels.reset(self._bound, call)
        self._enqueued(call)
        self._namespaces.clear()
        self._fresh.clear()
        self._unbooked.clear()
