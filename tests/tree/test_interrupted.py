"""Interrupted calls of a tree: a call is done or not done; no slot is lost and no lock is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any, NamedTuple

import pytest
import torch

from flatradix import EvictResult, MatchResult, RadixTree
from flatradix.device.calls import Calls
from flatradix.inspect.nodes import nodes_of
from tests.conftest import usable
from tests.support.depth import cuts, examples
from tests.support.devices import interpreted
from tests.support.inside import names_of
from tests.support.interrupts import Interrupt, bytecodes, fails_at, interrupt_at, skip_if_slow

PAGE = 2
# Devices of index and slots.
HOMES = ["cpu", "cpu apart", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=HOMES)
def home(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    usable(name.split()[0])
    return name


class Holdings(NamedTuple):
    """The content of a tree, apart from its edges and ticks.

    slots: by namespace, path up to the end of a page, and offset in the page. locks: how many end at each path.
    """

    slots: dict[Any, int]
    locks: Counter[Any]


def holdings(tree: RadixTree) -> Holdings:
    slots: dict[Any, int] = {}
    locks: Counter[Any] = Counter()
    for node in nodes_of(tree.content()):
        for at, slot in enumerate(node.slots, node.start):
            slots[node.namespace, node.path[: at // PAGE * PAGE + PAGE], at % PAGE] = slot
        if node.own_locks:
            locks[node.namespace, node.path] += node.own_locks
    return Holdings(slots, locks)


class Scene:
    """A tree with locks, namespaces and gaps in its pools, and the places that a caller has."""

    def __init__(self, home: str) -> None:
        self.tree = tree = RadixTree(
            26, page_size=PAGE, device=home.split()[0], slot_device="cpu" if home == "cpu apart" else None
        )
        whole = tree.insert([40, 41, 42, 43], [90, 91, 92, 93])
        tree.lock(whole)
        keys = [[50, 50, 51, 51], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 7, 8], [9, 9], [1, 2, 5, 5], [52, 52]]
        slots = [[100 + 10 * number + at for at in range(len(key))] for number, key in enumerate(keys)]
        tree.insert(keys, slots, namespace=["old", None, None, "a", b"b", "old"])
        tree.evict(4)
        self.locked = tree.match([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]], lock=True)
        self.one = tree.match([1, 2, 5, 5], namespace=b"b", lock=True)
        self.start = tree.match([1, 2, 3, 4])
        self.place = tree.match([1, 2, 3, 4, 7, 8])
        self.places = tree.match([[1, 2, 3, 4, 7, 8], [1, 2], [9, 9]], namespace=[None, None, "a"])
        self.table = torch.zeros((3, 8), dtype=torch.int32, device=tree.device)
        tree.unlock(whole)
        self.piece = tree.match([40, 41], touch=False, lock=True)  # the newest node of all, and no insert has made it
        assert tree.evict(2).slots.tolist() == [92, 93]
        tree.raise_pending()


def insert_batch(scene: Scene) -> Any:
    keys = [[1, 2, 3, 3], [1, 2, 3, 3, 4, 4], [8, 8], [8, 8]]
    slots = [[10 * number + at for at in range(len(key))] for number, key in enumerate(keys)]
    return scene.tree.insert(keys, slots, namespace=[None, None, "new", "newer"])


LONG = [60, 60, 61, 61, 62, 62, 63, 63]
ACTS: dict[str, Callable[[Scene], Any]] = {
    "match": lambda s: s.tree.match([1, 2, 3, 9]),
    "match lock": lambda s: s.tree.match([1, 2, 3, 4, 7, 8], lock=True),
    "match split": lambda s: s.tree.match([1, 2, 9, 9], split=True),
    "match batch lock": lambda s: s.tree.match([[1, 2, 3, 4], [9, 9, 9, 9]], namespace=[None, "a"], lock=True),
    "match start lock": lambda s: s.tree.match([7, 8], start=s.start, lock=True),
    "lock": lambda s: s.tree.lock(s.place),
    "lock batch": lambda s: s.tree.lock(s.places),
    "split": lambda s: s.tree.split(s.places),
    "unlock": lambda s: s.tree.unlock(s.one),
    "unlock batch": lambda s: s.tree.unlock(s.locked),
    "insert": lambda s: s.tree.insert([1, 2, 3, 4, 6, 6, 6, 6], range(8), namespace=b"b"),
    "insert with a new name": lambda s: s.tree.insert([8, 8], [1, 2], namespace="new"),
    "insert behind a start": lambda s: s.tree.insert([6, 6], [1, 2], start=s.start),
    "insert batch": insert_batch,
    "insert that compacts": lambda s: s.tree.insert(LONG, range(len(LONG))),
    "evict": lambda s: s.tree.evict(3),
    "evict all": lambda s: s.tree.evict(100),
    "evict none": lambda s: s.tree.evict(0),
    "drop": lambda s: s.tree.drop(s.places),
    "drop a namespace": lambda s: s.tree.drop(namespace=b"b"),
    "compact": lambda s: s.tree.compact(),
    "slots": lambda s: s.tree.slots(s.places),
    "slots of one": lambda s: s.tree.path_slots(s.place),
    "write slots": lambda s: s.tree.write_slots(s.places, s.table, [0, 2, 1]),
    "sizes": lambda s: (s.tree.evictable_tokens, s.tree.protected_tokens, s.tree.total_tokens, s.tree.num_nodes),
    "digest": lambda s: s.tree.digest(),
    "reset": lambda s: s.tree.reset(),
}


class Judge:
    """Checks that a tree, after an interrupted call, is as before or as after the whole call."""

    def __init__(self, name: str, home: str) -> None:
        self.home = home
        self.act = ACTS[name]
        self.locks = "lock" in name
        self.before = holdings(Scene(home).tree)
        scene = Scene(home)
        self.result = self.act(scene)
        scene.tree.raise_pending()
        self.after = holdings(scene.tree)

    def judge(self, cut: Callable[[Callable[[], Any]], Any], random: Random) -> Any:
        """Interrupt the act, check the tree, and return the result of `cut`. cut: runs a call and interrupts it."""
        scene = Scene(self.home)
        tree = scene.tree
        changes, last = tree.changes(), tree.last_result
        outcome = cut(lambda: self.act(scene))
        for _ in range(random.choice((0, 0, 1, 2))):
            interrupt_at(random.randrange(400), tree.raise_pending)  # the recovery may be interrupted again
        done = tree.changes() != changes
        tree.check()
        told = tree.last_result if done and tree.last_result is not last else None
        freed = told.slots.tolist() if isinstance(told, EvictResult) else []
        self.compare(tree, done, freed)
        if self.locks and isinstance(told, MatchResult) and isinstance(self.result, MatchResult):
            tree.unlock(told)  # as a caller does that never got the result
            assert holdings(tree).locks == self.before.locks
        if random.randrange(3) == 0:
            self.use_up(tree)
        return outcome

    def compare(self, tree: RadixTree, done: bool, freed: list[int]) -> None:
        """Compare the tree with its expected content. freed: the slots that the call itself returned."""
        found = holdings(tree)
        expected = self.after if done else self.before
        assert found.locks == expected.locks
        wanted = self.before.slots | self.after.slots if isinstance(self.result, EvictResult) else expected.slots
        untold = tree.evict(0).slots.tolist()
        assert not (done and untold)
        assert sorted([*found.slots.values(), *untold, *freed]) == sorted(wanted.values())
        assert found.slots.items() <= wanted.items()
        assert set(names_of(tree)) == {None, *(name for name, _, _ in found.slots)}
        tree.check()

    def use_up(self, tree: RadixTree) -> None:
        """Check that the tree goes on: each unlocked slot is evicted once, and new keys are cached and found."""
        found = holdings(tree)
        evicted = tree.evict(1000).slots.tolist()
        left = holdings(tree)
        assert sorted([*evicted, *left.slots.values()]) == sorted(found.slots.values())
        assert left.locks == found.locks
        tree.insert([[70, 71], [8, 8]], [[900, 901], [902, 903]], namespace=["new", "c"])
        assert tree.slots(tree.match([[70, 71], [8, 8]], namespace=["new", "c"])).to_list() == [[900, 901], [902, 903]]
        assert tree.match([[70, 71], [8, 8]], namespace=["c", "new"]).lengths.tolist() == [0, 0]
        tree.check()


@pytest.mark.parametrize("name", ACTS)
def test_at_many_bytecodes(name: str, home: str) -> None:
    judge = Judge(name, home)
    scene = Scene(home)
    total = bytecodes(lambda: judge.act(scene))
    for at in cuts(total, home, name):
        cut = judge.judge(partial(interrupt_at, at), Random(at)).where
        assert cut or home == "cuda"  # waits for the GPU vary, and with them the number of bytecodes


@pytest.mark.parametrize("name", ["match lock", "unlock", "lock", "insert behind a start", "evict"])
def test_between_direct_launches(name: str, cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels start as on a GPU: from machine code, through a driver of Python functions."""
    if not interpreted(cuda):
        pytest.skip("on a GPU, the other tests launch directly")
    from tests.support.fake_driver import interpret_launches

    interpret_launches(monkeypatch)
    judge = Judge(name, cuda)
    total = bytecodes(partial(judge.act, Scene(cuda)))
    for at in cuts(total, cuda, name):
        judge.judge(partial(interrupt_at, at), Random(at))


