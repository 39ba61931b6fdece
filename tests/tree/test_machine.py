"""Random programs: after every step the tree must equal the oracle in every field of every node.

A tree on a GPU runs each program beside a tree on the CPU, and both must have equal digests after every step.
"""

from __future__ import annotations

import io
import sys
from array import array
from collections.abc import Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from flatradix import CapacityError, RadixTree, StaleHandleError, slru
from flatradix.inputs.options import OnEvict
from flatradix.inspect.nodes import nodes_of
from flatradix.layout import growth
from tests.support.devices import settled
from tests.support.forms import FORMS, FORMS_THERE, as_ragged, poison, poison_results
from tests.support.inside import index_of
from tests.support.notes import note
from tests.support.oracle import LARGEST, ROOT, Oracle, Place, Told, dump, dump_tree

NAMES = (None, None, None, "a", b"a", "")
HELD_MOST = 10
REFUSALS = (ValueError, CapacityError)


def short_edges_first(nodes: Any) -> Any:
    """A user-defined policy, for the tree's tensors and for one node of the oracle."""
    return nodes.length * 2 - nodes.hit_count


def used_least_for_its_depth(nodes: Any) -> Any:
    return nodes.hit_count / (nodes.end + 1)


POLICIES = (
    "lru", "lru", "lfu", "slru", slru(3), "fifo", "filo", "priority", "mru", short_edges_first,
    used_least_for_its_depth,
)  # fmt: skip

# Pages of 16 tokens with equal beginnings: only later tokens tell them apart.
BLOCKS = [[1] * 15 + [end] for end in (1, 2)] + [[1] + [3] * 15]


class Held(NamedTuple):
    """A place of a result: its handle in each tree, its length, and the oracle's place."""

    handles: tuple[int, ...]
    length: int
    place: Place


def recorder(told: list[Told]) -> OnEvict:
    """Return an `on_evict` that writes down what it is called with."""
    return lambda namespace, tokens, slots: told.append(Told(namespace, tokens.tolist(), slots.tolist()))


