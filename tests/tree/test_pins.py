"""Soft pins with an end in time, and the pin budget: a model beside both devices, and interrupted calls."""

from __future__ import annotations

from collections import Counter
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flatradix import CapacityError, MatchResult, QueryError, RadixTree, StaleHandleError
from flatradix.inspect.nodes import nodes_of
from tests.support.depth import cuts
from tests.support.devices import interpreted, settled
from tests.support.interrupts import bytecodes, fails_at, interrupt_at, skip_if_slow

PAGE = 2
Path = tuple[Any, tuple[int, ...]]  # namespace, units


def pins_of(tree: RadixTree) -> Counter[Path]:
    """Return how many soft pins end at each path."""
    content = tree.content()
    own = content.column("own_wants")
    return +Counter({(node.namespace, node.path): int(own[node.row]) for node in nodes_of(content)})


def key(*pages: int) -> list[int]:
    return [token for page in pages for token in (page, page)]


def fill(tree: RadixTree) -> None:
    keys = [key(1, 2, 3), key(1, 2, 4), key(5, 6), key(7)]
    tree.insert(keys, [[10 * at + number for number in range(len(one))] for at, one in enumerate(keys)])


def refused(tree: RadixTree, call: Any, error: type[Exception], match: str) -> None:
    """Check that a call is refused, at once or on a GPU later, and changes no pin."""
    before = pins_of(tree)
    with pytest.raises(error, match=match):
        settled(tree, call)
    assert pins_of(tree) == before
    tree.check()


def test_pins_end_when_the_caller_says_that_time_has_come(device: str) -> None:
    tree = RadixTree(32, PAGE, device)
    fill(tree)
    places = tree.match([key(1, 2, 3), key(5)], touch=False)
    tree.want(places, until=[10, 2.5])
    tree.want(tree.match([key(7)], touch=False))
    assert tree.expire(2) == 0
    assert len(pins_of(tree)) == 3
    assert tree.expire(2.5) == 1
    assert tree.expire(10) == 1
    assert tree.expire(float("inf")) == 0
    assert pins_of(tree) == {(None, tuple(key(7))): 1}
    assert tree.evict(12).num_tokens == 12
    assert tree.match(key(7), touch=False).length == 2
    tree.check()


def test_an_eviction_ends_a_pin_and_its_end_does_not_end_another(device: str) -> None:
    """Also where the same key is cached, and pinned, again."""
    tree = RadixTree(32, PAGE, device)
    fill(tree)
    old = tree.match([key(7)], touch=False)
    tree.want(old, until=5)
    tree.evict(100)
    fill(tree)
    new = tree.match([key(7)], touch=False)
    tree.want(new)
    tree.unwant(old)
    assert tree.expire(5) == 0
    assert pins_of(tree) == {(None, tuple(key(7))): 1}
    tree.unwant(new)
    refused(tree, partial(tree.unwant, new), QueryError, "no want ends at its length 2")


def test_unwant_takes_the_pin_that_it_names(device: str) -> None:
    tree = RadixTree(32, PAGE, device)
    fill(tree)
    place = tree.match([key(1, 2)], touch=False)
    for until in (9, None, 3, 3):
        tree.want(place, until=until)
    refused(tree, partial(tree.unwant, place, until=4), QueryError, "query 0: no pin with the end 4.0 ends at its len")
    tree.unwant(place, until=3)
    tree.unwant(place)  # the one without an end
    assert tree.expire(3) == 1
    tree.unwant(place)  # the one that is left, though it has an end
    assert tree.expire(9) == 0
    assert not pins_of(tree)
    refused(tree, partial(tree.unwant, place), QueryError, "unwant: query 0")
    refused(tree, partial(tree.unwant, place, until=9), QueryError, "no pin with the end 9.0")


