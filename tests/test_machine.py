"""Random programs: the tree must do what the oracle does, step by step, down to every field of every node."""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import assume, note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from flatradix import CapacityError, RadixTree, Ragged, StaleHandleError
from tests.oracle import LARGEST, ROOT, Oracle, Place, dump, dump_tree

NAMES = (None, None, None, "a", b"a", "")
HELD_MOST = 10
REFUSALS = (ValueError, CapacityError)
POISON = 2**30 + 7


def short_edges_first(nodes: Any) -> Any:
    """A policy of one's own; takes the tree's tensors as well as one node of the oracle."""
    return nodes.length * 2 - nodes.hit_count


def used_least_for_its_depth(nodes: Any) -> Any:
    return nodes.hit_count / (nodes.end + 1)


POLICIES = (
    "lru", "lru", "lfu", "slru", "fifo", "filo", "priority", "mru", short_edges_first, used_least_for_its_depth,
)  # fmt: skip

# Pages of 16 that begin alike, so that only their ends tell them apart.
BLOCKS = [[1] * 15 + [end] for end in (1, 2)] + [[1] + [3] * 15]


class Held(NamedTuple):
    """A place that a result named, on both sides."""

    handle: int
    length: int
    place: Place


def places(held: Sequence[Held]) -> Any:
    """What the tree takes for a batch of places, in memory of its own."""
    return SimpleNamespace(
        lengths=torch.tensor([one.length for one in held], dtype=torch.int32),
        handles=torch.tensor([one.handle for one in held], dtype=torch.int64),
    )


def as_lists(sequences: list[list[int]]) -> Any:
    return [list(sequence) for sequence in sequences]


def as_arrays(sequences: list[list[int]]) -> Any:
    return [array("q", sequence) for sequence in sequences]


def as_numpy(sequences: list[list[int]]) -> Any:
    """int32 where it fits; every second one is strided."""
    wide = any(abs(value) > LARGEST for sequence in sequences for value in sequence)
    parts = [np.array(sequence, np.int64 if wide else np.int32) for sequence in sequences]
    return [part if i % 2 else np.repeat(part, 2)[::2] for i, part in enumerate(parts)]


def as_tensors(sequences: list[list[int]]) -> Any:
    return [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]


def as_ragged(sequences: list[list[int]]) -> Any:
    return Ragged.from_sequences(sequences)


FORMS: tuple[Callable[[list[list[int]]], Any], ...] = (as_lists, as_arrays, as_numpy, as_tensors, as_ragged)


def poison(value: Any) -> None:
    """Overwrite what was handed in or out: nothing of it may live on inside the tree."""
    if isinstance(value, Ragged):
        value.values.fill_(POISON)
    elif isinstance(value, torch.Tensor):
        value.fill_(POISON)
    elif isinstance(value, np.ndarray):
        value[:] = POISON
    elif isinstance(value, list | array) and len(value):
        for position, part in enumerate(value):
            if isinstance(part, int):
                value[position] = POISON
            else:
                poison(part)


def poison_result(result: Any) -> None:
    poison(result.lengths)
    poison(result.handles)
    if hasattr(result, "prefix_lengths"):
        poison(result.prefix_lengths)


def keys(page_size: int) -> st.SearchStrategy[list[int]]:
    """Token sequences that meet often."""
    if page_size < 16:
        return st.lists(st.integers(0, 2), max_size=9)
    blocks = st.lists(st.sampled_from(BLOCKS), max_size=3)
    tail = st.tuples(st.sampled_from(BLOCKS), st.integers(0, 15)).map(lambda t: t[0][: t[1]])
    return st.tuples(blocks, st.just([]) | tail).map(lambda t: [token for b in (*t[0], t[1]) for token in b])


@st.composite
def batches(draw: st.DrawFn, page_size: int) -> list[list[int]]:
    """Batches whose keys share what is new as often as not."""
    key = keys(page_size)
    common = draw(key)
    tails = draw(st.lists(st.tuples(st.booleans(), key), max_size=5))
    return [common + tail if shared else tail for shared, tail in tails]


