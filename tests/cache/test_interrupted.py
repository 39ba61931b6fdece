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
from tests.support.devices import interpreted
from tests.support.interrupts import bytecodes, fails_at, interrupt_at, skip_if_slow, step_for
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
        self.one, self.other, self.same, self.short = requests
        for request in requests:
            this.compute(request, request.num_tokens)
        self.cache.commit([self.one])
        self.known = [*prompts, SHARED]
        self.cache.counts()

    def begin(self, *prompts: list[int], namespaces: Any = None) -> list[Request]:
        return self.cache.begin(list(prompts), namespaces)


ACTS: dict[str, Callable[[Scene], Any]] = {
    "begin": lambda s: s.begin([*SHARED, 70]),
    "begin that evicts": lambda s: s.begin([60] * 11),
    "begin of several": lambda s: s.begin([*SHARED, 70], [71, 72], [90, 91, 92, 93, 94], namespaces=[None, "c", "a"]),
    "begin of which some are refused": lambda s: s.begin([*SHARED, 70], [80] * 40, [81]),
    "extend": lambda s: s.cache.extend([s.one, s.short]),
    "extend that evicts": lambda s: s.cache.extend([s.one, s.other, s.short], [1, 9, 5]),
    "commit": lambda s: s.cache.commit([s.short], tokens=[[50]], up_to=3),
    "commit of what is there": lambda s: s.cache.commit([s.same]),
    "commit of several": lambda s: s.cache.commit([s.other, s.same, s.one]),
    "finish": lambda s: s.cache.finish([s.other]),
    "finish of several": lambda s: s.cache.finish([s.same, s.one, s.short], tokens=[[1], [2], [3]], up_to=[14, 14, 3]),
    "abort": lambda s: s.cache.abort([s.same]),
    "abort of several": lambda s: s.cache.abort([s.one, s.short]),
    "counts": lambda s: s.cache.counts(),
    "check": lambda s: s.cache.check(),
    "reset": lambda s: s.cache.reset(),
}


def judge(scene: Scene, random: Random) -> None:
    """Check what an engine sees after an interrupted call, and that the engine can go on."""
    this, cache = scene.engine, scene.cache
    for _ in range(random.choice((0, 0, 1, 2))):
        interrupt_at(random.randrange(2000), cache.counts)  # the recovery may be interrupted again
    cache.check()
    mine = [scene.one, scene.other, scene.same, scene.short]
    for request in mine:
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
    assert this.begin([list(range(200, 248))])[0].state == "running"  # takes all slots, so none was lost
    this.cache.abort(this.cache.running)


# One act of each operation is interrupted at every bytecode of flatradix/cache. For all acts that takes minutes.
EACH = ("begin", "extend", "commit of what is there", "finish", "abort", "counts", "reset")


@pytest.mark.parametrize("name", ACTS)
def test_at_every_bytecode(name: str, where: dict[str, str]) -> None:
    if name not in EACH:
        skip_if_slow(where["device"])
    apart = Scene(where).cache.tree.slot_device is not None
    every = 1 if name in EACH and not apart else 17 if apart else 7
    for folder, step in (("cache", every), ("", 61))[: 1 if interpreted(where["device"]) else 2]:
        total = bytecodes(partial(ACTS[name], Scene(where)), folder)
        step = max(step, step_for(where["device"], total))
        for at in range(Random(name).randrange(step), total, step):
            scene = Scene(where)
            cut = interrupt_at(at, partial(ACTS[name], scene), folder).where
            assert cut or where["device"] == "cuda"  # waits for the GPU vary, and with them the number of bytecodes
            judge(scene, Random(at))


@pytest.mark.parametrize("name", ACTS)
def test_at_every_allocation(name: str, where: dict[str, str]) -> None:
    skip_if_slow(where["device"])
    for at in range(1000):
        scene = Scene(where)
        failed = fails_at(at, partial(ACTS[name], scene))
        judge(scene, Random(at))
        if not failed:
            break


@pytest.mark.parametrize("number", range(4))
def test_two_interrupted_calls_in_a_row(number: int, where: dict[str, str]) -> None:
    """The second call first repairs what the first left, and may be interrupted in that too."""
    skip_if_slow(where["device"])
    random = Random(number)
    lengths = {name: bytecodes(partial(act, Scene(where))) for name, act in ACTS.items()}
    for _ in range(10 if where["device"] == "cuda" else 40):
        scene = Scene(where)
        for name in random.choices(list(ACTS), k=2):
            with suppress(ValueError):  # the first call may have ended the requests of the second
                interrupt_at(random.randrange(lengths[name]), partial(ACTS[name], scene))
        judge(scene, random)
