"""A simulated server with a flatradix tree, its slots and a WaitingQueue.

A step continues a prompt that the last step has cut, then takes requests in the order of the policy until the chunk is
full; the last one may be cut at a page. An admitted request locks its match. Its slots are promised from then on, so
that nothing runs out later; they are taken, and others evicted, when they are computed. After each step its whole pages
are inserted; where others have cached the same tokens meanwhile, the tree keeps theirs. While a request decodes, it
holds the slots of its output. At its end, prompt and output are inserted and unlocked.

At least the last token of a prompt is computed, as its logits are needed: only the tokens before it are matched.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from flatradix.queue.waiting_queue import WaitingQueue
from flatradix.replay.replay import SlotList
from flatradix.replay.traces import VOCABULARY
from flatradix.results import InsertResult, MatchResult
from flatradix.simulate.load import Job
from flatradix.simulate.serve import NEVER
from flatradix.simulate.settings import Policy, Settings
from flatradix.tree import RadixTree


class _Run:
    """An admitted request. place: what it has locked. done: tokens with KV. slots: int32, of place.length to done."""

    __slots__ = ("done", "hit", "job", "number", "place", "slots")

    def __init__(self, number: int, job: Job, place: MatchResult) -> None:
        self.number, self.job = number, job
        self.place: MatchResult | InsertResult = place
        self.hit = self.done = place.length
        self.slots = np.empty(0, np.int32)


class FlatServer:
    """A server of the simulation; see `serve.Server`."""

    def __init__(self, jobs: Sequence[Job], settings: Settings, policy: Policy) -> None:
        self._jobs, self._settings, self._policy = jobs, settings, policy
        self.tree = RadixTree(settings.capacity, page_size=settings.page_size, device="cpu")
        self.queue = WaitingQueue(self.tree, keep=policy.keep, compute_last=True)
        self._slots = SlotList(settings.capacity)
        self._numbers: dict[int, int] = {}
        self._order = torch.empty(0, dtype=torch.int64)
        self._partial: _Run | None = None
        self._batch: list[_Run] = []
        self._decoding: list[tuple[float, int, _Run]] = []
        self._promised = 0  # slots that admitted requests will still take
        self._left = 0  # tokens of the chunk that are not taken yet

    def waiting(self) -> int:
        return len(self._numbers)

    def running(self) -> int:
        cut = self._partial is not None and self._partial not in self._batch
        return len(self._decoding) + len(self._batch) + cut

    def add(self, numbers: Sequence[int]) -> None:
        jobs = [self._jobs[number] for number in numbers]
        ids = self.queue.add([job.prompt for job in jobs], arrival=[job.arrival for job in jobs])
        self._numbers.update(zip(ids.tolist(), numbers, strict=True))

    def next_end(self) -> float:
        return self._decoding[0][0] if self._decoding else NEVER

    def release(self, now: float) -> None:
        while self.next_end() <= now:
            run = heapq.heappop(self._decoding)[2]
            output = np.full(run.job.output, VOCABULARY + run.number, np.int32)  # equal to nothing else
            self._cache(run, np.concatenate([run.job.prompt[run.place.length :], output]))
            self._slots.give(run.slots)
            self.tree.unlock(run.place)

    def begin(self, now: float) -> int | None:
        self._left = self._settings.chunk
        if self._partial is not None:
            self._extend(self._partial)
        room = self._settings.max_running - self.running()
        if self._numbers and self._left > 0 and room > 0:
            self._admit(now, room)
        return sum(run.done - run.place.length for run in self._batch) if self._batch else None

    def _admit(self, now: float, room: int) -> None:
        """Admit requests in order. Those of the plan fit into the chunk; the one after them is cut, if it fits."""
        s, p = self._settings, self._policy
        self._order = self.queue.order(p.order, now=now, patience=s.patience, every=s.every, defer_shared=p.defer)
        free = max(0, self._slots.free - self._promised)
        plan = self.queue.plan(self._order, token_budget=self._left, max_requests=room, free_tokens=free)
        admitted = []
        for ident in self._order[: min(room, len(plan.ids) + 1)].tolist():
            if self._left <= 0 or not self._start(self._numbers[ident]):
                break
            del self._numbers[ident]
            admitted.append(ident)
        self.queue.remove(admitted)

    def _start(self, number: int) -> bool:
        """Lock a request's match and begin its prefill, if its slots are there or can be freed. Return whether."""
        job = self._jobs[number]
        run = _Run(number, job, self.tree.match(job.prompt[:-1], lock=True))
        rest = len(job.prompt) - run.done
        slots = self._slots.free + self.tree.evictable_tokens - self._promised
        if rest + job.output > slots or self._step_of(rest) == 0 < rest:
            self.tree.unlock(run.place)
            return False
        self._promised += rest + job.output
        self._extend(run)
        return True

    def _step_of(self, rest: int) -> int:
        """Return how many of `rest` tokens this step computes: all of them, or what fits into the chunk in pages."""
        page = self._settings.page_size
        return rest if -(-rest // page) * page <= self._left else self._left // page * page

    def _extend(self, run: _Run) -> None:
        """Compute the next tokens of a prompt in this step."""
        rest = len(run.job.prompt) - run.done
        count = self._step_of(rest)
        run.slots = self._take(count)  # what was before is in the tree: a cut is at a page
        run.done += count
        self._left -= -(-count // self._settings.page_size) * self._settings.page_size
        self._partial = run if count < rest else None
        self._batch.append(run)

    def _take(self, count: int) -> np.ndarray:
        """Take promised slots; evict where too few are free."""
        short = count - self._slots.free
        if short > 0:
            self._slots.give(self.tree.evict(short).slots.numpy())
        self._promised -= count
        return self._slots.take(count).copy()

    def end(self, now: float) -> list[tuple[int, int]]:
        ended = []
        for run in self._batch:
            self._cache(run, run.job.prompt[run.place.length : run.done])
            if run.done == len(run.job.prompt):
                ended.append((run.number, run.hit))
                self._decode(run, now)
        self._batch = []
        return ended

    def _decode(self, run: _Run, now: float) -> None:
        run.slots = np.concatenate([run.slots, self._take(run.job.output)])
        heapq.heappush(self._decoding, (now + run.job.output * self._settings.tpot, run.number, run))

    def _cache(self, run: _Run, tokens: np.ndarray) -> None:
        """Insert the whole pages of what a request has computed after its place, and hold them instead."""
        whole = len(tokens) // self._settings.page_size * self._settings.page_size
        if not whole:
            return
        place = self.tree.insert(tokens[:whole], run.slots[:whole], start=run.place)
        self._slots.give(run.slots[: place.prefix_length - run.place.length])
        self.tree.lock(place)
        self.tree.unlock(run.place)
        run.place, run.slots = place, run.slots[whole:]

    def reject(self) -> int:
        head = int(self._order[0])
        self.queue.remove(head)
        return self._numbers.pop(head)

    def drain(self) -> None:
        self._slots.give(self.tree.evict(self.tree.total_tokens).slots.numpy())
        if self._promised or self.tree.total_tokens or not self._slots.is_whole():
            raise RuntimeError(f"slots were lost or doubled: {self._slots.free} of {self._settings.capacity} came back")
