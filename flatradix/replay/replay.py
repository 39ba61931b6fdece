"""Replaying requests through a tree as an engine would, and collecting the figures.

For each request:

1. unlock the paths of requests that have been held for more than `hold` later requests, oldest first;
2. match the prompt and lock the match;
3. if the cached tokens and the new ones (whole pages) exceed the capacity, evict the excess;
4. if they still do, count the request as rejected and unlock the match;
5. else insert the tokens after the match, with new slots;
6. lock the inserted path, unlock the match.

With batches of B, B requests take each step together, in one call: old requests are released, all B are matched and
locked, space is freed for all, all are inserted and their paths are locked. So tokens that several requests of a batch
share are no hit, but are stored once: the slots of the first request are stored, and the others free theirs. A batch
that does not fit as a whole is inserted request by request.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np
import torch

from flatradix.replay.report import Report, Settings, versions
from flatradix.results import EvictResult, InsertResult, MatchResult
from flatradix.tree import RadixTree
from flatradix.warm_up import warm_up

OPERATIONS = ("match", "lock", "slots", "evict", "insert", "unlock")
Progress = Callable[[int, float], None]
_SECONDS_BETWEEN_REPORTS = 0.1


class SlotList:
    """A stack of the free slots among `count`. Memory is committed only for slots that have been allocated."""

    def __init__(self, count: int) -> None:
        self._stack = np.empty(count, np.int32)
        self._written = count  # entries below this index are not written yet: entry i stands for slot count - 1 - i
        self.free = count

    def take(self, count: int) -> np.ndarray:
        """Allocate `count` slots. Return them as int32, a view that is valid until the next `give`.

        Raises RuntimeError if fewer slots are free.
        """
        if count > self.free:
            raise RuntimeError(f"slots were lost: {count} are needed and should be free, but {self.free} are")
        self.free -= count
        if self.free < self._written:
            last = len(self._stack) - 1
            self._stack[self.free : self._written] = np.arange(last - self.free, last - self._written, -1)
            self._written = self.free
        return self._stack[self.free : self.free + count]

    def give(self, slots: np.ndarray) -> None:
        """Free slots, [K] of any integer dtype. Raises RuntimeError if more slots would be free than exist."""
        if self.free + len(slots) > len(self._stack):
            raise RuntimeError(f"{len(slots)} slots came back, but only {len(self._stack) - self.free} were out")
        self._stack[self.free : self.free + len(slots)] = slots
        self.free += len(slots)

    def is_whole(self) -> bool:
        """Return whether every slot is free, exactly once."""
        back = np.sort(self._stack[self._written :])
        return self.free == len(self._stack) and bool((back == np.arange(len(back))).all())


def replay(
    prompts: Iterable[np.ndarray],
    page_size: int = 64,
    capacity: int = 1_000_000,
    hold: int = 32,
    policy: str = "lru",
    device: str = "auto",
    progress: Progress | None = None,
    batch: int = 1,
) -> Report:
    """Replay prompts (1-D integer sequences) through a new tree of `capacity` tokens, and return the report.

    progress: called with the number of requests done and the hit rate so far, about 10 times a second and at the end.
    Raises ValueError and DeviceUnavailableError for bad arguments, RuntimeError if slots were lost or doubled.
    """
    settings = Settings(page_size, capacity, hold, policy, device, batch)
    settings.validate()
    run = Replay(settings)
    begin = perf_counter()
    warm_up(settings.device, settings.page_size)
    ready = perf_counter()
    run.feed(prompts, progress)
    return run.finish(perf_counter() - ready, ready - begin)


class Replay:
    """A replay in progress: a tree, its slots, and the requests that hold locks."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tree = RadixTree(
            settings.capacity, page_size=settings.page_size, device=settings.device, policy=settings.policy
        )
        self._slots = SlotList(settings.capacity)
        self._held: deque[tuple[int, InsertResult]] = deque()
        self._sha = hashlib.sha256()
        self._evicted = self._rejected = self._hit_tokens = self._input_tokens = 0
        self._lengths, self._hits, self._cached, self._locked = (array("q") for _ in range(4))
        self._latencies = {name: array("q") for name in OPERATIONS}

    def feed(self, prompts: Iterable[np.ndarray], progress: Progress | None = None) -> None:
        """Replay prompts, one batch after another."""
        due = perf_counter() + _SECONDS_BETWEEN_REPORTS
        for batch in _batches(prompts, self.settings.batch):
            if self.settings.batch == 1:
                self.step(batch[0])
            else:
                self.step_batch(batch)
            if progress is not None and perf_counter() >= due:
                progress(len(self._hits), self._hit_tokens / max(1, self._input_tokens))
                due = perf_counter() + _SECONDS_BETWEEN_REPORTS
        if progress is not None:
            progress(len(self._hits), self._hit_tokens / max(1, self._input_tokens))

    def step(self, prompt: np.ndarray) -> None:
        """Replay one prompt, [length] integers."""
        self._release(len(self._hits))
        match = self._match(prompt)
        hit = match.length
        aligned = len(prompt) // self.settings.page_size * self.settings.page_size
        if self._make_room(aligned - hit):
            inserted = self._insert(prompt[hit:aligned], match)
            self._timed("lock", self.tree.lock, inserted)
            self._held.append((len(self._hits), inserted))
        else:
            self._rejected += 1
        self._timed("unlock", self.tree.unlock, match)
        self._record(len(prompt), hit)

    def step_batch(self, prompts: list[np.ndarray]) -> None:
        """Replay several prompts together."""
        now = len(self._hits)
        self._release(now)
        match: MatchResult = self._timed("match", self.tree.match, prompts, None, True, True)
        self._timed("slots", self.tree.slots, match)
        hits: list[int] = match.lengths.tolist()
        page = self.settings.page_size
        pairs = zip(prompts, hits, strict=True)
        rests = [prompt[hit : len(prompt) // page * page] for prompt, hit in pairs]
        if self._make_room(sum(map(len, rests))):
            self._hold_all(rests, match, now)
        else:
            for query, rest in enumerate(rests):
                one = MatchResult(match.lengths[query : query + 1], match.handles[query : query + 1])
                if self._make_room(len(rest)):
                    self._hold_all([rest], one, now + query)
                else:
                    self._rejected += 1
        self._timed("unlock", self.tree.unlock, match)
        for prompt, hit in zip(prompts, hits, strict=True):
            self._record(len(prompt), hit)

    def _hold_all(self, rests: list[np.ndarray], match: MatchResult, now: int) -> None:
        """Insert the tokens after each match, with new slots, and lock the paths."""
        slots = self._slots.take(sum(map(len, rests)))
        bounds = np.cumsum([0, *map(len, rests)]).tolist()
        parts = [slots[begin:end] for begin, end in pairwise(bounds)]
        inserted: InsertResult = self._timed("insert", self.tree.insert, rests, parts, None, 0, match)
        known = (inserted.prefix_lengths - match.lengths).tolist()
        duplicates = [part[:count].copy() for part, count in zip(parts, known, strict=True)]
        for part in duplicates:
            self._slots.give(part)
        self._timed("lock", self.tree.lock, inserted)
        self._held.append((now + len(rests) - 1, inserted))

    def _release(self, now: int) -> None:
        while self._held and now - self._held[0][0] > self.settings.hold:
            self._timed("unlock", self.tree.unlock, self._held.popleft()[1])

    def _match(self, prompt: np.ndarray) -> MatchResult:
        match: MatchResult = self._timed("match", self.tree.match, prompt)
        self._timed("lock", self.tree.lock, match)
        self._timed("slots", self.tree.slots, match)
        return match

    def _make_room(self, new: int) -> bool:
        """Return whether `new` tokens fit. Evict the excess first, if there is any."""
        excess = self.tree.total_tokens + new - self.settings.capacity
        if excess <= 0:
            return True
        freed: EvictResult = self._timed("evict", self.tree.evict, excess)
        self._slots.give(freed.slots.numpy(force=True))
        self._evicted += freed.num_tokens
        return freed.num_tokens >= excess

    def _insert(self, tokens: np.ndarray, match: MatchResult) -> InsertResult:
        slots = self._slots.take(len(tokens))
        inserted: InsertResult = self._timed("insert", self.tree.insert, tokens, slots, None, 0, match)
        duplicates = inserted.prefix_length - match.length
        if duplicates:
            self._slots.give(slots[:duplicates].copy())
        return inserted

    def _timed(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        begin = perf_counter_ns()
        result = call(*arguments)
        self.tree.raise_pending()
        self._latencies[operation].append(perf_counter_ns() - begin)
        return result

    def _record(self, length: int, hit: int) -> None:
        self._sha.update(hit.to_bytes(4, "little"))
        self._input_tokens += length
        self._hit_tokens += hit
        self._lengths.append(length)
        self._hits.append(hit)
        self._cached.append(self.tree.total_tokens)
        self._locked.append(self.tree.protected_tokens)

    def drain(self) -> None:
        """Unlock and evict everything. Raises RuntimeError unless every slot comes back, exactly once."""
        while self._held:
            self.tree.unlock(self._held.popleft()[1])
        self._slots.give(self.tree.evict(self.tree.total_tokens).slots.numpy(force=True))
        if self.tree.total_tokens or not self._slots.is_whole():
            raise RuntimeError(
                f"slots were lost or doubled: {self._slots.free} of {self.settings.capacity} are free after all was "
                f"evicted, and {self.tree.total_tokens} tokens remain"
            )

    def finish(self, seconds: float, warm_up_seconds: float = 0.0) -> Report:
        """Make the report, drain the tree, and return the report. Raises as `drain`."""
        report = Report(
            settings=self.settings,
            device=_device_name(self.tree.device),
            requests=len(self._hits),
            input_tokens=self._input_tokens,
            hit_tokens=self._hit_tokens,
            hits_sha256=self._sha.hexdigest(),
            evicted_tokens=self._evicted,
            rejected=self._rejected,
            final_tokens=self.tree.total_tokens,
            nodes=self.tree.num_nodes,
            nbytes=self.tree.nbytes,
            digest=self.tree.digest(),
            seconds=seconds,
            warm_up_seconds=warm_up_seconds,
            prompt_lengths=_frozen(self._lengths),
            hits=_frozen(self._hits),
            cached=_frozen(self._cached),
            locked=_frozen(self._locked),
            latencies={name: _frozen(times) for name, times in self._latencies.items()},
            versions=versions(),
        )
        self.drain()
        return report


def _batches(prompts: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    iterator = iter(prompts)
    while batch := list(islice(iterator, size)):
        yield batch


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _frozen(values: array[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)
