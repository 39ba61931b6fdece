"""DeviceIndex: the index on a GPU. It enqueues kernels, and waits for them only where it returns their results."""

from __future__ import annotations

import sys
from array import array
from collections import deque
from collections.abc import Callable, Collection
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix import dropping
from flatradix.device import interrupted
from flatradix.device.calls import Calls
from flatradix.device.capture import Step
from flatradix.device.dropping import marks_of, rows_of
from flatradix.device.eviction import Found, Room, allocate, found_by
from flatradix.device.freed import about_to_go
from flatradix.device.growth import Larger, larger_than
from flatradix.device.input import (
    as_batch,
    of_key,
    places_on,
    read_keys,
    read_numbers,
    read_slots,
    read_values,
)
from flatradix.device.interrupted import NOTHING, OpenCall
from flatradix.device.limits import Bound
from flatradix.device.mailbox import abandon, is_later
from flatradix.device.names import Names
from flatradix.device.results import Awaited, Batch, OnDevice, Results
from flatradix.device.stages import Stages
from flatradix.dropping import NOT_GIVEN, times_of
from flatradix.errors import TooLargeForDeviceError
from flatradix.gate import FREE, cut_short, public_call
from flatradix.index import Index, T
from flatradix.inputs import namespaces
from flatradix.inputs.arguments import check_out, check_write_table, token_count
from flatradix.inputs.devices import interpreted
from flatradix.inputs.namespaces import Namespaces, name_hash
from flatradix.inputs.options import Options
from flatradix.inputs.places import check_starts, read_places, refuse_shared_handles
from flatradix.inputs.policy import Nodes, built_in_scores, scores_of
from flatradix.inputs.ragged import Ragged
from flatradix.inputs.refuse import refuse_out
from flatradix.inputs.sequences import Buffer, read_host_key, read_one
from flatradix.inputs.upload import HOST_IN_GRAPH, upload_numbers
from flatradix.inspect.content import Content, Paths, Saved, as_numpy, fields_of, fill, tokens_for
from flatradix.kernels import gpu
from flatradix.layout import mail, numbers
from flatradix.layout.desk import LONG_COUNT, LONG_TOKENS, STAGED_TOKENS
from flatradix.layout.dropped import LOWEST
from flatradix.layout.growth import is_too_large, most_tokens, next_capacity
from flatradix.layout.numbers import MAX_UNITS
from flatradix.layout.queries import (
    NO_PLACES,
    Freeing,
    PlaceAddresses,
    PromptAddresses,
    SlotTable,
    Values,
    Wanted,
    Wants,
)
from flatradix.layout.scratch import Scratch, allocate_scratch, enlarge
from flatradix.layout.state import FREE_ROW, allocate_device, pool_units
from flatradix.pins import Pins, read_ends
from flatradix.results import EvictIntoResult, EvictResult, InsertResult, MatchResult, late_insert, late_match
from flatradix.victims import Freed, listener_of

_SMALLEST_BATCH = 1024
# An eviction allocates memory for so many slots more than it was asked for before it knows what goes: first for some,
# later for twice as many as were needed, up to a limit. If that does not suffice, it waits twice.
_FIRST_BEYOND, _MOST_BEYOND = 1 << 12, 1 << 16
_EVICT_IN_GRAPH = (
    "a CUDA graph cannot hold an eviction that returns as many slots as there are: give evict a tensor for them, out="
)
_WAIT_IN_GRAPH = "a CUDA graph cannot hold a call that waits for the device: read sizes and errors outside of it"
_NAME_IN_GRAPH = "a CUDA graph cannot hold a namespace: what it is called inside changes as others go"
_NOTHING_YET = OpenCall(NOTHING, 0, 0)


class _Found(NamedTuple):
    """Places on the device, for a call to read."""

    lengths: torch.Tensor
    handles: torch.Tensor


