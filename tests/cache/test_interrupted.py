"""Interrupted calls of a PrefixCache: each slot has exactly one owner, and no request gets wrong KV."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import pytest

from flatradix import Request
from flatradix.inspect.nodes import nodes_of
from tests.support.depth import cuts, examples
from tests.support.devices import interpreted
from tests.support.interrupts import bytecodes, fails_at, interrupt_at, skip_if_slow
from tests.support.prefix_engine import Engine, engine, fingerprints

SHARED = list(range(1, 11))


class Scene:
    """An engine with nearly all slots in use: some are cached, some held by four requests."""

    def __init__(self, where: dict[str, str]) -> None:
        self.engine = this = engine(where, 48, max_requests=8)
        self.cache = this.cache
        this.run([*SHARED, 20, 21, 22])
        this.run([90, 91, 92, 93, 94], "a")
        prompts = [[*SHARED, 30, 31, 32, 33], [*SHARED, 30, 31, 32, 34], [*SHARED, 30, 31, 32, 33], [40, 41, 42]]
        requests = this.begin(prompts, [None, None, None, b"b"])
        self.one, self.other, self.same, self.short = self.requests = requests
        for request in requests:
            this.compute(request, request.num_tokens)
        self.cache.commit([self.one])
        self.known = [*prompts, SHARED]
        self.cache.counts()

    def begin(self, *prompts: list[int], namespaces: Any = None) -> list[Request]:
        return self.cache.begin(list(prompts), namespaces)


class SharedScene(Scene):
    """An engine with a family of five requests: `same` and `other` borrow from `one`, `deep` from `short` from `one`.

    Another request, which shares no slots with them, has committed a part of what they share.
    """

    def __init__(self, where: dict[str, str]) -> None:
        self.engine = this = engine(where, 76, max_requests=9, max_length=80)
        self.cache = this.cache
        this.run([*SHARED, 20, 21, 22])
        (rival,) = this.begin([[*SHARED, *range(30, 37)]])
        stem = [*SHARED, 30, 31]
        prompts = [
            [*stem, *range(32, 38)],
            [*stem, 32, 33, 34, 35, 60],
            [*stem, *range(32, 38)],
            [*stem, *range(50, 57)],
            [*stem, *range(50, 54), 70, 71],
        ]
        family = this.begin(prompts, share=True)
        assert [request.borrowed for request in family] == [0, 16, 16, 12, 16]
        self.one, self.other, self.same, self.short, self.deep = family
        assert [request.lender for request in family] == [None, self.one, self.one, self.one, self.short]
        this.forward(family)
        this.compute(rival, 17)
        self.cache.commit([rival], 12)
        self.requests = [*family, rival]
        self.known = [*prompts, SHARED]
        self.cache.counts()

    def begin_shared(self, length: int, longest: int = 5) -> list[Request]:
        """Begin prompts that have `length` new tokens in common. longest: the tokens of the second behind these."""
        stem = [*SHARED, *[80] * length]
        return self.cache.begin([[*stem, 1], [*stem, *[2] * longest], [*stem, 3]], share=True)


SHARED_ACTS: dict[str, Callable[[Any], Any]] = {
    "shared: begin": lambda s: s.begin_shared(4),
    "shared: begin that evicts": lambda s: s.begin_shared(6),
    "shared: begin of which some are refused": lambda s: s.begin_shared(4, longest=40),
    "shared: extend": lambda s: s.cache.extend([s.one, s.other], [3, 4]),
    "shared: commit of the lender": lambda s: s.cache.commit([s.one], 16),
    "shared: commit of a borrower": lambda s: s.cache.commit([s.deep]),
    "shared: commit of a part": lambda s: s.cache.commit([s.same, s.other], [14, 15]),
    "shared: commit of all": lambda s: s.cache.commit([*reversed(s.requests)]),
    "shared: commit with tokens": lambda s: s.cache.commit([s.other], tokens=[[1, 2]]),
    "shared: finish of the lender": lambda s: s.cache.finish([s.one], 12),
    "shared: finish of all": lambda s: s.cache.finish(s.requests),
    "shared: abort of the lender": lambda s: s.cache.abort([s.one]),
    "shared: abort of the lender and its heir": lambda s: s.cache.abort([s.one, s.other]),
    "shared: abort of a borrower that lends": lambda s: s.cache.abort([s.short]),
    "shared: drop": lambda s: s.cache.drop(None),
    "shared: counts": lambda s: s.cache.counts(),
    "shared: reset": lambda s: s.cache.reset(),
}


def scene_of(name: str, where: dict[str, str]) -> Scene:
    return (SharedScene if name in SHARED_ACTS else Scene)(where)


ACTS: dict[str, Callable[[Any], Any]] = {
    "begin": lambda s: s.begin([*SHARED, 70]),
    "begin that evicts": lambda s: s.begin([60] * 11),
    "begin of several": lambda s: s.begin([*SHARED, 70], [71, 72], [90, 91, 92, 93, 94], namespaces=[None, "c", "a"]),
    "begin of which some are refused": lambda s: s.begin([*SHARED, 70], [80] * 40, [81]),
    "extend": lambda s: s.cache.extend([s.one, s.short]),
    "extend that evicts": lambda s: s.cache.extend([s.one, s.other, s.short], [1, 9, 5]),
    "commit": lambda s: s.cache.commit([s.short], tokens=[[50]], up_to=3),
    "commit of what is there": lambda s: s.cache.commit([s.same]),
    "commit of several": lambda s: s.cache.commit([s.other, s.same, s.one]),
    "step": lambda s: s.cache.step([s.one, s.other, s.short], [1, 2, 3]),
    "step of several tokens": lambda s: s.cache.step([s.same, s.short], [[1, 2], [3]], [1, 3]),
    "fork": lambda s: s.cache.fork(s.one, 2),
    "probe": lambda s: s.cache.probe([[*SHARED, 70], [5]]),
    "finish": lambda s: s.cache.finish([s.other]),
    "finish of several": lambda s: s.cache.finish([s.same, s.one, s.short], tokens=[[1], [2], [3]], up_to=[14, 14, 3]),
    "abort": lambda s: s.cache.abort([s.same]),
    "abort of several": lambda s: s.cache.abort([s.one, s.short]),
    "drop": lambda s: s.cache.drop(None),
    "counts": lambda s: s.cache.counts(),
    "check": lambda s: s.cache.check(),
    "reset": lambda s: s.cache.reset(),
    **SHARED_ACTS,
}


def judge(scene: Scene, random: Random) -> None:
    """Check what an engine sees after an interrupted call, and that the engine can go on."""
    this, cache = scene.engine, scene.cache
    for _ in range(random.choice((0, 0, 1, 2))):
        interrupt_at(random.randrange(2000), cache.counts)  # the recovery may be interrupted again
    cache.check()
    for request in scene.requests:
        assert (request in cache.running) == (request.state == "running")
        if request.state == "running":
            this.compare(request)
            assert request.committed <= this.computed[request]
    cache.abort(cache.running)  # includes the requests of a `begin` that never returned
    counts = cache.counts()
    assert (counts.running, counts.protected, counts.held) == (0, 0, 0)
    for node in nodes_of(cache.tree.content()):
        assert this.kv[list(node.slots)].tolist() == fingerprints(node.path, node.namespace)[node.start :]
    if random.randrange(3) == 0:
        go_on(this, scene.known)
        cache.check()


def go_on(this: Engine, prompts: list[list[int]]) -> None:
    for prompt in prompts:
        this.run([*prompt, 99])
    slots = this.cache.counts().slots
    assert this.begin([list(range(200, 200 + slots))])[0].state == "running"  # takes all slots, so none was lost
    this.cache.abort(this.cache.running)


# Acts that are interrupted more densely within flatradix/cache.
EACH = (
    "begin", "step", "fork", "extend", "commit of what is there", "finish", "abort", "counts", "reset", "shared: begin",
    "shared: commit of a borrower", "shared: finish of the lender", "shared: abort of the lender",
)  # fmt: skip


def skip_the_rest(name: str, where: dict[str, str], request: pytest.FixtureRequest) -> None:
    """Skip all but one act of each operation where calls are slow, or where only the tables are copies."""
    if name not in EACH:
        skip_if_slow(where["device"])
        if "apart" in request.node.name:
            pytest.skip("one act of each operation is enough for tables that are copies")


@pytest.mark.parametrize("name", ACTS)
def test_at_many_bytecodes(name: str, where: dict[str, str], request: pytest.FixtureRequest) -> None:
    skip_the_rest(name, where, request)
    for folder, most in (("cache", 40 if name in EACH else 15), ("", 10))[: 1 if interpreted(where["device"]) else 2]:
        total = min(
            bytecodes(partial(ACTS[name], scene_of(name, where)), folder) for _ in range(2)
        )  # a first call imports
        for at in cuts(total, where["device"], name, most):
            scene = scene_of(name, where)
            cut = interrupt_at(at, partial(ACTS[name], scene), folder).where
            # Waits for the GPU vary, and collisions of hashes, which each tree draws anew; with them the bytecodes.
            assert cut or where["device"] == "cuda" or at > 0.9 * total
            judge(scene, Random(at))


@pytest.mark.parametrize("name", ACTS)
def test_at_many_allocations(name: str, where: dict[str, str], request: pytest.FixtureRequest) -> None:
    skip_if_slow(where["device"])
    skip_the_rest(name, where, request)
    for at in range(Random(name).randrange(3), 1000, 3):
        scene = scene_of(name, where)
        failed = fails_at(at, partial(ACTS[name], scene))
        judge(scene, Random(at))
        if not failed:
            break


@pytest.mark.parametrize("number", range(4))
def test_two_interrupted_calls_in_a_row(number: int, where: dict[str, str]) -> None:
    """The second call first repairs what the first left, and may be interrupted in that too."""
    skip_if_slow(where["device"])
    random = Random(number)
    acts = SHARED_ACTS if number % 2 else {name: act for name, act in ACTS.items() if name not in SHARED_ACTS}
    lengths = {name: bytecodes(partial(act, scene_of(name, where))) for name, act in acts.items()}
    for _ in range(10 if where["device"] == "cuda" else examples(10, 40)):
        scene = scene_of(next(iter(acts)), where)
        for name in random.choices(list(acts), k=2):
            with suppress(ValueError):  # the first call may have ended the requests of the second
                interrupt_at(random.randrange(lengths[name]), partial(ACTS[name], scene))
        judge(scene, random)
