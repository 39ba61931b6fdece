"""A call of a queue is interrupted at every bytecode. What comes after must be as if it had run, or had not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from flatradix import RadixTree, WaitingQueue
from tests.support.depth import cuts
from tests.support.interrupts import bytecodes, fails_at, interrupt_at

NAMES: list[Any] = [None, "a", "b"]


class Scene:
    """A tree, a queue that keeps, and what waits in it by id."""

    def __init__(self) -> None:
        self.tree = RadixTree(200, 2, "cpu")
        self.queue = WaitingQueue(self.tree, keep=True)
        self.insert([1, 2, 3, 4], "a")
        self.prompts = [
            ([1, 2, 3, 4, 5, 6], "a"),
            ([1, 2, 9, 9], None),
            ([1, 2, 3, 4, 5, 6, 7, 8], "a"),
            ([1, 2, 7], "b"),
        ]
        self.queue.add([tokens for tokens, _ in self.prompts], [name for _, name in self.prompts])
        self.queue.cached_lengths()
        self.insert([1, 2, 3, 4, 5, 6], "a")
        self.insert([1, 2, 9, 9], None)

    def insert(self, tokens: list[int], name: Any) -> None:
        self.tree.insert([tokens], [list(range(len(tokens)))], name)

    def judge(self) -> None:
        """Compare all that waits with fresh look-ups, then go on."""
        queue, tree = self.queue, self.tree
        waiting = [queue.prompt(id).tolist() for id in queue.ids().tolist()]
        known = {tuple(tokens): name for tokens, name in [*self.prompts, ([5, 5, 5], "new"), ([6, 6], "newer")]}
        fresh = [tree.match(tokens, known[tuple(tokens)], touch=False).length for tokens in waiting]
        assert queue.cached_lengths().tolist() == fresh
        assert sorted(queue.turns().tolist()) == queue.ids().tolist()
        assert sorted(queue.order("lpm", defer_shared=True).tolist()) == queue.ids().tolist()
        tree.check()
        self.insert([1, 2, 3, 4, 5, 6, 7, 8], "a")
        tree.evict(2)
        fresh = [tree.match(tokens, known[tuple(tokens)], touch=False).length for tokens in waiting]
        assert queue.cached_lengths().tolist() == fresh
        queue.remove(queue.ids())
        tree.check()
        assert not tree.content().column("wanted")[tree.content().live()].any()
        assert len(queue) == 0


ACTS: dict[str, Callable[[Scene], object]] = {
    "add one": lambda scene: scene.queue.add([5, 5, 5], "new"),
    "add several": lambda scene: scene.queue.add([[5, 5, 5], [6, 6]] * 40, ["new", "newer"] * 40),
    "remove one": lambda scene: scene.queue.remove(1),
    "remove several": lambda scene: scene.queue.remove([0, 2]),
    "look": lambda scene: scene.queue.cached_lengths(),
    "shared": lambda scene: scene.queue.shared_lengths(),
    "order": lambda scene: scene.queue.order("k-lpm", now=1.0),
    "lpm": lambda scene: scene.queue.order("lpm"),
    "plan": lambda scene: scene.queue.plan("aged", share=True),
    "evict": lambda scene: scene.tree.evict(4),
    "insert": lambda scene: scene.insert([5, 5, 5], "new"),
}


@pytest.mark.parametrize("name", ACTS)
def test_at_many_bytecodes(name: str) -> None:
    for at in cuts(bytecodes(partial(ACTS[name], Scene())), "cpu", name):
        scene = Scene()
        assert interrupt_at(at, partial(ACTS[name], scene)).where
        scene.judge()


@pytest.mark.parametrize("name", ACTS)
def test_at_every_allocation(name: str) -> None:
    for at in range(1000):
        scene = Scene()
        failed = fails_at(at, partial(ACTS[name], scene))
        scene.judge()
        if not failed:
            break