class Side:
    """One of the trees that get the same calls. told: what its `on_evict` was called with."""

    def __init__(self, number: int, tree: RadixTree, told: list[Told]) -> None:
        self.number = number
        self.tree = tree
        self.told = told

    def places(self, held: Sequence[Held]) -> Any:
        """Return a batch of places for this tree, in new memory."""
        return places_in(self.tree, held, self.number)

    def keywords(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return keyword arguments, with the places of `start` replaced by those of this tree."""
        return {name: self.places(value) if name == "start" else value for name, value in given.items()}


def places_in(tree: RadixTree, held: Sequence[Held], number: int) -> Any:
    return SimpleNamespace(
        lengths=torch.tensor([one.length for one in held], dtype=torch.int32, device=tree.device),
        handles=torch.tensor([one.handles[number] for one in held], dtype=torch.int64, device=tree.device),
    )


# A seeded generator draws the arguments of a call. Hypothesis prefers small and equal values: drawn by Hypothesis, the
# arguments kept the tree nearly empty. Hypothesis still shrinks the steps.
SEEDS = st.integers(0, 2**32 - 1).map(Random)
SLOT_DEVICES = st.sampled_from([None, "cpu"])
START: dict[str, Any] = {
    "policy": st.sampled_from(POLICIES),
    "random": SEEDS,
    "pages": st.sampled_from([6, 15, 31, 63, 64, None]),
    "odd": st.booleans(),
    "wide_slots": st.booleans(),
    "slot_device": SLOT_DEVICES,
    "evict_by": st.sampled_from(["node", "page"]),
    "listens": st.booleans(),
}


def outcome(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return (result, None), or (None, error) if the call is refused."""
    try:
        return call(), None
    except REFUSALS as error:
        return None, error


class Machine(RuleBasedStateMachine):
    """A tree and the oracle with the same calls; beside a tree on a GPU also a tree on the CPU.

    `expect` runs a call on all of them: either all return, or all raise the same error. The invariants after each step
    compare the whole content, so they find a refused call that changed something.
    """

    def __init__(self, device: str, page_size: int, bigram: bool) -> None:
        super().__init__()
        self.device = device
        self.page_size = page_size
        self.bigram = bigram
        self.held: list[Held] = []
        self.locks: list[Held] = []
        self.seen: dict[str, Any] = {}
        self.digests: dict[Any, str] = {}
        self.patches = pytest.MonkeyPatch()

    @initialize(**START)
    def start(
        self,
        policy: Any,
        random: Random,
        pages: int | None,
        odd: bool,
        wide_slots: bool,
        slot_device: str | None,
        evict_by: str,
        listens: bool,
    ) -> None:
        """listens: whether a callback is told the victims. Without one, a GPU evicts in another way."""
        max_tokens = None
        if pages is None:  # the tree grows from 4 pages on
            self.patches.setattr(growth, "FIRST_TOKENS", 4 * self.page_size)
        else:
            max_tokens = pages * self.page_size + (self.page_size - 1 if odd else 0)
        slot_dtype = torch.int64 if wide_slots else torch.int32
        self.policy = policy
        self.listens = listens
        self.slot_device = slot_device
        self.next_slot = 2**40 if wide_slots else 0
        self.largest_slot = torch.iinfo(slot_dtype).max
        most = 10**6 if max_tokens is None else max_tokens
        self.oracle = Oracle(most, self.page_size, policy, self.bigram, self.largest_slot, evict_by)
        self.sides = []
        for name in (self.device, "cpu")[: 1 + (self.device != "cpu")]:
            told: list[Told] = []
            tree = RadixTree(
                max_tokens,
                self.page_size,
                name,
                policy,
                slot_device,
                bigram=self.bigram,
                slot_dtype=slot_dtype,
                evict_by=evict_by,
                on_evict=recorder(told) if listens else None,
            )
            self.sides.append(Side(len(self.sides), tree, told))
        evictions = sys.modules.get("flatradix.kernels.gpu.evict")
        if evictions is not None and random.random() < 0.5:
            self.patches.setattr(evictions, "FEW_STEPS", 0)  # as if the trees were too large to list all their nodes
        roots = [side.tree.match([[]], touch=False).handle for side in self.sides]
        self.root = Held(tuple(roots), 0, ROOT)
        self.held.append(self.root)
        self.insert_batch(random)

    def teardown(self) -> None:
        self.patches.undo()

    # Shared by the rules

    @property
    def tree(self) -> RadixTree:
        """The tree under test."""
        return self.sides[0].tree

    def expect(
        self, oracle: Callable[[], Any], call: Callable[[Side], Any], exact: bool = True
    ) -> tuple[Any, list[Any]] | None:
        """Run a call on the oracle and each tree. Return the results of both, or None if all refused.

        exact: False if the input may be wrong in several ways. Which of them an error names is not specified.
        """
        expected, error = outcome(oracle)
        if error is None:
            return expected, [settled(side.tree, lambda side=side: call(side)) for side in self.sides]
        note(f"refused: {error!r}")
        for side in self.sides:
            with pytest.raises(REFUSALS) as caught:
                settled(side.tree, lambda side=side: call(side))
            if exact:
                assert type(caught.value) is type(error)
                for name in ("needed", "free", "query"):
                    assert getattr(caught.value, name, None) == getattr(error, name, None)
            del caught  # a cycle of references through its traceback would keep alive what the call used
        return None

    def take(self, queries: list[list[int]]) -> list[list[int]]:
        """Return a slot number that was never used for each token."""
        slots = []
        for query in queries:
            slots.append(list(range(self.next_slot, self.next_slot + len(query))))
            self.next_slot += len(query)
        return slots

    def hold(self, expected: Sequence[Place], results: Sequence[Any]) -> list[Held]:
        """Compare the places of each tree's result with the oracle's, and keep them for later calls."""
        for result in results:
            assert result.lengths.tolist() == [place.length for place in expected]
            assert result.lengths.dtype == torch.int32
            assert result.handles.dtype == torch.int64
            if len(expected) == 1 and hasattr(result, "length"):
                assert (result.length, result.handle) == (result.lengths.item(), result.handles.item())
                assert type(result.length) is type(result.handle) is int
        handles = zip(*(result.handles.tolist() for result in results), strict=True)
        found = [Held(of_each, place.length, place) for of_each, place in zip(handles, expected, strict=True)]
        assert all(one.handles == self.root.handles for one in found if one.place.node is None)
        self.held = [self.root, *(self.held + found)[-HELD_MOST:]]
        return found

    def on_each(self, call: Callable[[Side], Any]) -> None:
        """Make a call that cannot be refused on each tree."""
        for side in self.sides:
            call(side)

    # Arguments of calls

    def cached_key(self, random: Random) -> list[int]:
        """Draw the tokens of a cached path, cut anywhere."""
        nodes = self.oracle.nodes()
        if not nodes:
            return []
        path = random.choice(nodes).path()
        tokens = [path[0][0], *(second for _, second in path)] if self.bigram else path
        return tokens[: random.randint(0, len(tokens))]

    def new_tail(self, random: Random) -> list[int]:
        if self.page_size < 16:
            return [random.randint(0, 2) for _ in range(random.randint(0, 7))]
        blocks = random.choices(BLOCKS, k=random.randint(0, 3))
        return [token for block in blocks for token in block][: 48 - random.choice((0, 0, 1, 15, 20))]

    def make_queries(self, random: Random, most: int = 5) -> list[list[int]]:
        """Draw a batch whose keys share a cached prefix, a new prefix, or nothing."""
        common = self.cached_key(random) if random.random() < 0.6 else []
        common = common + self.new_tail(random)
        queries = []
        for _ in range(random.randint(0, most)):
            kind = random.random()
            begin = common if kind < 0.6 else self.cached_key(random) if kind < 0.8 else []
            queries.append(begin[: random.choice((len(begin), random.randint(0, len(begin))))] + self.new_tail(random))
        note(f"queries {queries}")
        return queries

    def choose_held(self, random: Random, count: int, among: Sequence[Held] = ()) -> list[Held]:
        """Draw places, mostly of those that still exist."""
        known = among or self.held
        alive = [one for one in known if one.place.is_there]
        if alive and random.random() < 0.85:
            known = alive
        return [self.shorten(random, one) for one in random.choices(known, k=count)]

    def shorten(self, random: Random, one: Held) -> Held:
        """Return the place, or sometimes a shorter one on its path: at the end of a node above, or anywhere."""
        node = one.place.node
        if node is None or not one.place.is_there or random.random() < 0.75:
            return one
        ends = [above.end for above in node.upwards() if above.end <= one.length]
        lengths = [*ends, random.randint(0, one.length // self.page_size) * self.page_size]
        length = random.choice(lengths)
        return Held(one.handles, length, Place(node, length))

    def fit(self, random: Random, queries: list[list[int]], starts: Sequence[Held]) -> None:
        """With bigrams, mostly make each query begin with the last token of its start."""
        if not self.bigram or random.random() < 0.1:
            return
        for query, (_, length, place) in zip(queries, starts, strict=True):
            if place.node and place.is_there and length and query:
                query[0] = place.node.path()[length - 1][1]

    def arguments(self, random: Random, queries: list[list[int]]) -> tuple[list[Any], list[Place], dict[str, Any]]:
        """Draw namespaces and starts of a call. Return both, and keyword arguments that each side converts."""
        count = len(queries)
        names: list[Any] = random.choices(NAMES, k=count)
        if random.random() < 0.6:
            names = [random.choice(NAMES)] * count
        starts = [self.root] * count
        keywords: dict[str, Any] = {}
        if random.random() < 0.4:
            starts = self.choose_held(random, count)
            self.fit(random, queries, starts)
            if random.random() < 0.9:
                names = [one.place.node.namespace if one.place.node else None for one in starts]
            keywords["start"] = starts
        same = len(set(map(repr, names))) == 1 and random.random() < 0.6
        if not same or names[0] is not None or random.random() < 0.5:
            keywords["namespace"] = names[0] if same else names
        note(f"namespaces {names}, {keywords}")
        return names, [one.place for one in starts], keywords

    def form(self, random: Random, *batches: list[list[int]]) -> list[list[Any]]:
        """Return the batches in a random form for each side. A batch of one may become its only sequence."""
        single = len(batches[0]) == 1 and batches[0][0] and random.random() < 0.5
        found = []
        for side in self.sides:
            makers = FORMS if side.number or self.device == "cpu" else FORMS + FORMS_THERE
            if not batches[0]:
                makers = (as_ragged,)  # an empty list means one empty sequence
            forms = [random.choice(makers)(batch, side.tree.device) for batch in batches]
            found.append([form[0] for form in forms] if single else forms)
        return found

    def spoil(self, random: Random, values: list[list[int]], wrong: Sequence[int]) -> None:
        """Replace a random number by a wrong one."""
        filled = [value for value in values if value]
        if filled:
            query = random.choice(filled)
            query[random.randrange(len(query))] = random.choice(wrong)

    # Operations

    def match(self, random: Random, queries: list[list[int]], touch: bool, lock: bool, exact: bool = True) -> None:
        names, starts, keywords = self.arguments(random, queries)
        split = not lock and random.random() < 0.15
        if split:
            keywords["split"] = True
        forms = self.form(random, queries)
        found = self.expect(
            lambda: self.oracle.match(queries, names, touch, lock, starts, split),
            lambda side: side.tree.match(*forms[side.number], touch=touch, lock=lock, **side.keywords(keywords)),
            exact,
        )
        poison(forms)
        if found is not None:
            held = self.hold(*found)
            poison_results(found[1])
            if lock:
                self.locks += held

    @rule(random=SEEDS, touch=st.booleans(), lock=st.booleans())
    def match_batch(self, random: Random, touch: bool, lock: bool) -> None:
        self.match(random, self.make_queries(random), touch, lock)

    @rule(random=SEEDS, touch=st.booleans())
    def match_bad_token(self, random: Random, touch: bool) -> None:
        queries = self.make_queries(random)
        self.spoil(random, queries, (-1, 2**31, -(2**63)))
        self.match(random, queries, touch, lock=False, exact=False)

    def insert(self, random: Random, queries: list[list[int]], slots: list[list[int]], exact: bool = True) -> None:
        count = len(queries)
        names, starts, keywords = self.arguments(random, queries)
        priorities = [random.randint(-1, 2)] * count
        inserted = [0] * count
        if random.random() < 0.3:
            priorities = [random.randint(-1, 2) for _ in queries]
            inserted = [random.randint(0, 6) * self.page_size for _ in queries]
        if count and random.random() < 0.5 and len({*priorities}) == len({*inserted}) == 1:
            keywords |= {"priority": priorities[0], "inserted_lengths": inserted[0]}
        else:
            keywords |= {"priority": priorities, "inserted_lengths": inserted}
        forms = self.form(random, queries, slots)
        found = self.expect(
            lambda: self.oracle.insert(queries, slots, names, priorities, starts, inserted),
            lambda side: side.tree.insert(*forms[side.number], **side.keywords(keywords)),
            exact,
        )
        poison(forms)
        if found is not None:
            expected, results = found
            prefixes = [one.prefix_length for one in expected]
            for result in results:
                assert result.prefix_lengths.tolist() == prefixes
                assert result.prefix_lengths.dtype == torch.int32
                if count == 1:
                    assert result.prefix_length == prefixes[0]
            self.hold([one.place for one in expected], results)
            poison_results(results)

    @rule(random=SEEDS)
    def insert_batch(self, random: Random) -> None:
        queries = self.make_queries(random)
        self.insert(random, queries, self.take(queries))

    @rule(random=SEEDS)
    def insert_after_evicting(self, random: Random) -> None:
        """Evict what an insert lacks, as an engine does. The tree stays nearly full, so the pools are compacted."""
        queries = self.make_queries(random)
        keys = self.oracle.keys_of(queries, [None] * len(queries), None)
        short = self.oracle.new_units(keys) - (self.oracle.max_tokens - self.oracle.total_tokens)
        self.evict(max(short, 0))
        self.insert(random, queries, self.take(queries))

    @rule(random=SEEDS, what=st.sampled_from(["token", "slot", "count"]))
    def insert_wrong(self, random: Random, what: str) -> None:
        queries = self.make_queries(random)
        slots = self.take(queries)
        if what == "token":
            self.spoil(random, queries, (-1, 2**31, 2**32 + 1))
        elif what == "slot":
            self.spoil(random, slots, (-1, -(2**63)) if self.largest_slot > LARGEST else (-1, 2**31, 2**32 + 1))
        elif any(slots):
            random.choice([own for own in slots if own]).pop()
        self.insert(random, queries, slots, exact=False)

    def compare_told(self, expected: list[Told]) -> None:
        """Compare what the callbacks were told with what the last eviction took."""
        assert all(side.told == (expected if self.listens else []) for side in self.sides)

    def evict(self, num_tokens: int) -> None:
        self.on_each(lambda side: side.told.clear())
        found = self.expect(lambda: self.oracle.evict(num_tokens), lambda side: side.tree.evict(num_tokens))
        self.compare_freed(found)

    def compare_freed(self, found: tuple[Any, list[Any]] | None) -> None:
        """Compare what an eviction or a drop returned."""
        if found is not None:
            self.compare_told(self.oracle.told)
            expected, results = found
            for result in results:
                assert result.slots.tolist() == expected.slots
                assert result.slots.dtype == self.tree.slot_dtype
                assert (result.num_tokens, result.num_nodes) == expected[1:]
                poison(result.slots)

    @rule(pages=st.integers(0, 6), less=st.booleans())
    def evict_some(self, pages: int, less: bool) -> None:
        self.evict(max(pages * self.page_size - less, 0))

    @rule(pages=st.integers(-1, 6), space=st.integers(0, 12), there=st.booleans())
    def evict_into(self, pages: int, space: int, there: bool) -> None:
        """Evict into a tensor, which may be too small. there: the number of tokens is in a tensor, too."""
        if self.slot_device is not None and self.tree.device.type != self.slot_device:
            return  # a tree on a GPU writes to tensors there only
        tokens, space = pages * self.page_size, space * self.page_size - (space % 2)
        homes = [self.slot_device or side.tree.device for side in self.sides]
        outs = [torch.full((max(space, 0),), -7, dtype=self.tree.slot_dtype, device=home) for home in homes]
        self.on_each(lambda side: side.told.clear())
        found = self.expect(
            lambda: self.oracle.evict(tokens, len(outs[0])),
            lambda side: side.tree.evict(
                torch.tensor([tokens], device=side.tree.device) if there else tokens, out=outs[side.number]
            ),
        )
        if found is None:
            assert all((out == -7).all() for out in outs)
            self.compare_told([])
            return
        self.compare_told(self.oracle.told)
        expected, results = found
        for result, out in zip(results, outs, strict=True):
            assert result.slots is out
            assert out.tolist() == expected.slots + [-7] * (len(out) - len(expected.slots))
            assert (int(result.num_tokens), int(result.num_nodes)) == expected[1:]
            assert result.num_tokens.dtype == result.num_nodes.dtype == torch.int64
            assert result.num_tokens.shape == result.num_nodes.shape == ()

    @rule(random=SEEDS, whole=st.booleans())
    def drop(self, random: Random, whole: bool) -> None:
        """Drop held or cached places, or a namespace, of which locked parts remain."""
        self.on_each(lambda side: side.told.clear())
        if whole:
            name = random.choice(NAMES)
            found = self.expect(lambda: self.oracle.drop_namespace(name), lambda side: side.tree.drop(namespace=name))
        else:
            held = self.choose_held(random, random.randint(0, 2), self.held + self.locks)
            found = self.expect(
                lambda: self.oracle.drop([one.place for one in held]), lambda side: side.tree.drop(side.places(held))
            )
        self.compare_freed(found)

    @rule(random=SEEDS, rounds=st.integers(1, 4))
    def churn(self, random: Random, rounds: int) -> None:
        for _ in range(rounds):
            self.insert_after_evicting(random)

    # Locks

    @rule(random=SEEDS, split=st.booleans())
    def lock_held(self, random: Random, split: bool) -> None:
        """Lock held places, or split at them, which locks nothing."""
        held = self.choose_held(random, random.randint(0, 4))
        operands = [side.places(held) for side in self.sides]
        places = [one.place for one in held]
        found = self.expect(
            lambda: self.oracle.split_at(places) if split else self.oracle.lock(places),
            lambda side: (side.tree.split if split else side.tree.lock)(operands[side.number]),
        )
        for side, operand in zip(self.sides, operands, strict=True):
            assert operand.lengths.tolist() == [one.length for one in held]
            if found is None:
                assert operand.handles.tolist() == [one.handles[side.number] for one in held]
        if found is not None:
            renewed = self.hold(found[0], operands)
            self.locks += [] if split else renewed
        poison_results(operands)

    def unlock(self, held: list[Held]) -> None:
        operands = [side.places(held) for side in self.sides]
        found = self.expect(
            lambda: self.oracle.unlock([one.place for one in held]),
            lambda side: side.tree.unlock(operands[side.number]),
        )
        for side, operand in zip(self.sides, operands, strict=True):
            assert operand.handles.tolist() == [one.handles[side.number] for one in held]
        for one in held if found is not None else ():
            if one in self.locks:
                self.locks.remove(one)

    @rule(random=SEEDS)
    def unlock_locked(self, random: Random) -> None:
        self.unlock(random.sample(self.locks, random.randint(0, len(self.locks))))

    def unlock_all(self) -> None:
        for one in list(self.locks):
            self.unlock([one])
        self.locks.clear()
        assert self.tree.protected_tokens == 0

    @rule(random=SEEDS)
    def unlock_any(self, random: Random) -> None:
        """Unlock places, often with a surplus beside existing locks: then the call must unlock nothing."""
        self.unlock(self.choose_held(random, random.randint(1, 4), self.locks + self.held))

    @rule(random=SEEDS, twice=st.booleans())
    def request(self, random: Random, twice: bool) -> None:
        """Run a request with the result objects themselves: match, lock, insert the rest, lock, unlock."""
        key = (self.make_queries(random, 2) or [[]])[0]
        name = random.choice(NAMES)
        forms = self.form(random, [key])
        found = self.expect(
            lambda: self.oracle.match([key], [name]), lambda side: side.tree.match(*forms[side.number], namespace=name)
        )
        assert found is not None
        (place,), matched = found
        if random.random() < 0.5:
            assert all(one.handles.tolist() == [one.handle] for one in matched)
        for _ in range(1 + twice):
            (place,) = self.oracle.lock([place])
            self.on_each(lambda side: side.tree.lock(matched[side.number]))
        rest = key[place.length :]
        slots = self.take([rest])
        inserted = self.expect(
            lambda: self.oracle.insert([rest], slots, [name], [0], [place], [place.length]),
            lambda side: side.tree.insert(
                array("q", rest),
                array("q", slots[0]),
                namespace=name,
                start=matched[side.number],
                inserted_lengths=matched[side.number].length,
            ),
        )
        if inserted is not None:
            (done,), results = inserted
            for result in results:
                assert (result.prefix_length, result.length) == (done.prefix_length, done.place.length)
            self.on_each(lambda side: side.tree.lock(results[side.number]))
            self.locks += self.hold(self.oracle.lock([done.place]), results)
            poison_results(results)
        for _ in range(1 + twice):
            self.oracle.unlock([place])
            self.on_each(lambda side: side.tree.unlock(matched[side.number]))
        self.hold([place], matched)
        poison_results(matched)

    # Slots

    @rule(random=SEEDS, wide=st.booleans(), bad=st.booleans())
    def write_slots(self, random: Random, wide: bool, bad: bool) -> None:
        """Write slots into a table with gaps between its rows. Sometimes the table has too few columns or rows."""
        tree = self.tree
        if self.slot_device is not None and tree.device.type != self.slot_device:
            return  # a tree on a GPU writes to tables there only
        held = self.choose_held(random, random.randint(0, 4))
        bad = bad and random.random() < 0.5
        width = max([one.length for one in held], default=0) + random.choice((0, 3)) - bad
        height = len(held) + random.randint(1, 2)
        rows = random.sample(range(-bad, height + bad), len(held))
        dtype = torch.int64 if wide or self.largest_slot > LARGEST else torch.int32
        table = [[-7] * max(width, 0) for _ in range(height)]
        tables = [
            torch.full((height, max(width, 0) + 5), -7, dtype=dtype, device=side.tree.device)[:, : max(width, 0)]
            for side in self.sides
        ]
        form = random.choice((list, torch.tensor, lambda rows: torch.tensor(rows, device=tree.device)))
        self.expect(
            lambda: self.oracle.write_slots([one.place for one in held], table, rows),
            lambda side: side.tree.write_slots(
                side.places(held), tables[side.number], (list if side.number else form)(rows)
            ),
            exact=not bad,
        )
        assert all(one.tolist() == table for one in tables)

    # The whole tree

    @rule(what=st.sampled_from(["reset", "evict", "evict -1", "unlock", "save", "load"]), slot_device=SLOT_DEVICES)
    def whole_tree(self, what: str, slot_device: str | None) -> None:
        if what == "reset":
            self.oracle.reset()
            self.on_each(lambda side: side.tree.reset())
            self.locks.clear()
        elif what.startswith("evict"):
            self.evict(-1 if what.endswith("-1") else 10**6)
        elif what == "unlock":
            self.unlock_all()
        else:
            self.roundtrip(what == "load", slot_device)

    def roundtrip(self, go_on: bool, slot_device: str | None) -> None:
        """Save and load the tree. The loaded tree is equal, goes on like it, and takes its handles."""
        file = io.BytesIO()
        digest = self.tree.digest()
        self.tree.save(file)  # type: ignore[arg-type]
        file.seek(0)
        policy = self.policy if callable(self.policy) else None
        on_evict = recorder(self.sides[0].told) if self.listens else None
        loaded = RadixTree.load(file, self.device, slot_device, policy, on_evict)  # type: ignore[arg-type]
        assert loaded.digest() == self.tree.digest() == digest
        assert dump_tree(loaded) == dump_tree(self.tree)
        loaded.check()
        moved = self.move(digest)
        if go_on:
            self.sides[0].tree = moved if slot_device is None else loaded
            self.slot_device = slot_device or self.slot_device
        else:
            self.spoil_digest(loaded)

    def move(self, digest: str) -> RadixTree:
        """Copy the tree to the CPU and back. Nothing changes, and handles stay valid. Return the last copy."""
        host = self.tree.to("cpu")
        back = host.to(self.device)
        alive = [one for one in self.held if one.place.is_there]
        slots = self.oracle.slots([one.place for one in alive])
        for tree in (host, back):
            tree.check()
            assert tree.digest() == digest
            assert tree.slots(places_in(tree, alive, 0)).to_list() == slots
        return back

    def spoil_digest(self, tree: RadixTree) -> None:
        """Assert that the fields of a node count in the digest."""
        digest = tree.digest()
        for view in nodes_of(tree.content())[-1:]:
            for name in ("tick", "created", "priority", "hit_count", "lock_ref"):
                column = getattr(index_of(tree)._state, name)
                column[view.row] += 1
                assert tree.digest() != digest, name
                column[view.row] -= 1
        assert tree.digest() == digest

    # After each step

    @invariant()
    def sizes_agree(self) -> None:
        for name in ("evictable_tokens", "protected_tokens", "total_tokens", "num_nodes"):
            value = getattr(self.tree, name)
            assert type(value) is int
            assert value == getattr(self.oracle, name), name

    @invariant()
    def trees_agree(self) -> None:
        self.tree.check()
        whole = tuple(dump(self.oracle))
        assert dump_tree(self.tree) == list(whole)
        digest = self.tree.digest()
        assert all(side.tree.digest() == digest for side in self.sides[1:])
        assert self.digests.setdefault(whole, digest) == digest
        assert self.seen.setdefault(digest, whole) == whole

    @invariant()
    def held_places_agree(self) -> None:
        good = []
        for one in self.held:
            if one.place.is_there:
                good.append(one)
            else:
                with pytest.raises(StaleHandleError):
                    self.tree.slots(self.sides[0].places([one]))
        found = self.tree.slots(self.sides[0].places(good))
        assert found.to_list() == self.oracle.slots([one.place for one in good])
        assert found.values.dtype == self.tree.slot_dtype
        poison(found)


@pytest.mark.parametrize("bigram", [False, True], ids=["tokens", "bigrams"])
@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_random_programs(device: str, page_size: int, bigram: bool) -> None:
    run_state_machine_as_test(lambda: Machine(device, page_size, bigram))  # type: ignore[arg-type]
