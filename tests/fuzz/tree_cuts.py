"""Interrupted calls of a RadixTree, alone or beside a WaitingQueue: no slot, lock or prompt is lost or misplaced.

The user of the tree has a free list of slots, a list of locks, and knows for each slot the page that it was given to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch

from flatradix import CapacityError, QueryError, RadixTree, WaitingQueue
from flatradix.inspect.nodes import nodes_of
from tests.fuzz.cuts import Cutter, run_programs

NAMES = (None, None, "a", b"b", "c")
POLICIES = ("lru", "lru", "lfu", "slru", "fifo", "priority", "mru")
ORDERS = ("fcfs", "lpm", "aged", "dfs-weight", "hrrn", "k-lpm", "shortest-prefill")
PROGRAMS, STEPS, STEPS_A_CHECK = 4, 160, 5


class Books:
    """A user of a tree. The lists record what a call has done, even if its result never arrived."""

    def __init__(self, random: Random, counts: Counter[str], with_queue: bool) -> None:
        self.random = random
        self.slots = random.choice((40, 120, 400))
        self.page = random.choice((1, 2, 4))
        self.tree = RadixTree(
            None if random.random() < 0.2 else self.slots, self.page, "cpu", random.choice(POLICIES),
            random.choice((None, "cpu")), evict_by=random.choice(("node", "page")),
            slot_dtype=random.choice((torch.int32, torch.int64)),
        )  # fmt: skip
        self.cutter = Cutter(random, counts)
        self.free = list(range(self.slots))
        self.given: dict[int, Any] = {}  # by slot: the namespace, the tokens up to the end of its page, its offset
        self.locks: list[Any] = []
        self.wants: list[Any] = []
        self.places: list[Any] = []
        self.queue = WaitingQueue(self.tree, keep=random.random() < 0.7) if with_queue else None
        self.waiting: dict[int, Any] = {}
        self.keys_drawn: list[list[int]] = [[]]

    def key(self) -> list[int]:
        stem = self.random.choice(self.keys_drawn)
        key = stem[: self.random.randint(0, len(stem))]
        key = key + [self.random.randint(0, 2) for _ in range(self.random.randint(0, 6 * self.page))]
        self.keys_drawn = [*self.keys_drawn[-8:], key[: 16 * self.page]]
        return key[: 16 * self.page]

    def batch(self) -> tuple[list[list[int]], list[Any]]:
        count = self.random.choice((1, 1, 2, 3))
        return [self.key() for _ in range(count)], [self.random.choice(NAMES) for _ in range(count)]

    def done(self, name: str, call: Callable[[], Any]) -> bool:
        """Make a call that may be interrupted; return whether it has taken effect."""
        changes = self.tree.changes()

        def is_done() -> bool:
            return self.tree.changes() != changes

        self.cutter.cut(name, call, is_done)
        return is_done()

    # Calls of the tree

    def evict(self, count: int) -> None:
        out = torch.empty(2 * self.slots, dtype=self.tree.slot_dtype) if self.random.random() < 0.2 else None
        if self.done("evict", lambda: self.tree.evict(count, out)):
            found: Any = self.tree.last_result
            self.free += found.slots[: int(found.num_tokens)].tolist()

    def insert(self) -> None:
        keys, names = self.batch()
        count = sum(map(len, keys))
        if len(self.free) < count:
            self.evict(count - len(self.free))
        if len(self.free) < count:
            return
        start = None
        if self.random.random() < 0.3:
            start = self.tree.match(keys, names)
        taken, self.free = self.free[:count], self.free[count:]
        slots = self.give(keys, names, taken)
        behind = start.lengths.tolist() if start is not None else [0] * len(keys)
        rest = [key[length:] for key, length in zip(keys, behind, strict=True)]
        own = [some[length:] for some, length in zip(slots, behind, strict=True)]
        priority = self.random.randint(0, 2)
        held: set[int] = set()
        with suppress(CapacityError):  # a tight tree of whole nodes: nothing has changed
            if self.done("insert", lambda: self.tree.insert(rest, own, names, priority, start)):
                held = {slot for node in nodes_of(self.tree.content()) for slot in node.slots}
        self.free += [slot for slot in taken if slot not in held]

    def give(self, keys: list[list[int]], names: list[Any], taken: list[int]) -> list[list[int]]:
        rest = iter(taken)
        found = []
        for key, name in zip(keys, names, strict=True):
            own = [next(rest) for _ in key]
            for at, slot in enumerate(own):
                self.given[slot] = name, tuple(key[: at // self.page * self.page + self.page]), at % self.page
            found.append(own)
        return found

    def lock(self) -> None:
        keys, names = self.batch()
        if len(self.locks) > 4:
            self.unlock()
        elif self.random.random() < 0.5:
            if self.done("match lock", lambda: self.tree.match(keys, names, lock=True)):
                self.locks.append(self.tree.last_result)
        else:
            places = self.tree.match(keys, names)
            if self.done("lock", lambda: self.tree.lock(places)):
                self.locks.append(places)

    def unlock(self) -> None:
        if self.locks and self.done("unlock", lambda: self.tree.unlock(self.locks[0])):
            self.locks.pop(0)

    def look(self) -> None:
        keys, names = self.batch()
        places = self.tree.match(keys, names)
        table = torch.zeros((4, 32 * self.page), dtype=torch.int64)
        calls: dict[str, Callable[[], Any]] = {
            "match": lambda: self.tree.match(keys, names),
            "match one": lambda: self.tree.match(keys[0], names[0]),
            "match split": lambda: self.tree.match(keys, names, split=True),
            "slots": lambda: self.tree.slots(places),
            "path_slots": lambda: self.tree.path_slots(self.tree.match(keys[0], names[0])),
            "tokens": lambda: self.tree.tokens(places),
            "write_slots": lambda: self.tree.write_slots(places, table, list(range(len(keys)))),
            "split": lambda: self.tree.split(places),
            "rematch": lambda: self.tree.rematch(keys, places, names),
            "alive": lambda: self.tree.alive(places),
            "compact": lambda: self.tree.compact(),
            "digest": lambda: self.tree.digest(),
            "sizes": lambda: (self.tree.evictable_tokens, self.tree.num_nodes, self.tree.changes()),
        }
        name = self.random.choice(list(calls))
        self.cutter.cut(name, calls[name])

    def want(self) -> None:
        """Want a path, or no longer. A want ends with its place, so nobody counts them."""
        if self.wants and self.random.random() < 0.6:
            places = self.wants.pop(0)
            with suppress(QueryError):  # an interrupted want
                self.cutter.cut("unwant", lambda: self.tree.unwant(places))
            return
        keys, names = self.batch()
        places = self.tree.match(keys, names)
        self.cutter.cut("want", lambda: self.tree.want(places))
        self.wants.append(places)

    # Calls of the queue

    def add(self) -> None:
        keys, names = self.batch()
        queue: Any = self.queue
        before = set(queue.ids().tolist())
        self.cutter.cut("add", lambda: queue.add(keys, names), lambda: len(queue) > len(before))
        new = sorted(set(queue.ids().tolist()) - before)
        assert len(new) in (0, len(keys)), "a part of the prompts was added"
        self.waiting.update(zip(new, zip(keys, names, strict=True), strict=False))

    def remove(self) -> None:
        if not self.waiting:
            return
        chosen = self.random.sample(list(self.waiting), self.random.randint(1, min(3, len(self.waiting))))
        queue: Any = self.queue
        self.cutter.cut("remove", lambda: queue.remove(chosen), lambda: len(queue) < len(self.waiting))
        left = [id for id in chosen if id in queue]
        assert left in ([], chosen), "a part of the prompts was removed"
        if not left:
            for id in chosen:
                del self.waiting[id]

    def ask(self) -> None:
        queue: Any = self.queue
        order = self.random.choice(ORDERS)
        calls: dict[str, Callable[[], Any]] = {
            "cached_lengths": queue.cached_lengths,
            "shared_lengths": queue.shared_lengths,
            "turns": queue.turns,
            "order": lambda: queue.order(order, defer_shared=self.page == 2),
            "plan": lambda: queue.plan(order, token_budget=20 * self.page, free_tokens=len(self.free)),
        }
        name = self.random.choice(list(calls))
        self.cutter.cut(name, calls[name])

    # Checks

    def run_one(self) -> None:
        rules = [self.insert] * 6 + [self.lock] * 3 + [self.unlock] * 3 + [self.look] * 4 + [self.want]
        if self.queue is not None:
            rules += [self.add] * 4 + [self.remove] * 3 + [self.ask] * 8
        self.random.choice(rules)()
        if self.random.random() < 0.1:
            self.evict(self.random.randint(0, self.slots // 2))

    def check(self) -> None:
        tree = self.tree
        tree.check()
        self.free += tree.evict(0).slots.tolist()  # of an interrupted eviction
        nodes = nodes_of(tree.content())
        held = [slot for node in nodes for slot in node.slots]
        assert Counter([*held, *self.free]) == Counter(range(self.slots)), "a slot is lost, or in two places"
        for node in nodes:
            for at, slot in enumerate(node.slots, node.start):
                page = node.path[: at // self.page * self.page + self.page]
                assert self.given[slot] == (node.namespace, page, at % self.page), "a slot at a wrong place"
        locks = sum(node.own_locks for node in nodes)
        assert locks == sum(int((place.lengths > 0).sum()) for place in self.locks), "locks"
        if self.queue is not None:
            self.check_queue()

    def check_queue(self) -> None:
        queue: Any = self.queue
        assert queue.ids().tolist() == sorted(self.waiting), "prompts that wait"
        keys, names = [one[0] for one in self.waiting.values()], [one[1] for one in self.waiting.values()]
        assert [queue.prompt(id).tolist() for id in sorted(self.waiting)] == keys, "tokens of the prompts that wait"
        found = self.tree.match(keys, names, touch=False).lengths.tolist() if keys else []
        assert queue.cached_lengths().tolist() == found, "cached lengths of the prompts that wait"

    def close(self) -> None:
        self.check()


def run(seed: int, number: int, _folder: Path, with_queue: bool) -> Counter[str]:
    def make(random: Random, counts: Counter[str]) -> Books:
        return Books(random, counts, with_queue)

    return run_programs(make, f"{seed}/{number}/{with_queue}", PROGRAMS, STEPS, STEPS_A_CHECK)