def test_a_batch_takes_several_pins_of_one_place(device: str) -> None:
    """A place may be named by the handle of a longer place, and more than once."""
    tree = RadixTree(32, PAGE, device)
    fill(tree)
    short = tree.match([key(1), key(1)], touch=False)
    tree.want(short, until=[7, 8])
    tree.want(tree.match([key(1)], touch=False))
    longer = tree.match([key(1, 2, 4)], touch=False)
    handle = int(longer.handles[0])
    twice = MatchResult(torch.full((2,), 2), torch.full((2,), handle)) if tree.device.type == "cpu" else None
    if twice is None:
        lengths = torch.full((2,), 2, device=tree.device)
        twice = MatchResult(lengths, torch.full_like(lengths, handle))
    tree.unwant(twice)  # the one without an end, and the one that ends first
    assert tree.expire(7) == 0
    assert pins_of(tree) == {(None, tuple(key(1))): 1}
    assert tree.expire(8) == 1
    assert not pins_of(tree)


def test_a_budget_counts_each_token_once(device: str) -> None:
    tree = RadixTree(32, PAGE, device, pin_budget=8)
    fill(tree)
    both = tree.match([key(1, 2, 3), key(1, 2, 4)], touch=False)
    tree.want(both, until=5)
    tree.want(tree.match([key(1, 2)], touch=False))
    other = tree.match([key(5)], touch=False)
    message = "2 more tokens would be pinned, but 0 are left of pin_budget=8: 2 too many"
    with pytest.raises(CapacityError, match=message) as e:
        tree.want(other, until=5)
    assert (e.value.needed, e.value.free) == (2, 0)
    tree.want(tree.match([key(1, 2, 3)], touch=False), until=6)  # renewed
    assert tree.expire(5) == 2
    tree.want(other, until=5)
    refused(tree, partial(tree.want, tree.match([key(5, 6), key(7)], touch=False)), CapacityError, "4 more .* but 0")
    tree.unwant(other, until=5)
    tree.want(tree.match([key(7), []], touch=False), until=1)
    assert tree.expire(1) == 1
    tree.check()


def test_what_is_evicted_gives_its_budget_back(device: str) -> None:
    tree = RadixTree(32, PAGE, device, pin_budget=6)
    fill(tree)
    tree.want(tree.match([key(1, 2, 3)], touch=False), until=5)
    tree.evict(100)
    fill(tree)
    tree.want(tree.match([key(5, 6)], touch=False))
    tree.reset()
    fill(tree)
    tree.want(tree.match([key(1, 2, 4)], touch=False))
    assert tree.expire(5) == 0
    assert sum(pins_of(tree).values()) == 1


def test_what_is_refused(device: str) -> None:
    tree = RadixTree(32, PAGE, device, pin_budget=100)
    fill(tree)
    place = tree.match([key(7)], touch=False)
    for until in ("soon", float("nan"), [1, 2], True, [[1]]):
        refused(tree, partial(tree.want, place, until=until), ValueError, "until must be a number")
        refused(tree, partial(tree.expire, until), ValueError, "now must be a number")
    tree.evict(100)
    refused(tree, partial(tree.want, place, until=1), StaleHandleError, "query 0: its handle names a node that was")
    assert tree.expire(100) == 0
    for budget in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="pin_budget must be a positive integer"):
            RadixTree(32, pin_budget=budget)  # type: ignore[arg-type]


def test_pins_are_neither_copied_nor_saved(device: str, tmp_path: Any) -> None:
    tree = RadixTree(32, PAGE, device, pin_budget=2)
    fill(tree)
    place = tree.match([key(7)], touch=False)
    tree.want(place, until=5)
    tree.save(tmp_path / "tree")
    loaded = RadixTree.load(tmp_path / "tree", device, pin_budget=2)
    loaded.want(loaded.match([key(5)], touch=False))
    assert loaded.expire(5) == 0
    refused(loaded, partial(loaded.want, place, until=5), CapacityError, "2 too many")
    other = tree.to("cpu") if tree.device.type != "cpu" else tree
    assert other.expire(5) == (other is tree)