class DeviceIndex(Index):
    """A tree on a GPU. Triton kernels do the work.

    mailbox: the pinned words by which kernels tell the host their results.
    """

    def __init__(self, options: Options, device: torch.device, generation: int) -> None:
        self.options = options
        self.device = device = torch.device("cpu") if interpreted() else device
        units = pool_units(options.max_tokens, options.page_size)
        if is_too_large(options.max_tokens, options.page_size, halves=2):
            raise TooLargeForDeviceError(
                f"max_tokens {options.max_tokens} is too large for a tree on a GPU: at most 8.5e8 tokens"
            )
        state = allocate_device(options.max_tokens, options.page_size, options.bigram, generation, device)
        state.numbers[numbers.BY_PAGE] = self._by_page = options.evict_by == "page"
        self._pool = torch.zeros(2 * units, dtype=options.slot_dtype, device=device)
        self._calls = Calls(options, device)
        self.mailbox = self._calls.mailbox
        self.mailbox.words[mail.FREE_UNITS] = units
        self._names = Names(len(state.namespace_hash), options.page_size + options.bigram, device)
        self._stages = Stages(device, self.mailbox)
        self._long_stages: Stages | None = None  # from the first long key on
        self._results = Results(device)
        self._zero = torch.zeros(1, dtype=torch.int64, device=device)
        self._by_tick = options.order.score is None and options.order.code == numbers.LRU
        self._unseen_inserts: deque[tuple[int, int]] = (
            deque()
        )  # (call, units) of inserts after the last known FREE_UNITS word
        self._retired: list[Scratch] = []
        self._state = state
        scratch = enlarge(
            allocate_scratch(len(state.parent), options.max_tokens, self.mailbox.words, device), _SMALLEST_BATCH
        )
        self._arrays = gpu.arrays_of(state, scratch, self._pool, options.page_size, options.bigram)
        self._open: tuple[Any, ...] | None = None  # the fields of an OpenCall that has begun and not ended
        self._unreturned: torch.Tensor | None = None  # slots of an interrupted eviction, for the next one to return
        self._changes = 0
        self._pinned = False  # whether `want` was ever called
        self._locks = Bound("lock_ref", "locks", "unlock")
        self._wants = Bound("wanted", "wants", "unwant")
        self._holds_dropped = False  # whether dropped nodes may be left, which go first in evictions
        self._beyond = _FIRST_BEYOND
        self._graph_evicts = self._graph_inserts = False  # whether a CUDA graph holds such a call
        self._may_be_empty = False  # whether namespaces may have lost their last nodes unseen by the host
        self._listener = listener_of(options.on_evict)
        self._most_stored = 0  # tokens that can be cached at most, as far as the host knows
        self._larger: Larger | None = None  # a growth under way

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "_long_stages") and not is_finalizing():  # else __init__ failed, or the interpreter exits
            abandon(self.mailbox, (self._stages, self._long_stages))

    def _ensure_scratch(self, batch: int) -> None:
        """Make the scratch arrays large enough for a batch.

        Old arrays are kept until the tree is deleted: a stream may still use them.
        """
        if batch <= self._arrays.batch:
            return
        scratch = self._arrays.scratch
        if self._calls.is_capturing():
            raise RuntimeError(f"run a batch of {batch} once before a CUDA graph is captured with it")
        self._retired.append(scratch)
        larger = enlarge(scratch, 1 << (batch - 1).bit_length())
        self._arrays = gpu.arrays_of(self._state, larger, self._pool, self.options.page_size, self.options.bigram)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._state) + self._arrays.scratch.nbytes + self._pool.nbytes

    # Interrupted calls, and waiting

    def _repair(self) -> None:
        opened = self._open
        if opened is None:
            return
        changed_nothing = opened is _NOTHING_YET
        self._pins = self._pins.undone(tuple(opened[:3]))
        cut = OpenCall(*opened)
        self._move_in()
        if self._calls.is_capturing():
            if not changed_nothing:
                raise RuntimeError("a call was cut short before this graph was captured: call raise_pending() first")
            self._names.doubt()  # a name that it was given may be in use by nothing
            self._open = None
            return
        done = interrupted.undo(cut, self._arrays, self._calls)
        if cut.operation in (interrupted.EVICT, interrupted.DROP, interrupted.RESET):
            self._unreturned = self._left_by(cut) if done else cut.before
            if done and self._listener is not None:
                if cut.operation == interrupted.RESET:
                    self._listener.forget()
                elif cut.freed is not None:
                    self._listener.note(cut.freed)
            counts = done and cut.operation == interrupted.RESET
            self._open = cut = cut._replace(operation=NOTHING, changes=cut.changes + counts)
        if not changed_nothing:
            self._changes = cut.changes
        for stages in (self._stages, self._long_stages):
            if stages is not None:
                stages.free_all()
        self._calls.tell(self._tell)
        self._names.known.repair(self._state.namespace_children.cpu().numpy())
        self._names.nothing_given()
        self._open = None

    def _left_by(self, cut: OpenCall) -> torch.Tensor | None:
        """Return the slots that an interrupted eviction has written. A reset drops them."""
        if cut.slots is None:
            return None
        known = 0 if cut.before is None else len(cut.before)
        _call, freed = self.mailbox.latest(mail.FREED)
        return cut.slots[: known + freed].clone()  # they may be in memory of the caller

    def _tell(self, call: int) -> None:
        gpu.tell(self._arrays, call)

    def _wait(self) -> int:
        """Wait for all calls so far. Return how many were refused. Free the namespace codes that are not in use."""
        self._refuse_capture()
        if self._calls.captured:
            self._calls.tell(self._tell)
        refused = self.mailbox.refusals()
        if self._names.given:
            self._names.look(self._state.namespace_children, refused > 0)
        if self._may_be_empty:
            self._names.forget_empty(self._state.namespace_children)
            self._may_be_empty = self._graph_evicts
        return refused

    def _refuse_capture(self) -> None:
        if self._calls.is_capturing():
            raise RuntimeError(_WAIT_IN_GRAPH)

    def _finish_all(self) -> None:
        """Wait for all calls so far, and raise the error of the first that was refused."""
        if self._wait():
            self._calls.raise_refusal()

    @public_call
    def raise_pending(self) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            self._finish_all()
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    # CUDA graphs

    def capture(self, function: Callable[[], T]) -> Callable[[], T]:
        return Step(self, function) if self.device.type == "cuda" else function

    def rehearse(self, function: Callable[[], T]) -> T:
        """Run a function. Its calls launch the kernels that they would launch during a capture."""
        self._calls.rehearsing = True
        try:
            return function()
        finally:
            self._calls.rehearsing = False

    def in_graphs(self) -> tuple[bool, bool]:
        """Return whether a CUDA graph holds a call of this tree, and whether one holds an eviction."""
        return self._calls.captured, self._graph_evicts

    def only_in_graphs(self, before: tuple[bool, bool]) -> None:
        """Take back what a capture that has failed has noted: `before` is what `in_graphs` returned before it."""
        self._calls.captured, self._graph_evicts = before

    @property
    def noted_locks(self) -> int:
        """How many locks were noted since they were last looked up."""
        return self._locks.most

    @public_call
    def replay(self, graph: torch.cuda.CUDAGraph, locks: int) -> None:
        """Run a graph that holds calls of this tree, which lock that many places. What runs is not undone."""
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            self._note_locks(locks, "replay")
            self._open = NOTHING, 0, self._changes + 1
            graph.replay()
            self._changes += 1
            self._open = None
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    # Growth

    def _make_room(self, more: int) -> None:
        """Before an insert of `more` tokens into a tree without `max_tokens`: grow if they may not fit.

        Waits for the device only if as many tokens were inserted, since it last did, as were free then.
        """
        capacity = self.options.max_tokens
        if self._most_stored + more > capacity:
            self._wait()
            self._most_stored = self.mailbox.counter(mail.EVICTABLE) + self.mailbox.counter(mail.PROTECTED)
            # An eighth is free after each wait, so that waits are few; but a tree in a CUDA graph grows no more.
            self._grow(self._most_stored + (more if self._calls.captured else max(more, capacity // 8)))
        self._most_stored += more

    def _grow(self, needed: int) -> None:
        """Move to arrays for `needed` tokens, or to the largest arrays. All calls so far must be done."""
        options = self.options
        most = most_tokens(options.page_size, halves=2)
        capacity = next_capacity(options.max_tokens, min(needed, most), most)
        if capacity > options.max_tokens:
            if self._calls.captured:
                raise RuntimeError(
                    "a tree without max_tokens cannot grow any more once a CUDA graph holds its calls: give max_tokens"
                )
            self._larger = larger_than(self._arrays, self._pool, options, capacity)
            self._move_in()
            self._calls.tell(self._tell)

    def _move_in(self) -> None:
        """Use the arrays of a growth. May be called again."""
        larger = self._larger
        if larger is not None:
            self.options, self._state, self._pool, self._arrays = larger
            self._calls.options = larger.options
            self._names.allow(len(larger.state.namespace_children))
            self._retired.clear()
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
            hold = 1 if lock else 2 * bool(split)
            key = read_host_key(q, "tokens") if start is None else None
            if key is None:
                keys = read_values(q, self.device, "tokens")
                self._open = _NOTHING_YET
                result = self._match_values(keys, namespace, bool(touch), hold, start)
            else:
                self._open = _NOTHING_YET
                result = self._match_key(key, namespace, bool(touch), hold)
            if lock:
                self.last_result = result
                self._changes += 1
            self._open = None
            self.busy = FREE
            return result
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def lock_prompts(self, prompts: Ragged, namespace: Any) -> MatchResult:
        """Match prompts on the device without their last tokens and without a touch, and lock them. One launch."""
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            keys = read_values(prompts, self.device, "tokens")._replace(left_out=1)
            self._open = _NOTHING_YET
            self.last_result = result = self._match_values(keys, namespace, False, 1, None)
            self._changes += 1
            self._open = None
            self.busy = FREE
            return result
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
            if tokens.typecode != "q":
                raise ValueError(f"match_array takes an array of int64 ('q'), not of typecode {tokens.typecode!r}")
            key = read_one(tokens if limit is None else memoryview(tokens)[: max(limit, 0)], "tokens")
            self._open = _NOTHING_YET
            result = self._match_key(key, namespace, True, 2 * bool(split))
            self._open = None
            self.busy = FREE
            return result
        except BaseException:
            cut_short(self, me)
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
            raise RuntimeError(_NAME_IN_GRAPH)
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

    def _late_result(self, keys: Values, call: int, told: int = -1, captured: bool = False) -> Awaited | Batch:
        """Return the source of a new result. told: where a batch tells its lengths, or -1."""
        if keys.offsets == 0:
            return self._results.one(self, call)
        return self._results.many(self, call, keys.batch, told, captured)

    def told_lengths(self, call: int, place: int, batch: int) -> torch.Tensor | None:
        """Return the lengths that a match has told the host, or None if the host cannot know whether they are right."""
        return None if self._calls.captured else self.mailbox.lengths(call, place, batch)

    # Lock

    def _late(self, places: Any) -> OnDevice | None:
        """Return the source of a result of this device, whose places are read where its kernel leaves them."""
        late = getattr(places, "late", None)
        if isinstance(late, OnDevice) and (late.device is self.device or late.device == self.device):
            return late
        return None

    def _places(self, places: Any) -> PlaceAddresses:
        """Return the addresses of places."""
        late = self._late(places)
        return places_on(places, self.device) if late is None else late.places

    def _starts(self, start: Any, batch: int) -> PlaceAddresses:
        """Return the addresses of the places to continue from."""
        if start is None:
            return NO_PLACES
        starts = self._places(start)
        check_starts(starts.batch, batch)
        return starts

    def _note_locks(self, count: int, operation: str) -> None:
        if self._locks.add(count):
            self._look_up(self._locks, count, operation)

    def _look_up(self, bound: Bound, count: int, operation: str) -> None:
        self._finish_all()
        bound.look_up(int(getattr(self._state, bound.column).max()), count, operation)

    @public_call
    def lock(self, places: Any) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            late = getattr(places, "late", None)
            if type(late) is Awaited and late.device is self.device:  # the quick way, for the result of one key
                calls, place = self._calls, late.places
                self._note_locks(1, "lock")
                call, stream, captured = calls.begin()
                self._open = interrupted.LOCK, call, self._changes, place
                gpu.lock_one(self._arrays, place, call, stream)
                calls.enqueued(call, True, captured)
                late.forget_handle()
                self._changes += 1
                self._open = None
                self.busy = FREE
            else:
                self._renew(places, self._lock)
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
            self._renew(places, self._split)
        except BaseException:
            cut_short(self, me)
            raise

    def _renew(self, places: Any, operation: Callable[[PlaceAddresses], None]) -> None:
        """Run an operation that may renew the handles of places, and write the new handles back."""
        late = self._late(places)
        if late is not None:
            operation(late.places)
            late.forget_handle()
        else:
            lengths, handles = read_places(places, self.device)
            refuse_shared_handles(handles)
            renewed = handles.contiguous()
            operation(PlaceAddresses(renewed.data_ptr(), lengths.data_ptr(), len(handles), (lengths, renewed)))
            if renewed is not handles:
                with torch.inference_mode(handles.is_inference()):  # else torch refuses to write to such a tensor
                    handles.copy_(renewed)
        self._changes += 1
        self._open = None
        self.busy = FREE

    def _lock(self, places: PlaceAddresses) -> None:
        batch = places.batch
        if batch:
            if batch > self._arrays.batch:
                self._ensure_scratch(batch)
            self._note_locks(batch, "lock")
            call, _stream, captured = self._calls.begin()
            self._open = interrupted.LOCK, call, self._changes, places
            gpu.lock(self._arrays, places, call)
            self._calls.enqueued(call, True, captured)

    def _unlock(self, places: PlaceAddresses) -> None:
        """Unlock places without a record of how to undo it: `_open` still describes the lock that this call removes."""
        if places.batch:
            self._ensure_scratch(places.batch)
            call, _stream, captured = self._calls.begin()
            gpu.unlock(self._arrays, places, call)
            self._calls.enqueued(call, True, captured)

    def _split(self, places: PlaceAddresses) -> None:
        self._lock(places)
        self._unlock(places)

    @public_call
    def unlock(self, places: Any) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            late = getattr(places, "late", None)
            found = late.places if isinstance(late, OnDevice) and late.device is self.device else self._places(places)
            batch = found.batch
            if batch == 0:
                self.busy = FREE
                return
            if batch > self._arrays.batch:
                self._ensure_scratch(batch)
            calls = self._calls
            call, stream, captured = calls.begin()
            self._open = interrupted.UNLOCK, call, self._changes, found
            if batch == 1:
                gpu.unlock_one(self._arrays, found, call, stream)
            else:
                gpu.unlock(self._arrays, found, call)
            calls.enqueued(call, True, captured)
            self._changes += 1
            self._open = None
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
            keys = read_values(q, self.device, "tokens")
            names = self._names.find(namespace, keys.batch)
            old = self._starts(places, keys.batch)
            self._open = _NOTHING_YET
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
            cut_short(self, me)
            raise

    @public_call
    def alive(self, places: Any) -> torch.Tensor:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            found = self._alive(self._places(places))
            self.busy = FREE
            return found
        except BaseException:
            cut_short(self, me)
            raise

    def _alive(self, places: PlaceAddresses) -> torch.Tensor:
        out = torch.zeros(places.batch, dtype=torch.int32, device=self.device)
        if places.batch:
            gpu.alive(self._arrays, places, out.data_ptr())
        return out != 0

    def are_alive(self, handles: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._alive(self._brought(handles, lengths)).cpu().numpy()
        return found

    def read_own_wants(self) -> np.ndarray:
        found: np.ndarray = self._state.own_wants[: int(self._state.numbers[numbers.ROWS])].cpu().numpy()
        return found

    def _brought(self, handles: np.ndarray, lengths: np.ndarray) -> PlaceAddresses:
        """Bring places in host memory to the device."""
        owner = torch.from_numpy(lengths).to(self.device), torch.from_numpy(handles).to(self.device)
        return PlaceAddresses(owner[1].data_ptr(), owner[0].data_ptr(), len(handles), owner)

    def _read(self, places: Any) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the device. Return the handles and lengths of places, copied to the host."""
        self._finish_all()
        late = self._late(places)
        lengths, handles = read_places(places, self.device) if late is None else (late.lengths(), late.handles())
        return handles.cpu().numpy().copy(), lengths.cpu().numpy().copy()

    @public_call
    def want(self, places: Any, until: Any = None) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            if self._graph_evicts and not self._pinned:
                raise RuntimeError(
                    "a CUDA graph holds an eviction of this tree that knows no soft pins: call want once before the "
                    "capture"
                )
            if until is None and self.options.pin_budget is None:
                self._pinned = True
                self._renew(places, self._want)
                return
            handles, lengths = self._read(places)
            ends = None if until is None else read_ends(until, len(handles))
            self._check_budget(handles, lengths)
            self._pinned = True
            self._renew(places, lambda found: self._want_until(places, found, ends))
        except BaseException:
            cut_short(self, me)
            raise

    def _want_until(self, places: Any, found: PlaceAddresses, ends: np.ndarray | None) -> None:
        self._want(found)
        if ends is not None and found.batch:
            handles, lengths = self._read(places if self._late(places) is not None else _Found(*found.owner))
            self._replace_pins(self._pins.with_more(handles, lengths, ends), self._opened())

    def _opened(self) -> tuple[int, ...]:
        """Return numbers that tell the open call from every other call."""
        assert self._open is not None
        return tuple(self._open[:3])

    def _want(self, places: PlaceAddresses) -> None:
        if self._wants.add(places.batch):
            self._look_up(self._wants, places.batch, "want")
        self._split(places)
        if places.batch:
            call = self._calls.next()
            self._open = OpenCall(interrupted.WANT, call, self._changes, places)
            gpu.want(self._arrays, places, call)
            self._calls.enqueued(call)

    @public_call
    def unwant(self, places: Any, until: Any = None) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            left = None
            if until is not None or self._pins.size:
                left = self._pins_left(*self._read(places), until)
            self._unwant(self._places(places), left)
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    def _unwant(self, found: PlaceAddresses, left: Pins | None) -> None:
        """Remove one want from each path. left: the pins with an end afterwards, None if they stay."""
        if found.batch:
            self._ensure_scratch(found.batch)
            call = self._calls.next()
            self._open = OpenCall(interrupted.UNWANT, call, self._changes, found)
            gpu.unwant(self._arrays, found, call)
            self._calls.enqueued(call)
            if left is not None:
                self._finish_all()
                self._replace_pins(left, self._opened())
            self._changes += 1
            self._open = None

    @public_call
    def expire(self, now: Any) -> int:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            if self._pins.size:
                self._finish_all()
            over, left = self._pins_at(now)
            if over.size:
                self._unwant(self._brought(over.handles, over.lengths), left)
            else:
                self._pins = left
            self.busy = FREE
            return over.size
        except BaseException:
            cut_short(self, me)
            raise

    def names(self) -> Namespaces:
        """Return the codes of the namespaces, for a waiting queue to read."""
        return self._names.known

    @property
    def last_call(self) -> int | None:
        """A number that is different after each call that enqueued work; None if the host cannot tell."""
        return self._calls.last

    def follow(self, prompts: PromptAddresses, entries: int) -> None:
        """Match the first `entries` prompts of a waiting queue from their places, which are replaced. One launch."""
        call = self._calls.next()
        gpu.follow(self._arrays, prompts, entries, call)
        self._calls.enqueued(call, False)

    def wait(self) -> None:
        """Wait for all calls so far. Does not tell whether one was refused."""
        self._wait()

    def read_paths(self) -> Paths:
        """Return the columns that lead from a row to the root, copied to the host. Waits for the device."""
        self._finish_all()
        s, rows = self._state, int(self._state.numbers[numbers.ROWS])
        parents, lengths, ends, locks = (
            column[:rows].cpu().numpy() for column in (s.parent, s.length, s.end, s.lock_ref)
        )
        evictable, protected = (self.mailbox.counter(place) for place in (mail.EVICTABLE, mail.PROTECTED))
        return Paths(parents, lengths, ends, locks, evictable, protected)

    # Slots

    @public_call
    def slots(self, places: Any) -> Ragged:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            return self._slots_of(places)
        except BaseException:
            cut_short(self, me)
            raise

    def _slots_of(self, places: Any) -> Ragged:
        ragged = self._gather(places, self._pool)
        return ragged if self.options.slot_device is None else ragged.to(self.options.slot_device)

    @public_call
    def tokens(self, places: Any) -> Ragged:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            return self._gather(places, self._state.tokens)
        except BaseException:
            cut_short(self, me)
            raise

    def _gather(self, places: Any, pool: torch.Tensor) -> Ragged:
        """Return what a pool has for each unit of each place. Waits for the device."""
        self._refuse_capture()
        late = self._late(places)
        if late is None:
            self._finish_all()
            lengths, handles = read_places(places, self.device)
            handles = handles.contiguous()
            found = PlaceAddresses(handles.data_ptr(), lengths.data_ptr(), len(handles), (handles, lengths))
        else:
            lengths, found = late.lengths(), late.places
        offsets = torch.zeros(found.batch + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(lengths.clamp(0, self.options.max_tokens), 0, out=offsets[1:])
        values = self._gathered(found, pool, offsets, int(offsets[-1]) if late is None else late.total())
        self._open = None
        self.busy = FREE
        return Ragged.trusted(values, offsets)

    def _gathered(self, found: PlaceAddresses, pool: torch.Tensor, offsets: torch.Tensor, total: int) -> torch.Tensor:
        """Return `total` values of a pool, those of each place from `offsets` on: int64 [B] or more on the device."""
        self._open = _NOTHING_YET
        values = torch.empty(total, dtype=pool.dtype, device=self.device)
        if found.batch:
            self._ensure_scratch(found.batch)
            call = self._calls.next()
            gpu.gather(self._arrays, found, pool, offsets.data_ptr(), values.data_ptr(), total, call)
            self._calls.enqueued(call, False)
            self._finish_all()
        return values

    @public_call
    def path_slots(self, place: Any) -> torch.Tensor:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            self._refuse_capture()
            late = self._late(place)
            if type(late) is not Awaited:
                return self._slots_of(place).values
            values = self._gathered(late.places, self._pool, self._zero, late.length())
            self._open = None
            self.busy = FREE
            where = self.options.slot_device
            return values if where is None else values.to(where)
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            found = self._places(places)
            where = self.options.slot_device
            if where is not None and torch.empty(0, device=where).device != self.device:
                raise ValueError(f"write_slots: the slots are returned on {where}, and the tree is not there")
            numbered = check_write_table(table, rows, found.batch, self.device, self.options.slot_dtype)
            if numbered.device != self.device:
                numbered = (
                    upload_numbers(numbered.numpy(), self.device) if numbered.is_cpu else numbered.to(self.device)
                )
            into = SlotTable(table.data_ptr(), table.dtype == torch.int64, table.stride(0), *table.shape)
            self._write(found, numbered, into, False)
        except BaseException:
            cut_short(self, me)
            raise

    @public_call
    def write_pages(self, places: Any, table: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the page of each `page_size` slots of places to rows, int64 [B], of a page table, int32 [R, W].

        All are on the device.
        """
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            height, width = table.shape
            into = SlotTable(table.data_ptr(), False, width, height, width * self.options.page_size)
            self._write(self._places(places), rows, into, True)
        except BaseException:
            cut_short(self, me)
            raise

    def _write(self, places: PlaceAddresses, rows: torch.Tensor, table: SlotTable, pages: bool) -> None:
        if places.batch:
            self._open = _NOTHING_YET
            self._ensure_scratch(places.batch)
            captured = self._calls.is_capturing()
            call = self._calls.next()
            gpu.write_slots(self._arrays, places, rows.data_ptr(), table, call, pages)
            self._calls.enqueued(call, False, captured)
            self._open = None
        self.busy = FREE

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
            device = self.device
            keys = read_keys(q, device)
            source = read_slots(slots, keys, device, self._arrays.pool_wide)
            priorities = read_numbers(priority, keys.batch, device, "priority")
            inserted = read_numbers(inserted_lengths, keys.batch, device, "inserted_lengths")
            starts = self._starts(start, keys.batch)
            if keys.batch == 0:
                namespaces.spread(namespace, 0)  # raises for a bad namespace
                self.busy = FREE
                return late_insert(self._results.many(self, 0, 0))
            captured = self._calls.is_capturing()
            if captured:
                self._check_graph_holds_insert(keys, source, namespace)
            self._ensure_scratch(keys.batch)
            self._open = _NOTHING_YET
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
            cut_short(self, me)
            raise

    def _check_graph_holds_insert(self, keys: Values, slots: Values, namespace: Any) -> None:
        """Raise RuntimeError for an insert that needs the host."""
        if keys.on_host or slots.on_host:
            raise RuntimeError(HOST_IN_GRAPH)
        if namespace is not None:
            raise RuntimeError(_NAME_IN_GRAPH)
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

    # Evict

    @public_call
    def evict(self, num_tokens: Any, out: torch.Tensor | None = None) -> EvictResult | EvictIntoResult:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            if out is not None:
                return self._evict_into(num_tokens, out)
            wanted = token_count(num_tokens)
            if self._calls.is_capturing():
                raise RuntimeError(_EVICT_IN_GRAPH)
            self._finish_all()
            room, tokens, nodes, freed = self._evict(wanted, None)
            result = EvictResult(room.filled(tokens), room.known + tokens, nodes)
            self._end_eviction(result, freed)
            return result
        except BaseException:
            cut_short(self, me)
            raise

    def _evict(self, wanted: int, room: Room | None) -> tuple[Room, int, int, Freed | None]:
        """Evict, and wait for that. Return the memory, the tokens and nodes that went, and what the callback is told.

        room: the caller's memory. Raises ValueError if it is too small.
        """
        self._open = _NOTHING_YET
        if self._listener is not None:
            self._listener.begin()
        missing = max(wanted - (0 if self._unreturned is None else len(self._unreturned)), 0)
        if self._holds_dropped and not self._graph_evicts:
            state = self._state
            self._holds_dropped = bool(((state.created < 0) & (state.parent != FREE_ROW)).any())
        given = room is not None
        evictable = self.mailbox.counter(mail.EVICTABLE) if missing else 0
        # Allocate all memory before the tree changes: a later failure would lose slots.
        if room is None:
            room = self._room(self._likely_tokens(missing, evictable))
        if evictable == 0:
            return room, 0, 0, None
        call = self._calls.next()
        by_tick = self._prepare_keys()
        asked = Wanted(min(missing, MAX_UNITS))
        if self._listener is None and not given:
            self._open = self._open_eviction(call, room)
            self._select_and_free(asked, room.freeing(), by_tick, call)
            tokens, nodes = self.mailbox.wait(mail.FREED, call), self.mailbox.wait(mail.GONE, call)
            if tokens <= room.space and nodes < mail.UNORDERED:
                self._freed(call)
                return room, tokens, nodes, None
        else:
            gpu.select(self._arrays, asked, by_tick, call)
        found = found_by(self.mailbox, call, missing, self.options.page_size, self._by_page)
        if given and found.tokens > room.space:
            refuse_out(room.known + found.tokens, room.known + room.space)
        if not given:
            self._beyond = min(max(self._beyond, 2 * (found.tokens - missing)), _MOST_BEYOND)
            room = self._room(found.tokens)
        return room, found.tokens, found.nodes - (found.kept > 0), self._free_found(found, by_tick, room)

    def _free_found(self, found: Found, by_tick: bool, room: Room) -> Freed | None:
        """Free the victims that the device has found, and wait. Return what the callback is told, if there is one."""
        if not found.ordered:
            gpu.order_victims(self._arrays, found.nodes, by_tick)
        call, freed = self._calls.next(), None
        if self._listener is not None:
            names = dict(self._names.known.items())
            slots = room.slots[room.known : room.known + found.tokens]
            victims = found.nodes, found.kept
            freed = about_to_go(self._arrays, self.options, call, victims, names.__getitem__, slots)
        self._open = self._open_eviction(call, room, freed)
        if self._pinned:
            gpu.end_wants(self._arrays, found.nodes)
        gpu.free(self._arrays, found.nodes, found.tokens, room.freeing().slots, call, found.kept)
        self._freed(call)
        return freed

    def _open_eviction(self, call: int, room: Room, freed: Freed | None = None) -> OpenCall:
        before = self._unreturned
        return OpenCall(interrupted.EVICT, call, self._changes, slots=room.slots, before=before, freed=freed)

    def _freed(self, call: int) -> None:
        """Note an eviction that the device does, and forget the namespaces that are empty after it."""
        self._calls.enqueued_outside(call, True)
        if len(self._names.known) > 1:
            self._forget_namespaces(self.mailbox.wait(mail.RELEASED, call))

    def _end_eviction(self, result: EvictResult | EvictIntoResult, freed: Freed | None) -> None:
        self.last_result = result
        if self._listener is not None:
            if freed is not None:
                self._listener.note(freed)
            self._listener.tell()
        self._unreturned = None
        self._changes += 1
        self._open = None
        self.busy = FREE

    def _room(self, space: int) -> Room:
        device, where = self.device, self.options.slot_device
        devices = (device,) if where is None else (device, where)
        return allocate(self._unreturned, space, self.options.slot_dtype, devices)

    def _likely_tokens(self, missing: int, evictable: int) -> int:
        """Return for how many slots to allocate memory before the device has told how many an eviction frees.

        That is at most so many more than are missing, up to whole pages, as earlier evictions have freed.
        """
        page = self.options.page_size
        likely = -(-missing // page) * page + (0 if self._by_page else self._beyond)
        return min(likely, evictable)

    def _prepare_keys(self) -> bool:
        """Have the device fill in the keys by which it orders victims. Return whether the ticks are the keys."""
        keeper = None if self._keeper is None else self._keeper()
        wants = None if keeper is None else keeper.wanted()
        by_tick = self._by_tick and not self._holds_dropped
        if not by_tick:
            gpu.effective_keys(self._arrays, self._scores(), self._pinned)
        if wants is not None or self._pinned:
            gpu.classify(self._arrays, Wants(0, 0, 0) if wants is None else wants, by_tick)
            by_tick = False
        return by_tick

    def _select_and_free(self, asked: Wanted, into: Freeing, by_tick: bool, call: int) -> None:
        """Have the device find the victims, and free them if there is space for their slots, without a wait."""
        if self._pinned:
            gpu.select(self._arrays, asked, by_tick, call)
            gpu.end_wants_selected(self._arrays, into.space)
            gpu.free_selected(self._arrays, into, call)
        else:
            gpu.evict(self._arrays, asked, by_tick, into, call)

    # Drop

    @public_call
    def drop(self, places: Any = None, namespace: Any = NOT_GIVEN) -> EvictResult:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            if self._calls.is_capturing():
                raise RuntimeError("a CUDA graph cannot hold a drop, which the host plans: call drop outside of it")
            dropping.check_arguments(places, namespace)
            self._finish_all()
            if self._graph_evicts and not self._holds_dropped:
                raise RuntimeError(
                    "a CUDA graph holds an eviction of this tree, which would not free dropped nodes first: evict "
                    "outside of graphs where drop is used"
                )
            self._open = _NOTHING_YET
            if self._listener is not None:
                self._listener.begin()
            rows = rows_of(self._state, self.options.page_size)
            if places is None:
                plan = rows.plan(rows.tops_of(self._names.known.find(namespace)))
            else:
                lengths, handles = (column.cpu().numpy() for column in read_places(places, self.device))
                plan = rows.plan(rows.of_places(handles, lengths))
            room, freed = self._drop(rows, plan)
            result = EvictResult(room.filled(plan.tokens), room.known + plan.tokens, len(plan.victims))
            self._end_eviction(result, freed)
            return result
        except BaseException:
            cut_short(self, me)
            raise

    def _drop(self, rows: dropping.Rows, plan: dropping.Plan) -> tuple[Room, Freed | None]:
        """Mark what stays, and free the rest. Return the memory of the slots, and what the callback is told."""
        marks, room = marks_of(self._state, rows, plan, self._pinned), self._room(plan.tokens)
        gpu.set_victims(self._arrays, torch.from_numpy(plan.victims).to(self.device))
        call, count, freed = self._calls.next(), len(plan.victims), None
        if self._listener is not None:
            names = dict(self._names.known.items())
            slots = room.slots[room.known : room.known + plan.tokens]
            freed = about_to_go(self._arrays, self.options, call, (count, 0), names.__getitem__, slots)
        self._open = self._open_eviction(call, room, freed)._replace(operation=interrupted.DROP, marks=marks)
        self._holds_dropped |= len(plan.kept) > 0
        marks.write(self._arrays)
        gpu.free(self._arrays, count, plan.tokens, room.freeing().slots, call)
        self._freed(call)
        return room, freed

    # Evict into the caller's memory

    def _evict_into(self, num_tokens: Any, out: torch.Tensor) -> EvictIntoResult:
        self._check_out(out)
        captured = self._calls.is_capturing()
        if captured:
            self._check_graph_holds_eviction()
        known = 0 if self._unreturned is None else len(self._unreturned)
        asked = self._asked(num_tokens, known)
        if known > len(out):
            refuse_out(known, len(out))
        if self._listener is not None:
            return self._evict_into_and_tell(token_count(num_tokens), Room(out, known, len(out) - known))
        self._open = _NOTHING_YET
        counts = torch.empty(2, dtype=torch.int64, device=self.device)
        result = EvictIntoResult(out, counts[0], counts[1])
        by_tick = self._prepare_keys()
        room = Room(out, known, len(out) - known)
        if self._unreturned is not None:
            out[:known] = self._unreturned
        call = self._calls.next()
        self._open = self._open_eviction(call, room)
        self._select_and_free(asked, room.freeing(counts.data_ptr()), by_tick, call)
        self._calls.enqueued(call, True, captured)
        self._graph_evicts |= captured
        self._may_be_empty = True
        if known and self.mailbox.refusals() and self.mailbox.was_refused(call):
            self._open = None
            self.busy = FREE
            return result  # the next eviction returns the known slots
        self._end_eviction(result, None)
        return result

    def _evict_into_and_tell(self, wanted: int, room: Room) -> EvictIntoResult:
        """Evict into the caller's memory, with a callback, which needs to know the victims before they go."""
        self._finish_all()
        if self._unreturned is not None:
            room.slots[: room.known] = self._unreturned
        room, tokens, nodes, freed = self._evict(wanted, room)
        counts = torch.tensor([room.known + tokens, nodes], device="cpu").to(self.device)
        result = EvictIntoResult(room.slots, counts[0], counts[1])
        self._end_eviction(result, freed)
        return result

    def _check_out(self, out: torch.Tensor) -> None:
        where = self.options.slot_device
        if where is not None and torch.empty(0, device=where).device != self.device:
            raise ValueError(f"evict: the slots are returned on {where}, and the tree is not there: leave out `out`")
        check_out(out, self.device, self.options.slot_dtype)

    def _asked(self, num_tokens: Any, known: int) -> Wanted:
        """Return how many tokens to free, without those that are `known`. The device reads a tensor of its own."""
        if isinstance(num_tokens, torch.Tensor) and num_tokens.device == self.device:
            if num_tokens.numel() != 1 or num_tokens.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"evict: num_tokens on the device must be one int64, not {num_tokens.dtype} of shape "
                    f"{tuple(num_tokens.shape)}"
                )
            wide = num_tokens.to(torch.int64)
            return Wanted(-known, wide.data_ptr(), True, wide)
        return Wanted(min(max(token_count(num_tokens) - known, 0), MAX_UNITS), 0, True)

    def _check_graph_holds_eviction(self) -> None:
        """Raise RuntimeError for an eviction that needs the host."""
        if self._listener is not None:
            raise RuntimeError("a CUDA graph cannot hold an eviction of a tree with on_evict, which the host calls")
        if self._keeper is not None and self._keeper() is not None:
            raise RuntimeError(
                "a CUDA graph cannot hold an eviction that keeps for a WaitingQueue: the host reads what that wants"
            )
        if self._unreturned is not None:
            raise RuntimeError(
                "an eviction was interrupted before this graph was captured: call evict(0), which returns its slots"
            )

    def keep_for(self, keeper: Any) -> None:
        if self._graph_evicts:
            raise RuntimeError("a CUDA graph holds an eviction of this tree, which would not keep for a waiting queue")
        super().keep_for(keeper)

    def _forget_namespaces(self, count: int) -> None:
        if count:
            released = self._state.released[:count].tolist()
            self._names.known.forget(released, self._state.namespace_children.cpu().numpy())

    def _scores(self) -> torch.Tensor:
        """Return int64 [R]: the scores of the policy. The lowest goes first; the tick breaks ties."""
        s, order = self._state, self.options.order
        created = times_of(s.created) if self._holds_dropped else s.created
        nodes = Nodes(s.tick, created, s.priority, s.hit_count, s.lock_ref, s.children, s.length, s.end)
        if order.score is None:
            scores = built_in_scores(order, nodes)
        else:
            live = s.parent != FREE_ROW
            live[:1].fill_(False)  # an assignment would copy from the host, which a CUDA graph cannot
            scores = scores_of(order.score, nodes, live)
        return scores.masked_fill(s.created < 0, LOWEST) if self._holds_dropped else scores

    # Sizes

    def _counters(self, *places: int) -> int:
        """Wait for all calls so far, and return the sum of these sizes."""
        if self.busy:
            self._settle()
        self._finish_all()
        return sum([self.mailbox.counter(place) for place in places])

    @property
    @public_call
    def evictable_tokens(self) -> int:
        return self._counters(mail.EVICTABLE)

    @property
    @public_call
    def protected_tokens(self) -> int:
        return self._counters(mail.PROTECTED)

    @property
    @public_call
    def total_tokens(self) -> int:
        return self._counters(mail.EVICTABLE, mail.PROTECTED)

    @property
    @public_call
    def num_nodes(self) -> int:
        return self._counters(mail.NODES)

    @public_call
    def changes(self) -> int:
        if self.busy:
            self._settle()
        return self._changes

    # The whole tree

    def pack(self) -> None:
        gpu.compact(self._arrays, True)
        self._calls.tell(self._tell)

    @public_call
    def digest(self) -> str:
        me = get_ident()
        if self.busy:
            self.recover(me)
        self.busy = me
        try:
            self._finish_all()
            self._open = _NOTHING_YET
            items = self._names.known.items()
            hashes = np.array([name_hash(name) for _, name in items], np.int64)
            codes = torch.tensor([code for code, _ in items], device="cpu").to(self.device)
            self._state.namespace_hash[codes] = torch.from_numpy(hashes).to(self.device)
            lanes = gpu.digest(self._arrays)
            self._open = None
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
            if self._calls.is_capturing():
                raise RuntimeError("a CUDA graph cannot hold a reset: the host forgets the namespaces")
            call = self._calls.next()
            self._open = OpenCall(interrupted.RESET, call, self._changes, before=self._unreturned)
            gpu.reset(self._arrays, call)
            self._calls.enqueued(call)
            self._names.known.clear()
            self._names.nothing_given()
            self._unseen_inserts.clear()
            self._most_stored = 0
            self._holds_dropped &= self._graph_evicts  # a captured eviction frees dropped nodes first, also from now on
            self._unreturned = None
            if self._listener is not None:
                self._listener.forget()
            self._changes += 1
            self._open = None
            self.busy = FREE
        except BaseException:
            cut_short(self, me)
            raise

    def read_content(self, slots: bool, only: Collection[str] | None = None) -> Content:
        self._finish_all()
        first = int(self._state.numbers[numbers.POOL_END]) - pool_units(self.options.max_tokens, self.options.page_size)
        sizes = (self.mailbox.counter(place) for place in (mail.EVICTABLE, mail.PROTECTED, mail.NODES))
        pool = (self._pool if slots else self._pool[:0]).numpy(force=True)
        state = as_numpy(self._state) if only is None else fields_of(self._state, only)
        return Content(self.options, state, pool, first, self._names.known.items(), *sizes)

    def restore(self, saved: Saved) -> None:
        if self.options.grows:
            needed = tokens_for(saved, self.options.page_size)
            if is_too_large(needed, self.options.page_size, halves=2):
                raise TooLargeForDeviceError(f"the tree needs space for {needed} tokens: too many for a GPU")
            self._grow(needed)
            self._most_stored = len(saved["tokens"])
        fill(self._state, self._pool, saved)
        self._holds_dropped = bool((saved["created"] < 0).any())
        self._locks.most = int(saved["lock_ref"].max())
        found = self._state.numbers
        found[numbers.POOL_CURSOR] = found[numbers.EVICTABLE] + found[numbers.PROTECTED]
        self._names.known.restore(saved["names"])
        gpu.rebuild(self._arrays)
        self._calls.tell(self._tell)
        self._finish_all()  # the next insert relies on the FREE_UNITS word that is written here