class Machine(RuleBasedStateMachine):
    """One tree and the oracle, driven through the same calls.

    `expect` runs a call on both sides: either both return, or both raise the same error. The invariants after each
    step compare everything there is, so a refused call that changed something is seen.
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

    @initialize(
        policy=st.sampled_from(POLICIES),
        pages=st.integers(3, 24),
        odd=st.booleans(),
        wide_slots=st.booleans(),
        slot_device=st.sampled_from([None, "cpu"]),
    )
    def start(self, policy: Any, pages: int, odd: bool, wide_slots: bool, slot_device: str | None) -> None:
        max_tokens = pages * self.page_size + (self.page_size - 1 if odd else 0)
        slot_dtype = torch.int64 if wide_slots else torch.int32
        self.policy = policy
        self.slot_device = slot_device
        self.next_slot = 2**40 if wide_slots else 0
        self.largest_slot = torch.iinfo(slot_dtype).max
        self.oracle = Oracle(max_tokens, self.page_size, policy, self.bigram, self.largest_slot)
        self.tree = RadixTree(
            max_tokens,
            self.page_size,
            self.device,
            policy,
            slot_device,
            bigram=self.bigram,
            slot_dtype=slot_dtype,
        )
        root = self.tree.match([[]], touch=False)
        self.root = Held(root.handle, 0, ROOT)
        self.held.append(self.root)

    # What rules share

    def expect(self, oracle: Callable[[], Any], tree: Callable[[], Any], exact: bool = True) -> tuple[Any, Any] | None:
        """The results of both sides, or None if both refused.

        Not `exact` where input may be wrong in several ways: which of them is named is nobody's promise.
        """
        try:
            expected = oracle()
        except REFUSALS as error:
            note(f"refused: {error!r}")
            with pytest.raises(REFUSALS) as caught:
                tree()
            if exact:
                assert type(caught.value) is type(error)
            if exact and isinstance(error, CapacityError):
                assert isinstance(caught.value, CapacityError)
                assert (caught.value.needed, caught.value.free) == (error.needed, error.free)
            return None
        return expected, tree()

    def take(self, count: int) -> list[int]:
        """Slot numbers that nobody has had."""
        first = self.next_slot
        self.next_slot += count
        return list(range(first, first + count))

    def hold(self, expected: Sequence[Place], result: Any) -> list[Held]:
        """Compare the places of a result with the oracle's, remember them, and overwrite the result."""
        assert result.lengths.tolist() == [place.length for place in expected]
        assert result.lengths.dtype == torch.int32
        assert result.handles.dtype == torch.int64
        if len(expected) == 1:
            assert (result.length, result.handle) == (result.lengths.item(), result.handles.item())
            assert type(result.length) is type(result.handle) is int
        pairs = zip(result.handles.tolist(), expected, strict=True)
        found = [Held(handle, place.length, place) for handle, place in pairs]
        assert all(one.handle == self.root.handle for one in found if one.place.node is None)
        self.held = [self.root, *(self.held + found)[-HELD_MOST:]]
        return found

    def draw_names(self, data: st.DataObject, starts: Sequence[Held] | None, count: int) -> list[Any]:
        """A namespace for each query: now and then a wrong one where there is a start."""
        if starts is None or data.draw(st.integers(0, 9), "any name") == 0:
            return data.draw(st.lists(st.sampled_from(NAMES), min_size=count, max_size=count), "names")
        return [one.place.node.namespace if one.place.node else None for one in starts]

    def draw_starts(self, data: st.DataObject, queries: list[list[int]]) -> list[Held] | None:
        """Places to continue from; with bigrams the queries are made to fit them, mostly."""
        if not data.draw(st.booleans(), "with starts"):
            return None
        count = len(queries)
        starts = data.draw(st.lists(st.sampled_from(self.held), min_size=count, max_size=count), "starts")
        if self.bigram and data.draw(st.integers(0, 9), "misfit") > 0:
            for query, (_, length, place) in zip(queries, starts, strict=True):
                if place.node and length and query:
                    query[0] = place.node.path()[length - 1][1]
        return starts

    def draw_call(
        self, data: st.DataObject, queries: list[list[int]]
    ) -> tuple[list[Held] | None, list[Any], dict[str, Any]]:
        """Starts and namespaces of a call, and both as keyword arguments of the tree."""
        starts = self.draw_starts(data, queries)
        names = self.draw_names(data, starts, len(queries))
        keywords: dict[str, Any] = {"namespace": names}
        if names and len(set(map(repr, names))) == 1 and data.draw(st.booleans(), "one name for all"):
            keywords["namespace"] = names[0]
        if starts is not None:
            keywords["start"] = places(starts)
        return starts, names, keywords

    def draw_form(self, data: st.DataObject, *batches: list[list[int]]) -> list[Any]:
        """Batches as callers may pass them: a batch of one also as its only sequence."""
        forms = [data.draw(st.sampled_from(FORMS), "form")(batch) for batch in batches]
        if len(batches[0]) == 1 and batches[0][0] and data.draw(st.booleans(), "single"):
            return [form[0] for form in forms]
        return forms

    def spoil(self, data: st.DataObject, values: list[list[int]], wrong: Sequence[int]) -> None:
        """Put a wrong number somewhere."""
        filled = [position for position, value in enumerate(values) if value]
        assume(filled)
        query = values[data.draw(st.sampled_from(filled), "wrong query")]
        query[data.draw(st.integers(0, len(query) - 1), "wrong position")] = data.draw(st.sampled_from(wrong))

    # Operations

    def match(self, data: st.DataObject, queries: list[list[int]], touch: bool, lock: bool, exact: bool = True) -> None:
        starts, names, keywords = self.draw_call(data, queries)
        own_starts = None if starts is None else [one.place for one in starts]
        (form,) = self.draw_form(data, queries)
        found = self.expect(
            lambda: self.oracle.match(queries, names, touch, lock, own_starts),
            lambda: self.tree.match(form, touch=touch, lock=lock, **keywords),
            exact,
        )
        poison(form)
        if found is not None:
            held = self.hold(*found)
            poison_result(found[1])
            if lock:
                self.locks += held

    @rule(data=st.data(), touch=st.booleans(), lock=st.booleans())
    def match_batch(self, data: st.DataObject, touch: bool, lock: bool) -> None:
        self.match(data, data.draw(batches(self.page_size), "queries"), touch, lock)

    @rule(data=st.data(), touch=st.booleans())
    def match_bad_token(self, data: st.DataObject, touch: bool) -> None:
        queries = data.draw(batches(self.page_size), "queries")
        self.spoil(data, queries, (-1, 2**31, -(2**63)))
        self.match(data, queries, touch, lock=False, exact=False)

    def insert(self, data: st.DataObject, queries: list[list[int]], slots: list[list[int]], exact: bool = True) -> None:
        count = len(queries)
        starts, names, keywords = self.draw_call(data, queries)
        own_starts = None if starts is None else [one.place for one in starts]
        priorities = data.draw(st.lists(st.integers(-1, 2), min_size=count, max_size=count), "priorities")
        inserted = data.draw(st.none() | st.lists(st.integers(0, 6), min_size=count, max_size=count))
        keywords["priority"] = priorities[0] if len({*priorities}) == 1 else priorities
        if inserted is not None:
            inserted = [value * self.page_size for value in inserted]
            keywords["inserted_lengths"] = inserted[0] if len({*inserted}) == 1 else inserted
        form, slot_form = self.draw_form(data, queries, slots)
        found = self.expect(
            lambda: self.oracle.insert(queries, slots, names, priorities, own_starts, inserted),
            lambda: self.tree.insert(form, slot_form, **keywords),
            exact,
        )
        poison(form)
        poison(slot_form)
        if found is not None:
            expected, result = found
            prefixes = [one.prefix_length for one in expected]
            assert result.prefix_lengths.tolist() == prefixes
            assert result.prefix_lengths.dtype == torch.int32
            if count == 1:
                assert result.prefix_length == prefixes[0]
            self.hold([one.place for one in expected], result)
            poison_result(result)

    @rule(data=st.data())
    def insert_batch(self, data: st.DataObject) -> None:
        queries = data.draw(batches(self.page_size), "queries")
        self.insert(data, queries, [self.take(len(query)) for query in queries])

    @rule(data=st.data())
    def insert_after_evicting(self, data: st.DataObject) -> None:
        """What an engine does when it is short: keeps the tree nearly full, so that the pools are compacted."""
        queries = data.draw(batches(self.page_size), "queries")
        keyed = self.oracle.keys_of(queries, [None] * len(queries), None)
        short = self.oracle.new_units(keyed) - (self.oracle.max_tokens - self.oracle.total_tokens)
        self.evict(max(short, 0))
        self.insert(data, queries, [self.take(len(query)) for query in queries])

    @rule(data=st.data(), what=st.sampled_from(["token", "slot", "count"]))
    def insert_wrong(self, data: st.DataObject, what: str) -> None:
        queries = data.draw(batches(self.page_size), "queries")
        slots = [self.take(len(query)) for query in queries]
        if what == "token":
            self.spoil(data, queries, (-1, 2**31, 2**32 + 1))
        elif what == "slot":
            self.spoil(data, slots, (-1, -(2**63)) if self.largest_slot > LARGEST else (-1, 2**31, 2**32 + 1))
        else:
            assume(any(slots))
            next(filter(None, reversed(slots))).pop()
        self.insert(data, queries, slots, exact=False)

    def evict(self, num_tokens: int) -> None:
        found = self.expect(lambda: self.oracle.evict(num_tokens), lambda: self.tree.evict(num_tokens))
        if found is not None:
            expected, result = found
            assert result.slots.tolist() == expected.slots
            assert result.slots.dtype == torch.int64
            assert (result.num_tokens, result.num_nodes) == expected[1:]
            poison(result.slots)

    @rule(num_tokens=st.integers(0, 6) | st.sampled_from([-1, 10**6]))
    def evict_some(self, num_tokens: int) -> None:
        self.evict(num_tokens if num_tokens < 0 else num_tokens * max(1, self.page_size - 1))

    # Locks

    def relock(self, held: Sequence[Held], operand: Any) -> list[Held]:
        """Lock; returns the places to unlock, or none if the lock was refused."""
        lengths = operand.lengths.tolist()
        found = self.expect(lambda: self.oracle.lock([one.place for one in held]), lambda: self.tree.lock(operand))
        if found is None:
            assert operand.handles.tolist() == [one.handle for one in held]
            return []
        assert operand.lengths.tolist() == lengths
        return self.hold(found[0], MatchLike(operand))

    @rule(data=st.data())
    def lock(self, data: st.DataObject) -> None:
        held = data.draw(st.lists(st.sampled_from(self.held), max_size=4), "held")
        operand = places(held)
        self.locks += self.relock(held, operand)
        poison_result(operand)

    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        held = data.draw(st.lists(st.sampled_from(self.locks or self.held), max_size=4), "held")
        self.release(held)

    @rule()
    def unlock_all(self) -> None:
        for one in list(self.locks):
            self.release([one])
        self.locks.clear()

    @rule(data=st.data())
    def unlock_wrong(self, data: st.DataObject) -> None:
        """Mostly more locks than there are, and some that there are: all or nothing."""
        held = data.draw(st.lists(st.sampled_from(self.locks + self.held), min_size=1, max_size=5), "held")
        self.release(held)

    def release(self, held: list[Held]) -> None:
        operand = places(held)
        found = self.expect(lambda: self.oracle.unlock([one.place for one in held]), lambda: self.tree.unlock(operand))
        assert operand.handles.tolist() == [one.handle for one in held]
        if found is not None:
            for one in held:
                if one in self.locks:
                    self.locks.remove(one)

    @rule(data=st.data(), twice=st.booleans())
    def request(self, data: st.DataObject, twice: bool) -> None:
        """The life of a request with the very result objects: match, lock, insert what follows, lock, unlock."""
        key = data.draw(keys(self.page_size), "key")
        (form,) = self.draw_form(data, [key])
        found = self.expect(lambda: self.oracle.match([key], [None]), lambda: self.tree.match(form))
        assert found is not None
        (place,), matched = found
        if data.draw(st.booleans(), "look at tensors"):
            assert matched.handles.tolist() == [matched.handle]
        for _ in range(1 + twice):
            found = self.expect(lambda: self.oracle.lock([place]), lambda: self.tree.lock(matched))
            assert found is not None
            ((place,), _) = found
        rest = key[place.length :]
        slots = self.take(len(rest))
        inserted = self.expect(
            lambda: self.oracle.insert([rest], [slots], [None], [0], [place], [place.length]),
            lambda: self.tree.insert(
                as_arrays([rest])[0],
                as_arrays([slots])[0],
                start=matched,
                inserted_lengths=matched.length,
            ),
        )
        if inserted is not None:
            (done,), result = inserted
            assert (result.prefix_length, result.length) == (done.prefix_length, done.place.length)
            self.expect(lambda: self.oracle.lock([done.place]), lambda: self.tree.lock(result))
            self.locks += self.hold([done.place], result)
            poison_result(result)
        for _ in range(1 + twice):
            self.expect(lambda: self.oracle.unlock([place]), lambda: self.tree.unlock(matched))
        self.hold([place], matched)
        poison_result(matched)

    # The whole tree

    @rule(really=st.integers(0, 7))
    def reset(self, really: int) -> None:
        if really == 7:
            self.oracle.reset()
            self.tree.reset()
            self.locks.clear()

    @rule(go_on=st.booleans(), slot_device=st.sampled_from([None, "cpu"]))
    def roundtrip(self, go_on: bool, slot_device: str | None) -> None:
        """A saved and loaded tree is the same, and goes on like it, the handles included."""
        file = io.BytesIO()
        digest = self.tree.digest()
        self.tree.save(file)  # type: ignore[arg-type]
        file.seek(0)
        policy = self.policy if callable(self.policy) else None
        loaded = RadixTree.load(file, self.device, slot_device, policy)  # type: ignore[arg-type]
        assert loaded.digest() == self.tree.digest() == digest
        assert dump_tree(loaded) == dump_tree(self.tree)
        loaded.check()
        assert self.tree.to("cpu").digest() == digest
        if go_on:
            self.tree = loaded

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
        assert self.digests.setdefault(whole, digest) == digest
        assert self.seen.setdefault(digest, whole) == whole

    @invariant()
    def held_places_agree(self) -> None:
        good = []
        for one in self.held:
            if one.place.node is None or one.place.node.alive:
                good.append(one)
            else:
                with pytest.raises(StaleHandleError):
                    self.tree.slots(places([one]))
        found = self.tree.slots(places(good))
        assert found.to_list() == self.oracle.slots([one.place for one in good])
        assert found.values.dtype == torch.int64
        poison(found)


class MatchLike:
    """Lengths and handles with the scalars that a batch of one has."""

    def __init__(self, operand: Any) -> None:
        self.lengths, self.handles = operand.lengths, operand.handles
        if len(self.lengths) == 1:
            self.length, self.handle = int(self.lengths[0]), int(self.handles[0])


@pytest.mark.parametrize("bigram", [False, True], ids=["tokens", "bigrams"])
@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_random_programs(device: str, page_size: int, bigram: bool) -> None:
    run_state_machine_as_test(lambda: Machine(device, page_size, bigram))
