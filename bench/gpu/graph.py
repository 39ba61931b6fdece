"""Row: a whole step of an engine on the GPU, as one CUDA graph: no word from the host, and none to it."""

from __future__ import annotations

from typing import Any

import torch

from bench.support.gpu_harness import (
    Measured,
    Row,
    Setup,
    Shape,
    floor_of,
    gpu_seconds,
    ragged,
    random_keys,
    slots_for,
)
from flatradix import RadixTree, Ragged

TURNS = 4  # sets of tails; the tree holds all but one, so that each step evicts what it inserts
TOKEN = 4


class Engine:
    """A full tree, and a set of keys for each of TURNS steps.

    Each key has a first half that stays cached, and a second half that is new in each turn.
    """

    def __init__(self, setup: Setup, shape: Shape) -> None:
        device, self.batch, half = setup.device, shape.batch, shape.tokens // 2
        self.new = shape.batch * half
        most = TURNS * self.new
        self.tree: RadixTree = setup.tree(most)
        known = random_keys(device, shape.batch, half)
        self.tree.insert(ragged(known), ragged(slots_for(known)))
        tails = [random_keys(device, shape.batch, half, seed, seed * shape.batch) for seed in range(2, 2 + TURNS)]
        self.tails = [ragged(tail) for tail in tails]
        self.keys = [ragged(torch.cat([known, tail], dim=1)) for tail in tails]
        for turn, tail in enumerate(tails[: TURNS - 1], 1):
            start = self.tree.match(ragged(known))
            self.tree.insert(ragged(tail), ragged(slots_for(tail, turn * self.new)), start=start)
        assert self.tree.total_tokens == most
        self.freed = torch.zeros(self.new + half, dtype=torch.int32, device=device)
        self.table = torch.zeros((shape.batch, shape.tokens), dtype=torch.int32, device=device)
        self.rows = torch.arange(shape.batch, device=device)

    def step(self, turn: int) -> Any:
        """Match, lock, evict as much as is new, insert that with the freed slots, write all slots of each key."""
        tree, tail = self.tree, self.tails[turn]
        found = tree.match(self.keys[turn], lock=True)
        evicted = tree.evict(self.new, out=self.freed)
        inserted = tree.insert(tail, Ragged(self.freed[: self.new], tail.offsets), start=found)
        tree.write_slots(inserted, self.table, self.rows)
        return found, evicted, inserted


def _step(setup: Setup) -> Measured:
    shape = setup.shape(64, 4096, 2)
    engine, eager = Engine(setup, shape), Engine(setup, shape)
    steps = [engine.tree.capture(lambda turn=turn: engine.step(turn)) for turn in range(TURNS)]
    for turn in (TURNS - 1, *range(TURNS - 1)) * (1 if setup.tiny else 4):
        found, evicted, inserted = steps[turn]()
        engine.tree.unlock(found)
        eager.tree.unlock(eager.step(turn)[0])
        assert int(evicted.num_tokens) == engine.new
        assert inserted.lengths.unique().tolist() == [shape.tokens]
    engine.tree.raise_pending()
    assert engine.tree.digest() == eager.tree.digest()
    assert torch.equal(engine.table, eager.table)
    in_turn = [steps[turn] for turn in (TURNS - 1, *range(TURNS - 1))]
    locked = [step() for step in in_turn]

    def release() -> None:
        for found, _evicted, _inserted in locked:
            engine.tree.unlock(found)

    release()
    taken = gpu_seconds(setup, in_turn, release, once=True)
    engine.tree.raise_pending()
    # Keys are read and new tokens stored; slots of new tokens are read twice and written three times; the table.
    moved = TOKEN * (shape.batch * shape.tokens + engine.new * 6 + 2 * shape.batch * shape.tokens)
    return Measured(taken, floor_of(setup, moved))


ROWS = [
    Row(
        "graph-step",
        "a graph: match, lock, evict, insert, write_slots of 64 x 4096, half new",
        90,
        _step,
    )
]
