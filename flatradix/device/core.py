"""Core: the arrays of a tree on a GPU, its calls under way, and what each of its operations needs.

The operations stand beside it: matching, locking, pinning, reading, inserting, evicting. `DeviceIndex` is all of
them together. An operation takes the gate, records in `_open` how to undo it, enqueues kernels, and clears `_open`.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch

from flatradix.device import interrupted
from flatradix.device.calls import Calls
from flatradix.device.growth import Larger, larger_than
from flatradix.device.input import places_on
from flatradix.device.interrupted import NOTHING, NOTHING_YET, OpenCall
from flatradix.device.limits import Bound
from flatradix.device.mailbox import abandon
from flatradix.device.names import Names
from flatradix.device.results import Awaited, Batch, OnDevice, Results
from flatradix.device.room import FIRST_BEYOND
from flatradix.device.stages import Stages
from flatradix.errors import TooLargeForDeviceError
from flatradix.gate import CUT_SHORT, FREE, add_gate, public_call
from flatradix.index import Index
from flatradix.inputs.devices import interpreted
from flatradix.inputs.options import Options
from flatradix.inputs.places import check_starts
from flatradix.kernels import gpu
from flatradix.layout import mail, numbers
from flatradix.layout.growth import is_too_large, most_tokens, next_capacity
from flatradix.layout.queries import NO_PLACES, PlaceAddresses, Values
from flatradix.layout.scratch import Scratch, allocate_scratch, enlarge
from flatradix.layout.state import allocate_device, pool_units
from flatradix.victims import listener_of

_SMALLEST_BATCH = 1024
_WAIT_IN_GRAPH = "a CUDA graph cannot hold a call that waits for the device: read sizes and errors outside of it"


class Core(Index):
    """What all operations of a tree on a GPU share.

    mailbox: the pinned words by which kernels tell the host their results.
    """

    def __init__(self, options: Options, device: torch.device, generation: int) -> None:
        add_gate(self)
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
        # (call, units) of inserts after the last known FREE_UNITS word
        self._unseen_inserts: deque[tuple[int, int]] = deque()
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
        self._beyond = FIRST_BEYOND
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
        changed_nothing = opened is NOTHING_YET
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

    def raise_refusals(self) -> None:
        """Do what `raise_pending` does, outside of a call or within one of this thread."""
        if self.busy == get_ident():
            self._finish_all()
        else:
            self.raise_pending()

    @public_call
    def raise_pending(self) -> None:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._finish_all()
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
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

    # Places and results

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

    def _late_result(self, keys: Values, call: int, told: int = -1, captured: bool = False) -> Awaited | Batch:
        """Return the source of a new result. told: where a batch tells its lengths, or -1."""
        if keys.offsets == 0:
            return self._results.one(self, call)
        return self._results.many(self, call, keys.batch, told, captured)

    def told_lengths(self, call: int, place: int, batch: int) -> torch.Tensor | None:
        """Return the lengths that a match has told the host, or None if the host cannot know whether they are right."""
        return None if self._calls.captured else self.mailbox.lengths(call, place, batch)

    def _note_locks(self, count: int, operation: str) -> None:
        if self._locks.add(count):
            self._look_up(self._locks, count, operation)

    def _look_up(self, bound: Bound, count: int, operation: str) -> None:
        self._finish_all()
        bound.look_up(int(getattr(self._state, bound.column).max()), count, operation)

    # Sizes

    def _counters(self, *places: int) -> int:
        """Wait for all calls so far, and return the sum of these sizes."""
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
        try:
            self._finish_all()
            total = sum([self.mailbox.counter(place) for place in places])
            self.busy = FREE
            return total
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

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
