"""Evicting: victims of a tree on a GPU, and what drop removes."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch

from flatradix import dropping
from flatradix.device import interrupted
from flatradix.device.core import Core
from flatradix.device.dropping import marks_of, rows_of
from flatradix.device.freed import about_to_go
from flatradix.device.interrupted import NOTHING_YET, OpenCall
from flatradix.device.room import MOST_BEYOND, Found, Room, allocate, found_by
from flatradix.dropping import NOT_GIVEN, times_of
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.inputs.arguments import check_out, token_count
from flatradix.inputs.places import read_places
from flatradix.inputs.policy import Nodes, built_in_scores, scores_of
from flatradix.inputs.refuse import refuse_out
from flatradix.kernels import gpu
from flatradix.layout import mail
from flatradix.layout.dropped import LOWEST
from flatradix.layout.numbers import MAX_UNITS
from flatradix.layout.queries import Freeing, Wanted, Wants
from flatradix.layout.state import FREE_ROW
from flatradix.results import EvictIntoResult, EvictResult
from flatradix.victims import Freed

_EVICT_IN_GRAPH = (
    "a CUDA graph cannot hold an eviction that returns as many slots as there are: give evict a tensor for them, out="
)


class Evicting(Core):
    """Evict, drop."""

    @public_call
    def evict(self, num_tokens: Any, out: torch.Tensor | None = None) -> EvictResult | EvictIntoResult:
        me = get_ident()
        self.busy = me if not self.busy else self.recover(me)
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
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _evict(self, wanted: int, room: Room | None) -> tuple[Room, int, int, Freed | None]:
        """Evict, and wait for that. Return the memory, the tokens and nodes that went, and what the callback is told.

        room: the caller's memory. Raises ValueError if it is too small.
        """
        self._open = NOTHING_YET
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
            self._beyond = min(max(self._beyond, 2 * (found.tokens - missing)), MOST_BEYOND)
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
        self.busy = me if not self.busy else self.recover(me)
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
            self._open = NOTHING_YET
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
            if self.busy == me:
                self.busy = CUT_SHORT
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
        self._open = NOTHING_YET
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

    # Scores

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
