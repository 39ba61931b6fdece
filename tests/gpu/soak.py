"""Compare a tree on the CPU with a tree on a GPU under random calls: python3 -m tests.gpu.soak --seconds 600

The keys of a batch share long prefixes. A round uses one configuration. Lengths, slots, victims, sizes and errors must
be equal after every call, or after several calls if the test does not wait for the GPU. Digests are compared every few
calls. A query counts as one operation. At a difference, the program prints how to repeat the round, and exits with 1.
Without a GPU, TRITON_INTERPRET=1 runs small batches.
"""

from __future__ import annotations

import argparse
import re
import time
import traceback
from collections.abc import Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from flatradix import CapacityError, EvictIntoResult, RadixTree, Ragged, StaleHandleError
from flatradix.inputs import devices
from tests.support.inside import pool_end

REFUSALS = (ValueError, CapacityError)
NAMES = (None, None, "a", b"a", "tenant")
SIZES = ("evictable_tokens", "protected_tokens", "total_tokens", "num_nodes")
HELD_MOST = 12


class Configuration(NamedTuple):
    page_size: int
    bigram: bool
    policy: str
    slot_dtype: torch.dtype
    pages: int  # that the tree can hold
    words: int  # different tokens
    longest: int  # the most pages of a key after its stem
    evict_by: str = "node"


def shallow(nodes: Any) -> torch.Tensor:
    """A user-defined policy: evicts the nodes near the root first."""
    return nodes.end


CONFIGURATIONS = (
    Configuration(1, False, "lru", torch.int32, 20_000, 3, 12),
    Configuration(2, False, "lru", torch.int32, 3_000, 2, 8, "page"),
    Configuration(16, False, "lfu", torch.int64, 2_000, 3, 5),
    Configuration(1, True, "lru", torch.int64, 8_000, 3, 10, "page"),
    Configuration(1, False, "priority", torch.int32, 1_500, 40, 6),
    Configuration(2, True, "slru", torch.int32, 4_000, 2, 8),
    Configuration(1, False, "lru", torch.int32, 300_000, 4, 600),
    Configuration(1, False, "mru", torch.int32, 2_000, 2, 12),
    Configuration(16, True, "fifo", torch.int32, 1_000, 2, 4, "page"),
    Configuration(1, False, "shallow", torch.int32, 4_000, 3, 12),
    Configuration(16, False, "lru", torch.int32, 300, 4, 3),
    Configuration(3, False, "filo", torch.int32, 5_000, 2, 6),
)


class Held(NamedTuple):
    """The places of one result in both trees, and the key of each place, cut down to the place's length."""

    host: Any
    tree: Any
    keys: list[list[int]]
    names: list[Any]

    def take(self, which: Sequence[int]) -> Held:
        """Return a copy of the chosen places."""
        index = torch.tensor(which, dtype=torch.int64)

        def part(places: Any) -> Any:
            here = index.to(places.handles.device)
            return SimpleNamespace(handles=places.handles[here], lengths=places.lengths[here])

        keys, names = [self.keys[i] for i in which], [self.names[i] for i in which]
        return Held(part(self.host), part(self.tree), keys, names)


class Totals:
    """Counters over all rounds."""

    def __init__(self) -> None:
        self.operations = self.calls = self.refused = self.compactions = self.digests = self.evicted = 0

    def __str__(self) -> str:
        return (
            f"{self.operations} operations in {self.calls} calls, {self.refused} of them refused, {self.evicted} nodes "
            f"evicted, {self.compactions} compactions, {self.digests} digests"
        )


