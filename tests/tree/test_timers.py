"""Real timers that interrupt the calls of a tree, and signal handlers that call the tree that they interrupt."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

import flatradix
from flatradix import RadixTree
from flatradix.inspect.nodes import nodes_of
from tests.conftest import usable
from tests.support.devices import interpreted
from tests.support.interrupts import Interrupt, timer

NAMES = (None, "a", b"b", "c")
SLOTS = 400


@pytest.fixture(params=["cpu", "cpu apart", pytest.param("cuda", marks=pytest.mark.gpu)])
def home(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    usable(name.split()[0])
    return name


class Books:
    """A user of a tree, with a free list of slots and a list of locks.

    The lists record what a call has done, even if its result never arrived.
    """

    def __init__(self, home: str, random: Random) -> None:
        self.tree = RadixTree(
            SLOTS, page_size=2, device=home.split()[0], slot_device="cpu" if home == "cpu apart" else None
        )
        self.random = random
        self.free = list(range(SLOTS))
        self.locks: list[Any] = []
        self.cuts = 0
        self.usual = 0.1 if interpreted(home) else 1e-4  # seconds of a call, roughly

    def keys(self) -> list[list[int]]:
        return [[self.random.randint(0, 2) for _ in range(2 * self.random.randint(0, 8))] for _ in range(3)]

    def names(self) -> list[Any]:
        return [self.random.choice(NAMES) for _ in range(3)]

    def done(self, act: Callable[[], Any]) -> bool:
        """Make a call that a timer may interrupt; return whether the call has been done."""
        changes, begun = self.tree.changes(), time.perf_counter()
        try:
            with timer(self.random.uniform(1e-6, 1.5 * self.usual)):
                act()
            self.usual += (time.perf_counter() - begun - self.usual) / 8
        except Interrupt:
            self.cuts += 1
        return self.tree.changes() != changes

    def insert(self) -> None:
        keys, names = self.keys(), self.names()
        count = sum(map(len, keys))
        if len(self.free) < count and self.done(lambda: self.tree.evict(count)):
            self.free += self.tree.last_result.slots.tolist()  # type: ignore[union-attr]
        if len(self.free) < count:
            return
        taken, self.free = self.free[:count], self.free[count:]
        rest = iter(taken)
        slots = [[next(rest) for _ in key] for key in keys]
        held: set[int] = set()
        if self.done(lambda: self.tree.insert(keys, slots, namespace=names)):
            held = {slot for node in nodes_of(self.tree.content()) for slot in node.slots}
        self.free += [slot for slot in taken if slot not in held]

    def lock(self) -> None:
        keys, names = self.keys(), self.names()
        if self.done(lambda: self.tree.match(keys, names, lock=True)):
            self.locks.append(self.tree.last_result)

    def unlock(self) -> None:
        if self.locks and self.done(lambda: self.tree.unlock(self.locks[0])):
            self.locks.pop(0)

    def step(self) -> None:
        self.random.choice((self.insert, self.insert, self.lock, self.unlock))()

    def check(self) -> None:
        self.tree.check()
        self.free += self.tree.evict(0).slots.tolist()  # of an interrupted eviction
        held = [slot for node in nodes_of(self.tree.content()) for slot in node.slots]
        assert Counter([*held, *self.free]) == Counter(range(SLOTS))
        locks = sum(node.own_locks for node in nodes_of(self.tree.content()))
        assert locks == sum(int((place.lengths > 0).sum()) for place in self.locks)


def test_timers(home: str) -> None:
    if not interpreted(home):
        flatradix.warm_up(home.split()[0], page_size=2)
    books = Books(home, Random(home))
    end = time.monotonic() + 3
    # Where Python runs the kernels, few calls end in three seconds.
    while time.monotonic() < end if interpreted(home) else books.cuts < 300:
        for _ in range(5):
            books.step()
        books.check()


class Handler:
    """A signal handler that calls the tree that it interrupts, and counts how often the tree refuses."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act
        self.served = self.refused = 0

    def __call__(self) -> None:
        try:
            self.act()
            self.served += 1
        except RuntimeError as error:
            if "from within another call" not in str(error):
                raise
            self.refused += 1


def test_a_handler_cannot_come_in_between(home: str) -> None:
    """The handler's call is refused, or done before the interrupted call begins, which has equal results either way."""
    if not interpreted(home):
        flatradix.warm_up(home.split()[0], page_size=2)
    random = Random(home)
    counts = [0, 0]
    usual = 1e-3  # seconds of the three calls, roughly
    end = time.monotonic() + 2
    while time.monotonic() < end if interpreted(home) else counts[1] < 40:  # a call serves a handler at its ends alone
        books = Books(home, random)
        keys = [[number, number, number % 3, 7] for number in range(40)]
        names = [str(number % 4) for number in range(40)]
        books.tree.insert(keys, [range(4 * number, 4 * number + 4) for number in range(40)], namespace=names)
        handler = Handler(lambda tree=books.tree: tree.insert([[90, 91]], [[398, 399]], namespace="handler"))
        begun = time.perf_counter()
        with timer(random.uniform(1e-6, usual), handler):
            found = books.tree.match(keys, names)
            slots = books.tree.slots(found).to_list()
            freed = books.tree.evict(40).slots.tolist()
        usual += (time.perf_counter() - begun - usual) / 8
        books.tree.check()
        assert slots == [list(range(4 * number, 4 * number + 4)) for number in range(40)]
        assert [slot for slot in freed if slot < 398] == list(range(40))
        counts[0] += handler.served
        counts[1] += handler.refused


def test_another_thread_is_told(home: str) -> None:
    """A thread that calls the tree during another call gets an error; here a policy function starts the thread."""
    told: list[Exception] = []

    def score(nodes: Any) -> Any:
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        return nodes.tick

    def intrude() -> None:
        try:
            tree.insert([8, 8], [8, 8])
        except RuntimeError as error:
            told.append(error)

    tree = RadixTree(16, page_size=2, device=home.split()[0], policy=score)
    tree.insert([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    assert tree.evict(2).slots.tolist() == [1, 2]
    assert "another thread is in a call of the same object: hold a lock of your own" in str(told[0])
    tree.check()


def test_a_policy_cannot_call_its_tree(home: str) -> None:
    def score(nodes: Any) -> Any:
        tree.evict(1)

    tree = RadixTree(16, page_size=2, device=home.split()[0], policy=score)
    tree.insert([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    with pytest.raises(RuntimeError, match="from within another call of the same object"):
        tree.evict(2)
    assert (tree.total_tokens, tree.match([1, 2]).length) == (4, 2)
    tree.check()
