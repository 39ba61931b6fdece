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


class FreeSlots:
    """A stack of free slots on the device. The element behind the last is for values that are not wanted."""

    def __init__(self, slots: torch.Tensor, most: int) -> None:
        self.slots = torch.zeros(most + 1, dtype=slots.dtype, device=slots.device)
        self.slots[: len(slots)] = slots
        self.count = torch.tensor(len(slots), device=slots.device)
        self._places = torch.arange(most, device=slots.device)

    def give(self, values: torch.Tensor, number: torch.Tensor) -> None:
        """Push the first `number` values."""
        places = self._places[: len(values)]
        self.slots[torch.where(places < number, places + self.count, len(self.slots) - 1)] = values
        self.count += number

    def take(self, number: int) -> torch.Tensor:
        self.count -= number
        return self.slots[self._places[:number] + self.count]


class Engine:
    """A full tree, the free slots, and a set of keys for each of TURNS steps.

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
        self.free = FreeSlots(slots_for(known)[:0].reshape(-1), most)
        self.freed = torch.zeros(self.new + half, dtype=torch.int32, device=device)
        self.table = torch.zeros((shape.batch, shape.tokens), dtype=torch.int32, device=device)
        self.rows = torch.arange(shape.batch, device=device)

    def step(self, turn: int) -> Any:
        tree, free = self.tree, self.free
        tail = self.tails[turn]
        found = tree.match(self.keys[turn], lock=True)
        evicted = tree.evict(self.new - free.count, out=self.freed)
        free.give(self.freed, evicted.num_tokens)
        slots = Ragged(free.take(self.new), tail.offsets)
        inserted = tree.insert(tail, slots, start=found)
        tree.write_slots(inserted, self.table, self.rows)
        tree.unlock(found)
        return evicted, inserted


def _step(setup: Setup) -> Measured:
    shape = setup.shape(64, 4096, 2)
    engine, eager = Engine(setup, shape), Engine(setup, shape)
    steps = [engine.tree.capture(lambda turn=turn: engine.step(turn)) for turn in range(TURNS)]
    for turn in (TURNS - 1, *range(TURNS - 1)) * (1 if setup.tiny else 4):
        evicted, inserted = steps[turn]()
        eager.step(turn)
        assert int(evicted.num_tokens) == engine.new
        assert inserted.lengths.unique().tolist() == [shape.tokens]
    engine.tree.raise_pending()
    assert engine.tree.digest() == eager.tree.digest()
    assert torch.equal(engine.table, eager.table)
    in_turn = [steps[turn] for turn in (TURNS - 1, *range(TURNS - 1))]
    taken = gpu_seconds(setup, in_turn)
    engine.tree.raise_pending()
    # Keys are read and new tokens stored; slots of new tokens are read twice and written three times; the table.
    moved = TOKEN * (shape.batch * shape.tokens + engine.new * 6 + 2 * shape.batch * shape.tokens)
    return Measured(taken, floor_of(setup, moved))


ROWS = [
    Row(
        "graph-step",
        "a graph: match, lock, evict, allocate, insert, write_slots, unlock 64 x 4096, half new",
        90,
        _step,
    )
]