class Round:
    """One configuration, and a pair of trees that are empty at first."""

    def __init__(self, random: Random, configuration: Configuration, device: str, totals: Totals) -> None:
        self.random = random
        self.configuration = c = configuration
        self.small = devices.interpreted()
        self.totals = totals
        self.step = 0
        pages = min(c.pages, 60) if self.small else c.pages
        policy = shallow if c.policy == "shallow" else c.policy
        self.host, self.tree = (
            RadixTree(
                pages * c.page_size,
                c.page_size,
                where,
                policy,
                bigram=c.bigram,
                slot_dtype=c.slot_dtype,
                evict_by=c.evict_by,
            )
            for where in ("cpu", device)
        )
        self.device = device
        self.stems: list[list[int]] = [[]]
        self.held: list[Held] = []
        self.locks: list[Held] = []
        self.waiting: list[tuple[Exception | None, Callable[[], None]]] = []
        self.next_slot = 2**40 if c.slot_dtype == torch.int64 else 0
        self.half = self.half_in_use()

    # Input

    def count(self) -> int:
        """Draw the number of queries of a batch, often a small one."""
        most = 5 if self.small else 1024
        return max(1, int(most ** self.random.random())) if self.random.random() < 0.95 else most

    def tail(self) -> list[int]:
        c, random = self.configuration, self.random
        pages = int(random.random() ** 3 * (1 + min(c.longest, 4 if self.small else c.longest)))
        tokens = []
        for _ in range(pages):
            tokens += [7] * (c.page_size - 1) + [random.randrange(c.words)]
        return tokens + [7] * random.choice((0, 0, 0, random.randrange(c.page_size + 1)))

    def key(self) -> list[int]:
        """Draw a key: a known one, whole or cut, and a tail."""
        random = self.random
        stem = random.choice(self.stems)
        key = (stem if random.random() < 0.4 else stem[: random.randint(0, len(stem))]) + self.tail()
        if random.random() < 0.1:
            self.stems = [*self.stems[-100:], list(key)]
        return key

    def keys(self) -> list[list[int]]:
        if self.random.random() < 0.1:
            key = self.key()
            return [list(key) for _ in range(min(self.count(), 50))]
        return [self.key() for _ in range(self.count())]

    def slots_for(self, keys: list[list[int]]) -> list[list[int]]:
        slots = []
        for key in keys:
            slots.append(list(range(self.next_slot, self.next_slot + len(key))))
            self.next_slot += len(key)
        if self.next_slot > 2**31 - 2**24 and self.configuration.slot_dtype == torch.int32:
            self.next_slot = 0
        return slots

    def form(self, sequences: list[list[int]]) -> Any:
        """Return sequences in a random form that the GPU tree takes. The CPU tree always gets lists."""
        kind = self.random.choice(("lists", "ragged", "there", "int32"))
        if kind == "lists":
            return sequences
        ragged = Ragged.from_sequences(sequences)
        if kind == "ragged":
            return ragged
        values = ragged.values.to(self.tree.device)
        if kind == "int32" and all(0 <= value < 2**31 for sequence in sequences for value in sequence):
            values = values.to(torch.int32)
        return Ragged(values, ragged.offsets.to(self.tree.device))

    def names(self, count: int) -> list[Any]:
        if self.random.random() < 0.7:
            return [self.random.choice(NAMES)] * count
        return self.random.choices(NAMES, k=count)

    def starts(self, keys: list[list[int]]) -> Held | None:
        """Draw places to continue from, or None. With bigrams, most keys then begin with their start's last token."""
        if not self.held or self.random.random() < 0.7:
            return None
        held = self.random.choice(self.held)
        chosen = held.take(self.random.choices(range(len(held.keys)), k=len(keys)))
        if self.configuration.bigram and self.random.random() < 0.95:
            for key, start in zip(keys, chosen.keys, strict=True):
                if key and start:
                    key[0] = start[-1]
        return chosen

    def spoil(self, sequences: list[list[int]], wrong: Sequence[int]) -> None:
        filled = [sequence for sequence in sequences if sequence]
        if filled:
            sequence = self.random.choice(filled)
            sequence[self.random.randrange(len(sequence))] = self.random.choice(wrong)

    # Both trees

    def call(
        self,
        queries: int,
        host: Callable[[], Any],
        tree: Callable[[], Any],
        compare: Callable[[Any, Any], None] = lambda host, tree: None,
    ) -> tuple[Any, Any] | None:
        """Run a call on both trees; return both results, or None if refused. The comparison may come calls later."""
        self.totals.operations += queries
        self.totals.calls += 1
        self.step += 1
        error: Exception | None = None
        expected = None
        try:
            expected = host()
        except REFUSALS as refused:
            error = refused
            self.totals.refused += 1
        try:
            found = tree()
        except REFUSALS as told:  # an error that the host can see
            compare_errors([error] if error else [], told)
            return None
        self.waiting.append((error, (lambda: refused_is_empty(found)) if error else (lambda: compare(expected, found))))
        if self.random.random() < 0.5 or len(self.waiting) > 20:
            self.settle()
        return None if error else (expected, found)

    def settle(self) -> None:
        """Wait for the GPU, and compare errors, results and sizes of the calls since the last time."""
        errors = [error for error, _ in self.waiting if error]
        told = None
        try:
            self.tree.raise_pending()
        except REFUSALS as error:
            told = error
        compare_errors(errors, told)
        for _, compare in self.waiting:
            compare()
        self.waiting.clear()
        for name in SIZES:
            assert getattr(self.tree, name) == getattr(self.host, name), name
        if self.half_in_use() != self.half:
            self.half = self.half_in_use()
            self.totals.compactions += 1

    def half_in_use(self) -> int:
        return pool_end(self.tree)

    def compare_digests(self) -> None:
        self.settle()
        assert self.tree.digest() == self.host.digest(), "digest"
        self.totals.digests += 1

    def hold(self, results: tuple[Any, Any], keys: list[list[int]], names: list[Any], starts: Held | None) -> Held:
        """Keep the places of a result for later calls. The lengths are the CPU tree's, to avoid a wait for the GPU."""
        whole = keys
        if starts is not None:
            joint = 1 if self.configuration.bigram else 0
            whole = [start + key[joint if start else 0 :] for start, key in zip(starts.keys, keys, strict=True)]
            names = [
                name if start else given for name, start, given in zip(starts.names, starts.keys, names, strict=True)
            ]
        ends = [length + self.configuration.bigram if length else 0 for length in results[0].lengths.tolist()]
        found = Held(*results, [key[:end] for key, end in zip(whole, ends, strict=True)], names)
        self.held = [*self.held[-HELD_MOST:], found]
        return found

    # Operations

    def match(self) -> None:
        random, keys = self.random, self.keys()
        starts = self.starts(keys)
        names = self.names_for(keys, starts)
        touch, lock = random.random() < 0.8, random.random() < 0.3
        if random.random() < 0.03:
            self.spoil(keys, (-1, 2**31, -(2**63)))
        options = {"touch": touch, "lock": lock}
        form = self.form(keys)
        given = names[0] if len(set(map(repr, names))) == 1 else names
        results = self.call(
            len(keys),
            lambda: self.host.match(keys, names, start=starts and starts.host, **options),
            lambda: self.tree.match(form, given, start=starts and starts.tree, **options),
            same_places,
        )
        if results:
            held = self.hold(results, keys, names, starts)
            if lock:
                self.locks.append(held)

    def names_for(self, keys: list[list[int]], starts: Held | None) -> list[Any]:
        """Draw namespaces, mostly those of the starts."""
        if starts is None or self.random.random() < 0.05:
            return self.names(len(keys))
        return [name if start else None for name, start in zip(starts.names, starts.keys, strict=True)]

    def single(self) -> None:
        """Run a whole request, with the result objects themselves."""
        key, name = self.key(), self.random.choice(NAMES)
        queries: Any = key if key else [[]]
        results = self.call(
            1, lambda: self.host.match(queries, name), lambda: self.tree.match(queries, name), same_places
        )
        assert results is not None
        for tree, found in zip((self.host, self.tree), results, strict=True):
            tree.lock(found)
        if self.random.random() < 0.3:
            assert results[1].length == results[0].length
        joint = self.configuration.bigram and results[0].length
        rest = key[results[0].length :] if key else []
        slots = self.slots_for([rest])
        if joint or not self.configuration.bigram or not results[0].length:
            self.insert_behind(results, rest, slots, name)
        for tree, found in zip((self.host, self.tree), results, strict=True):
            tree.unlock(found)

    def insert_behind(self, results: tuple[Any, Any], rest: list[int], slots: list[list[int]], name: Any) -> None:
        self.call(
            1,
            lambda: self.host.insert([rest], slots, name, start=results[0], inserted_lengths=results[0].length),
            lambda: self.tree.insert([rest], slots, name, start=results[1], inserted_lengths=results[0].length),
            same_places,
        )

    def insert(self) -> None:
        random, keys = self.random, self.keys()
        starts = self.starts(keys)
        names = self.names_for(keys, starts)
        slots = self.slots_for(keys)
        priorities: Any = random.randint(-1, 2)
        inserted: Any = 0
        if random.random() < 0.3:
            priorities = [random.randint(-1, 3) for _ in keys]
            inserted = [random.randint(0, 8) * self.configuration.page_size for _ in keys]
        draw = random.random()
        if draw < 0.02:
            self.spoil(keys, (-1, 2**31, 2**32 + 1))
        elif draw < 0.04:
            self.spoil(slots, (-1, -(2**63)))
        elif draw < 0.05 and any(slots):
            random.choice([own for own in slots if own]).pop()
        results = self.insert_once(keys, slots, names, priorities, starts, inserted)
        if isinstance(results, CapacityError) and random.random() < 0.9:
            self.evict(results.needed - results.free)
            results = self.insert_once(keys, slots, names, priorities, starts, inserted)
        if isinstance(results, tuple):
            self.hold(results, keys, names, starts)

    def insert_once(
        self, keys: Any, slots: Any, names: Any, priorities: Any, starts: Held | None, inserted: Any
    ) -> Any:
        """Insert into both trees; return both results, or the error if refused."""
        why: list[Exception] = []

        def host() -> Any:
            try:
                return self.host.insert(keys, slots, names, priorities, starts and starts.host, inserted)
            except REFUSALS as error:
                why.append(error)
                raise

        form, slot_form = self.form(keys), self.form(slots)
        results = self.call(
            len(keys),
            host,
            lambda: self.tree.insert(form, slot_form, names, priorities, starts and starts.tree, inserted),
            same_inserts,
        )
        return why[0] if results is None else results

    def evict(self, num_tokens: int) -> None:
        self.settle()
        results = self.call(1, lambda: self.host.evict(num_tokens), lambda: self.tree.evict(num_tokens), same_victims)
        assert results is not None
        self.totals.evicted += results[0].num_nodes
        self.drop_stale()

    def drop_stale(self) -> None:
        """Forget most of the places that an eviction has made stale."""
        self.held = [held for held in self.held if self.is_good(held) or self.random.random() < 0.1]

    def is_good(self, held: Held) -> bool:
        try:
            self.host.slots(held.host)
        except StaleHandleError:
            return False
        return True

    def evict_some(self) -> None:
        total = self.host.total_tokens
        self.evict(self.random.choice((0, 1, self.configuration.page_size, total // 20, total // 3)))

    def evict_into(self) -> None:
        """Evict into a tensor, which may be too small, without a wait."""
        total = self.host.total_tokens
        wanted = self.random.choice((0, 1, self.configuration.page_size, total // 20))
        space = wanted + self.random.choice((0, self.configuration.page_size, total))
        here, there = (torch.zeros(space, dtype=tree.slot_dtype, device=tree.device) for tree in (self.host, self.tree))
        asked = torch.tensor([wanted], device=self.tree.device) if self.random.random() < 0.5 else wanted
        results = self.call(
            1,
            lambda: self.host.evict(wanted, out=here),
            lambda: self.tree.evict(asked, out=there),
            same_victims_in,
        )
        if results is not None:
            self.totals.evicted += int(results[0].num_nodes)
        self.drop_stale()

    def lock(self) -> None:
        if not self.held:
            return
        held = self.random.choice(self.held)
        part = held.take(self.random.choices(range(len(held.keys)), k=min(self.count(), len(held.keys))))
        done = self.call(len(part.keys), lambda: self.host.lock(part.host), lambda: self.tree.lock(part.tree))
        if done:
            self.locks.append(part)

    def unlock(self) -> None:
        if not self.locks:
            return
        if self.random.random() < 0.03:
            other = self.random.choice(self.held or self.locks)
            self.unlock_these(other.take(range(len(other.keys))))
        self.unlock_these(self.locks.pop(self.random.randrange(len(self.locks))))

    def unlock_these(self, held: Held) -> None:
        self.call(len(held.keys), lambda: self.host.unlock(held.host), lambda: self.tree.unlock(held.tree))

    def read_slots(self) -> None:
        good = [held for held in self.held if self.is_good(held)]
        if not good:
            return
        self.settle()
        held = self.random.choice(good)
        self.totals.operations += len(held.keys)
        expected, found = self.host.slots(held.host), self.tree.slots(held.tree)
        assert torch.equal(found.offsets.cpu(), expected.offsets)
        assert torch.equal(found.values.cpu(), expected.values)
        height, width = len(held.keys) + 2, int(expected.offsets.diff().max()) if len(held.keys) else 0
        rows = self.random.sample(range(height), len(held.keys))
        kind = self.configuration.slot_dtype
        tables = [torch.full((height, width), -1, dtype=kind, device=tree.device) for tree in (self.host, self.tree)]
        self.host.write_slots(held.host, tables[0], rows)
        self.tree.write_slots(held.tree, tables[1], torch.tensor(rows, dtype=torch.int64, device=self.tree.device))
        self.tree.raise_pending()
        assert torch.equal(tables[1].cpu(), tables[0]), "write_slots"

    def move(self) -> None:
        """Copy the GPU's tree to the CPU and back. Its handles stay valid."""
        self.settle()
        host = self.tree.to("cpu")
        assert host.digest() == self.host.digest(), "digest of the copy"
        self.tree = host.to(self.device)
        self.half = self.half_in_use()

    def check(self) -> None:
        self.settle()
        self.tree.check()
        self.host.check()

    def compact(self) -> None:
        self.settle()
        self.tree.compact()

    def run(self, operations: int, deadline: float) -> None:
        rules = (
            [self.insert] * 30 + [self.match] * 30 + [self.single] * 8 + [self.evict_some] * 4 + [self.lock] * 8
            + [self.unlock] * 20 + [self.read_slots] * 4 + [self.check] + [self.move] + [self.compact]
            + [self.evict_into] * 4
        )  # fmt: skip
        end = self.totals.operations + operations
        while self.totals.operations < end and time.monotonic() < deadline:
            self.random.choice(rules)()
            if self.random.random() < 0.25:
                self.compare_digests()
            while self.host.protected_tokens > self.host.max_tokens // 2 and self.locks:
                self.unlock_these(self.locks.pop())
        self.finish()

    def finish(self) -> None:
        """Release all locks, then evict all nodes, in equal order on both trees."""
        for held in self.locks:
            self.unlock_these(held)
        self.compare_digests()
        self.check()
        while self.host.evictable_tokens:
            self.evict(self.host.evictable_tokens // 2 + 1)
        self.compare_digests()
        self.check()


def refused_is_empty(result: Any) -> None:
    if isinstance(result, EvictIntoResult):
        assert (int(result.num_tokens), int(result.num_nodes)) == (-1, -1), "a refused call left numbers"
    elif result is not None:
        assert (result.lengths == -1).all(), "a refused call left lengths"
        assert (result.handles == -1).all(), "a refused call left handles"


def compare_errors(errors: list[Exception], told: Exception | None) -> None:
    """Compare the CPU's errors with the GPU's: the GPU raises the first of several and counts the later ones."""
    if not errors:
        if told is not None:
            raise told
        return
    first = errors[0]
    assert type(told) is type(first), f"{told!r} instead of {first!r}"
    if isinstance(first, CapacityError):
        assert told.needed == first.needed, f"{told!r} instead of {first!r}"  # type: ignore[union-attr]
        return
    more = f" ({len(errors) - 1} later calls were refused too)" if len(errors) > 1 else ""
    text = str(first)
    if text.startswith("slots of query"):  # on a GPU the host does not know the slot
        text = re.match(r"slots of query \d+", text).group()  # type: ignore[union-attr]
        assert str(told).startswith(text), f"{told} instead of {first}"
        assert str(told).endswith(more), f"{told} instead of {first}"
        return
    assert str(told) == text + more, f"{told} instead of {text}{more}"


def same_places(host: Any, tree: Any) -> None:
    assert tree.lengths.tolist() == host.lengths.tolist(), "lengths"


def same_inserts(host: Any, tree: Any) -> None:
    same_places(host, tree)
    assert tree.prefix_lengths.tolist() == host.prefix_lengths.tolist(), "prefix_lengths"


def same_victims(host: Any, tree: Any) -> None:
    assert tree.slots.tolist() == host.slots.tolist(), "slots of the victims"
    assert tree[1:] == host[1:], "victims"


def same_victims_in(host: EvictIntoResult, tree: EvictIntoResult) -> None:
    assert [int(number) for number in tree[1:]] == [int(number) for number in host[1:]], "victims"
    assert tree.slots.tolist() == host.slots.tolist(), "slots of the victims"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu.soak", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--round", type=int, default=0, help="the round to begin with")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    started = time.monotonic()
    deadline = started + arguments.seconds
    totals = Totals()
    number = arguments.round
    each = max(50, min(20_000, arguments.operations // len(CONFIGURATIONS)))
    while totals.operations < arguments.operations and time.monotonic() < deadline:
        configuration = CONFIGURATIONS[number % len(CONFIGURATIONS)]
        this = Round(Random(f"{arguments.seed}/{number}"), configuration, arguments.device, totals)
        try:
            this.run(min(each, arguments.operations - totals.operations), deadline)
        except Exception:
            traceback.print_exc()
            print(
                f"DIFFERENCE in round {number}, call {this.step}, {configuration}; again: python3 -m tests.gpu.soak "
                f"--seed {arguments.seed} --round {number} --operations {arguments.operations}",
                flush=True,
            )
            return 1
        print(f"{time.monotonic() - started:6.1f} s  round {number}: {configuration}\n          {totals}", flush=True)
        number += 1
    print(f"no difference: {totals}; {number - arguments.round} rounds in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
