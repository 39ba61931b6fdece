"""The scheduler's waiting requests, each with its prompt in a WaitingQueue beside the cache's tree."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.errors import QueryError
from flatradix.integrations.sglang.cache import FlatRadixCache, namespace_of
from flatradix.integrations.sglang.index import before_foreign
from flatradix.queue.waiting_queue import WaitingQueue

_FEWEST = 64
_FEW_RUNS = 16
_CONSIDERED = 16  # requests at the head of the queue, which SGLang may have matched after the last pass


class Columns(NamedTuple):
    """What is known of each request, by slot. Lengths count tokens, or units with bigram keys.

    id: in the queue. prompt: tokens of the input. length: tokens of input and output. most: the longest match that
    SGLang would use. usable: `most` if the request asks for the log probabilities of its prompt, else `length`.
    arrival: SGLang's processed tokens when it came. entered: SGLang's time when it came. matched: SGLang's
    `num_matched_prefix_tokens`, -1 before the first look. gain: tokens that an older request of the queue computes.
    """

    id: np.ndarray
    prompt: np.ndarray
    length: np.ndarray
    most: np.ndarray
    usable: np.ndarray
    arrival: np.ndarray
    entered: np.ndarray
    matched: np.ndarray
    gain: np.ndarray

    @classmethod
    def of(cls, capacity: int) -> Columns:
        kinds = {"entered": np.float64}
        return cls(**{name: np.zeros(capacity, kinds.get(name, np.int64)) for name in cls._fields})

    def enlarged(self) -> Columns:
        return Columns(*(np.concatenate([column, np.zeros_like(column)]) for column in self))


class FollowedQueue:
    """A WaitingQueue that follows the scheduler's list of waiting requests, and brings it into order.

    A request has a slot from when it is first seen in the list until it is no longer seen there. A pass over a list
    that has not changed touches no request. An admitted request that is retracted must be told by `leave`: it may stand
    in the next list again, with other tokens.
    """

    def __init__(self, cache: FlatRadixCache) -> None:
        """Raises ValueError if another queue keeps in the tree already."""
        self.queue = WaitingQueue(cache.tree, keep=True)
        self.columns = Columns.of(_FEWEST)
        self.requests: list[Any] = [None] * _FEWEST  # by slot
        self.listed = np.zeros(0, np.int64)  # the slots of the list, in its order
        self._list: list[Any] = []  # the list itself, as it was last seen
        self._by_age = np.zeros(0, np.int64)  # slots, in the order of the queue's ids
        self._slots: dict[Any, int] = {}
        self._free = list(range(_FEWEST - 1, -1, -1))
        self._is_told = True  # whether the queue knows the order of the list
        self._by_rid: list[int] = []  # slots by request id, and those that came since
        self._came = True

    def __len__(self) -> int:
        return len(self._list)

    # Who waits

    def follow(self, waiting: list[Any]) -> None:
        """Add the requests that have joined the list since the last call, and remove those that have left it."""
        if self._list == waiting:
            return
        slots = self._known_slots(waiting)
        known = slots >= 0
        stays = np.zeros(len(self.requests), np.bool_)
        stays[slots[known]] = True
        stays_listed = stays[self.listed]
        came = np.flatnonzero(~known).tolist()
        in_turn = not came or came[0] == len(slots) - len(came)
        self._is_told &= in_turn and np.array_equal(slots[known], self.listed[stays_listed])
        self._remove(self.listed[~stays_listed])
        for at in came:
            slots[at] = self._add(waiting[at])
        if came:
            self._came = True
            self._by_age = np.concatenate([self._by_age, slots[came]])
        self.listed = slots
        if self._list != waiting:
            self._list = list(waiting)

    def leave(self, req: Any) -> None:
        """Forget a request that has left the list, if it is known."""
        if req in self._slots:
            at = self._list.index(req)
            self._remove(self.listed[at : at + 1])
            self.listed = np.delete(self.listed, at)
            del self._list[at]

    def _known_slots(self, waiting: list[Any]) -> np.ndarray:
        """Return the slots of a list, -1 for requests without one.

        The common case is fast, and touches no request that stays: some have left in front, and some have come behind.
        """
        last, slots = self._list, self._slots
        begin = last.index(waiting[0]) if waiting and waiting[0] in slots else len(last)
        del last[:begin]
        kept = len(last)
        came = waiting[kept:]
        last += came
        if last == waiting and not any(req in slots for req in came):
            return np.concatenate([self.listed[begin:], np.full(len(came), -1, np.int64)])
        return np.array([slots.get(req, -1) for req in waiting], np.int64)

    def _remove(self, gone: np.ndarray) -> None:
        if len(gone) == 0:
            return
        for number in self.columns.id[gone].tolist():
            self.queue.remove(number)
        is_gone = np.zeros(len(self.requests), np.bool_)
        is_gone[gone] = True
        self._by_age = self._by_age[~is_gone[self._by_age]]
        self._by_rid = [slot for slot in self._by_rid if not is_gone[slot]] if self._by_rid else []
        for slot in gone.tolist():
            del self._slots[self.requests[slot]]
            self.requests[slot] = None
            self._free.append(slot)

    def _add(self, req: Any) -> int:
        """Add a request to the queue, and return its slot."""
        if not self._free:
            self._enlarge()
        slot = self._free.pop()
        tokens = req.origin_input_ids + req.output_ids if req.output_ids else req.origin_input_ids
        count = len(tokens)
        most = req._compute_max_prefix_len(count)
        columns = self.columns
        columns.id[slot] = self._add_tokens(tokens, namespace_of(req))
        columns.prompt[slot] = len(req.origin_input_ids)
        columns.length[slot] = count
        columns.most[slot] = most
        columns.usable[slot] = most if most < count - 1 else count
        columns.arrival[slot] = req.arrival_processed_tokens
        columns.entered[slot] = req.time_stats.wait_queue_entry_time
        columns.matched[slot] = -1
        self.requests[slot] = req
        self._slots[req] = slot
        return slot

    def _add_tokens(self, tokens: Any, namespace: str | bytes | None) -> int:
        """Add the tokens before the first foreign one, as the cache would store them; return the queue's id."""
        try:
            found = self.queue.add(tokens, namespace, arrival=0.0)
        except QueryError:
            found = self.queue.add(before_foreign(tokens), namespace, arrival=0.0)
        return int(found[0])

    def _enlarge(self) -> None:
        had = len(self.requests)
        self.columns = self.columns.enlarged()
        self.requests += [None] * had
        self._free = list(range(2 * had - 1, had - 1, -1))

    # What is cached

    def look(self) -> None:
        """Bring `matched` and `gain` up to date, and SGLang's `num_matched_prefix_tokens` of each request."""
        columns, slots = self.columns, self._by_age
        cached, shared = self.queue.cached_lengths().numpy(), self.queue.shared_lengths().numpy()
        most, usable, before = columns.most[slots], columns.usable[slots], columns.matched[slots]
        matched = np.minimum(cached, most)
        columns.matched[slots] = matched
        columns.gain[slots] = np.minimum(cached + shared, usable) - np.minimum(cached, usable)
        changed = np.concatenate([slots[matched != before], self.listed[:_CONSIDERED]])
        requests = self.requests
        for slot, length in zip(changed.tolist(), columns.matched[changed].tolist(), strict=True):
            requests[slot].num_matched_prefix_tokens = length

    # Order

    def arrange(self, waiting: list[Any], order: np.ndarray) -> None:
        """Bring the list, which was followed, into an order: positions in it."""
        starts = np.flatnonzero(np.diff(order, prepend=-2) != 1)  # of runs that stay together
        if len(starts) <= 1:
            return
        if len(starts) <= _FEW_RUNS:
            runs = list(zip(order[starts].tolist(), np.diff(starts, append=len(order)).tolist(), strict=True))
            move_runs(waiting, runs)
            move_runs(self._list, runs)
        else:
            waiting[:] = self._list = [waiting[at] for at in order.tolist()]
        self.listed = self.listed[order]
        self._is_told = False

    def tell(self) -> None:
        """Tell the queue the order of the list: evictions give up what the last requests want first."""
        if not self._is_told:
            ranks = torch.from_numpy(self._positions()[self._by_age])
            self.queue.order(lambda _: ranks)
            self._is_told = True

    def depth_first(self) -> np.ndarray:
        """Return positions in the list, depth first through the tree, the heaviest branch first."""
        ids = self.columns.id[self._by_age]
        turns = np.searchsorted(ids, self.queue.order("dfs-weight").numpy())
        return self._positions()[self._by_age[turns]]

    def _positions(self) -> np.ndarray:
        """Return the position of each slot in the list: int64 [slots]."""
        positions = np.zeros(len(self.requests), np.int64)
        positions[self.listed] = np.arange(len(self.listed))
        return positions

    def rid_ranks(self) -> np.ndarray:
        """Return the rank of each request's id among all that wait, in the order of the list."""
        if self._came:
            known = set(self._by_rid)
            slots = self._by_rid + [slot for slot in self._by_age.tolist() if slot not in known]
            self._by_rid = sorted(slots, key=lambda slot: self.requests[slot].rid)
            self._came = False
        ranks = np.zeros(len(self.requests), np.int64)
        ranks[self._by_rid] = np.arange(len(self._by_rid))
        found: np.ndarray = ranks[self.listed]
        return found


def move_runs(items: list[Any], runs: list[tuple[int, int]]) -> None:
    """Bring runs of a list, (first position, length), into the order given. What need not move is not touched."""
    done = 0
    for number, (first, length) in enumerate(runs):
        at = first + sum(count for begin, count in runs[:number] if begin > first)
        if at != done:
            run = items[at : at + length]
            del items[at : at + length]
            items[done:done] = run
        done += length