class Model:
    """What the pins of a tree must be: (path, end) of each, with None for no end. Evictions are told to it."""

    def __init__(self) -> None:
        self.pins: list[tuple[Path, float | None]] = []

    def evicted(self, namespace: Any, tokens: np.ndarray, slots: torch.Tensor) -> None:
        path, begin = tuple(tokens.tolist()), len(tokens) - len(slots)
        gone = {(namespace, path[:length]) for length in range(begin + 1, len(path) + 1)}
        self.pins = [pin for pin in self.pins if pin[0] not in gone]

    def counts(self) -> Counter[Path]:
        return Counter(path for path, _ in self.pins)

    def spared(self, more: list[Path]) -> int:
        paths = [*self.counts(), *more]
        return len({(name, path[:length]) for name, path in paths for length in range(1, len(path) + 1)})

    def unwanted(self, path: Path, named: float | None) -> bool:
        """Take one pin away; return whether there was one."""
        ends = [end for pin, end in self.pins if pin == path]
        if named is None and ends and None not in ends:
            named = min(end for end in ends if end is not None)
        if named not in ends:
            return False
        self.pins.remove((path, named))
        return True

    def expired(self, now: float) -> int:
        over = [pin for pin in self.pins if pin[1] is not None and pin[1] <= now]
        self.pins = [pin for pin in self.pins if pin not in over]
        return len(over)


CALLS = ["insert", "insert", "evict", "want", "want", "want", "unwant", "unwant", "expire", "other"]


class Program:
    """Random calls on a tree, and the model beside."""

    def __init__(self, device: str, seed: int, evict_by: str) -> None:
        self.random = Random(seed)
        self.model = Model()
        self.budget = self.random.choice([None, 6, 14])
        capacity = self.random.choice([None, 40])
        self.tree = RadixTree(
            capacity, PAGE, device, evict_by=evict_by, on_evict=self.model.evicted, pin_budget=self.budget
        )
        self.now = 0.0

    def keys(self, count: int) -> tuple[list[list[int]], list[Any]]:
        keys = [key(*self.random.choices((1, 2), k=self.random.randint(0, 4))) for _ in range(count)]
        return keys, [self.random.choice([None, "a"]) for _ in keys]

    def step(self) -> None:
        tree, model, random = self.tree, self.model, self.random
        act = random.choice(CALLS)
        keys, names = self.keys(random.randint(1, 3))
        if act == "insert":
            free = 40 - tree.total_tokens
            tree.evict(max(0, sum(map(len, keys)) - free))
            tree.insert(keys, [list(range(len(one))) for one in keys], namespace=names)
        elif act == "evict":
            tree.evict(random.randint(0, 12))
        elif act == "expire":
            self.now += random.randint(0, 3)
            assert tree.expire(self.now) == model.expired(self.now)
        elif act == "other":
            if random.random() < 0.1:
                tree.reset()
                model.pins = []
            tree.split(tree.match(keys, namespace=names))
            tree.compact()
        else:
            self.pin(act, keys, names)
        assert pins_of(tree) == model.counts()

    def pin(self, act: str, keys: list[list[int]], names: list[Any]) -> None:
        tree, model, random = self.tree, self.model, self.random
        single = random.random() < 0.3
        places = tree.match(keys[0], namespace=names[0]) if single else tree.match(keys, namespace=names)
        if single:
            keys, names = keys[:1], names[:1]
        lengths = places.lengths.tolist()
        paths = [(name, tuple(one[:length])) for name, one, length in zip(names, keys, lengths, strict=True)]
        ends: list[float] | None = [self.now + random.randint(0, 4) for _ in keys] if random.random() < 0.7 else None
        each = [None] * len(keys) if ends is None else ends
        real = [(path, end) for path, end in zip(paths, each, strict=True) if path[1]]
        if act == "want":
            if self.budget is not None and model.spared([path for path, _ in real]) > self.budget:
                over = model.spared([path for path, _ in real]) - self.budget
                with pytest.raises(CapacityError, match=f"pin_budget={self.budget}: {over} too many"):
                    tree.want(places, until=ends)
            else:
                tree.want(places, until=ends)
                model.pins += real
            return
        before = list(model.pins)
        if all(model.unwanted(*pin) for pin in real):
            tree.unwant(places, until=ends)
        else:
            model.pins = before
            with pytest.raises(QueryError, match="unwant: query"):
                settled(tree, lambda: tree.unwant(places, until=ends))