@pytest.mark.parametrize("name", ACTS)
def test_at_every_allocation(name: str, home: str) -> None:
    skip_if_slow(home)
    judge = Judge(name, home)
    for at in range(1000):
        if not judge.judge(partial(fails_at, at), Random(at)):
            break


@pytest.mark.parametrize("home", ["cpu", "cpu apart"])
@pytest.mark.parametrize(("name", "places"), [("lock batch", "places"), ("unlock batch", "locked")])
def test_the_callers_tensors_may_change_meanwhile(name: str, places: str, home: str) -> None:
    """An interrupted call is undone by what it was called with, not by what its caller's tensors hold by then."""
    before = holdings(Scene(home).tree).locks
    for at in cuts(bytecodes(partial(ACTS[name], Scene(home))), home, name):
        scene = Scene(home)
        changes = scene.tree.changes()
        interrupt_at(at, partial(ACTS[name], scene))
        own = getattr(scene, places)
        own.lengths.zero_()
        own.handles.zero_()
        assert (holdings(scene.tree).locks == before) == (scene.tree.changes() == changes)


def test_an_undone_insert_frees_its_own_nodes_only(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted right after its launch. The piece that a lock has split off is as new as a node can be before it."""
    scene = Scene(cuda)
    before = holdings(scene.tree)

    def interrupt(*_arguments: Any) -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(Calls, "enqueued", interrupt)
        with pytest.raises(Interrupt):
            insert_batch(scene)
    assert holdings(scene.tree) == before
    scene.tree.unlock(scene.piece)
    assert scene.tree.slots(scene.piece).to_list() == [[90, 91]]
    scene.tree.check()


def outcome(home: str, names: Sequence[str], cuts: Sequence[int | None]) -> Holdings:
    """Return what a tree holds after some acts, each interrupted at a bytecode or, with None, whole."""
    scene = Scene(home)
    for name, at in zip(names, cuts, strict=True):
        with suppress(ValueError, RuntimeError):  # an act before may have taken what this one names
            if at is None:
                ACTS[name](scene)
                scene.tree.raise_pending()
            else:
                interrupt_at(at, partial(ACTS[name], scene))
    with suppress(ValueError):  # a GPU refuses such an act only when it runs, perhaps after the interruption
        scene.tree.raise_pending()
    scene.tree.check()
    return holdings(scene.tree)


@pytest.mark.parametrize("number", range(8))
def test_two_interrupted_calls_in_a_row(number: int, home: str) -> None:
    """The second call first repairs what the first left, and may be interrupted in that too. Each is done or not."""
    skip_if_slow(home)
    random = Random(number)
    lengths = {name: bytecodes(partial(act, Scene(home))) for name, act in ACTS.items()}
    for _ in range(20 if home == "cuda" else examples(10, 100)):
        names = random.choices([name for name in ACTS if name != "evict none"], k=2)
        cuts = [random.randrange(lengths[name]) for name in names]
        found = outcome(home, names, cuts)
        done = [names[:1], names[1:], names, []]
        assert found in [outcome(home, some, [None] * len(some)) for some in done], (names, cuts)