@pytest.mark.parametrize("evict_by", ["node", "page"])
@pytest.mark.parametrize("seed", range(12))
def test_random_programs(seed: int, evict_by: str, device: str) -> None:
    if interpreted(device) and seed > 1:
        pytest.skip("kernels in Python: two programs")
    program = Program(device, seed, evict_by)
    for _ in range(25 if interpreted(device) else 250):
        program.step()
    program.tree.check()
    program.tree.evict(1000)
    assert not program.model.pins


ACTS = {
    "want": lambda tree, places: tree.want(places, until=[4, 7]),
    "unwant": lambda tree, places: tree.unwant(places),
    "unwant named": lambda tree, places: tree.unwant(places, until=[1, 2]),
    "expire": lambda tree, places: tree.expire(1),
    "expire nothing": lambda tree, places: tree.expire(0),
}


class Scene:
    """A tree with pins whose ends are 1 and 2, one of which has ended by eviction, and two pins without an end."""

    def __init__(self, device: str) -> None:
        self.tree = tree = RadixTree(32, PAGE, device, pin_budget=20)
        tree.insert([key(9), key(8)], [[90, 91], [80, 81]])
        tree.want(tree.match([key(9)], touch=False), until=1)
        tree.evict(100)
        fill(tree)
        self.places = tree.match([key(1, 2), key(5)], touch=False)
        tree.want(self.places, until=[1, 2])
        tree.want(tree.match([key(1, 2), key(7)], touch=False))
        if tree.device.type == "cpu":
            assert tree.expire(0) == 0

    def ends(self) -> dict[Path, list[float]]:
        """Return at what times the pins end: 0 if they end at no time."""
        tree = self.tree
        found: dict[Path, list[float]] = {}
        before = pins_of(tree)
        for now in (1, 2, 4, 7):
            tree.expire(now)
            after = pins_of(tree)
            for path, count in (before - after).items():
                found.setdefault(path, []).extend([now] * count)
            before = after
        for path, count in before.items():
            found.setdefault(path, []).extend([0] * count)
        return found


@pytest.mark.parametrize("name", ACTS)
def test_interrupted_at_many_bytecodes(name: str, device: str) -> None:
    """A call that is interrupted has pinned and unpinned nothing, or all, and the ends are those of the pins."""
    before, scene = Scene(device).ends(), Scene(device)
    ACTS[name](scene.tree, scene.places)
    after = scene.ends()
    scene = Scene(device)
    total = bytecodes(lambda: ACTS[name](scene.tree, scene.places))
    for at in cuts(total, device, name):
        scene, random = Scene(device), Random(at)
        changes = scene.tree.changes()
        interrupt_at(at, lambda s=scene: ACTS[name](s.tree, s.places))
        for _ in range(random.choice((0, 0, 1, 2))):
            interrupt_at(random.randrange(400), scene.tree.raise_pending)  # the recovery may be interrupted again
        done = scene.tree.changes() != changes
        assert scene.ends() == (after if done else before), at
        scene.tree.check()


@pytest.mark.parametrize("name", ACTS)
def test_at_every_allocation(name: str, device: str) -> None:
    skip_if_slow(device)
    before, scene = Scene(device).ends(), Scene(device)
    ACTS[name](scene.tree, scene.places)
    after = scene.ends()
    for at in range(1000):
        scene = Scene(device)
        changes = scene.tree.changes()
        failed = fails_at(at, lambda s=scene: ACTS[name](s.tree, s.places))
        done = scene.tree.changes() != changes
        assert scene.ends() == (after if done else before), at
        if not failed:
            break


def test_a_dropped_place_does_not_open_the_budget() -> None:
    tree = RadixTree(100, device="cpu", pin_budget=4)
    tree.insert([[1, 2, 3, 4], [9, 8, 7, 6, 5]], [range(4), range(10, 15)])
    dropped = tree.match([1, 2, 3, 4], lock=True)
    tree.drop(dropped)
    good = tree.match([9, 8, 7, 6, 5], touch=False)
    both = SimpleNamespace(
        handles=torch.cat([dropped.handles, good.handles]), lengths=torch.cat([dropped.lengths, good.lengths])
    )
    with pytest.raises(CapacityError):
        tree.want(both)
    tree.unlock(dropped)
    assert tree.evict(4).num_tokens == 4
