"""A step of an engine as one CUDA graph: look up, make room, allocate, cache, fill in the slot table.

The free slots are a stack on the GPU, so no number goes to the host and back. Without a GPU each step runs eagerly.

  python3 -m examples.graph_step
"""

from __future__ import annotations

import time

import torch

from flatradix import RadixTree, Ragged

PROMPTS, TOKENS = 64, 512  # of each step; fixed, as a graph holds addresses and shapes
CAPACITY = 4 * PROMPTS * TOKENS


class FreeSlots:
    """A stack of free slots, of fixed size. Its last element is for values that are not wanted."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.slots = torch.arange(capacity + 1, dtype=torch.int32, device=device)
        self.count = torch.tensor(capacity, device=device)

    def give(self, values: torch.Tensor, wanted: torch.Tensor) -> None:
        """Push the values where `wanted`, bool of the same shape, is set."""
        places = self.count + wanted.cumsum(0) - 1
        self.slots[torch.where(wanted, places, len(self.slots) - 1)] = values
        self.count += wanted.sum()

    def take(self, wanted: torch.Tensor) -> torch.Tensor:
        """Pop a slot for each set element of `wanted`. Return int32 of the same shape, 0 elsewhere."""
        places = self.count - wanted.cumsum(0)
        self.count -= wanted.sum()
        return torch.where(wanted, self.slots[places.clamp(min=0)], 0)


class Engine:
    """The tensors of a step, all static, and the step itself."""

    def __init__(self, device: str, prompts: int = PROMPTS, tokens: int = TOKENS, capacity: int = CAPACITY) -> None:
        self.tree = RadixTree(capacity, device=device)
        device_ = self.tree.device
        total = prompts * tokens
        self.prompts = Ragged(
            torch.zeros(total, dtype=torch.int32, device=device_), torch.arange(prompts + 1, device=device_) * tokens
        )
        self.query = torch.arange(total, device=device_) // tokens  # of each token
        self.position = torch.arange(total, device=device_) % tokens
        self.free = FreeSlots(capacity, device_)
        # An eviction may free more than it is asked for: less than its last node, here a prompt.
        self.freed = torch.zeros(total + tokens, dtype=torch.int32, device=device_)
        self.place = torch.arange(len(self.freed), device=device_)
        self.table = torch.zeros((prompts, tokens), dtype=torch.int32, device=device_)
        self.rows = torch.arange(prompts, device=device_)
        self.step = self.tree.capture(self._step)

    def _step(self) -> torch.Tensor:
        """Run one step for `self.prompts`. Return how many tokens of each were cached."""
        tree, free = self.tree, self.free
        found = tree.match(self.prompts, lock=True)
        is_new = self.position >= found.lengths[self.query]
        short = (is_new.sum() - free.count).clamp(min=0)
        evicted = tree.evict(short, out=self.freed)
        free.give(self.freed, self.place < evicted.num_tokens)
        slots = free.take(is_new)
        # Here the model computes the KV of the new tokens, and stores it in their slots.
        inserted = tree.insert(self.prompts, Ragged(slots, self.prompts.offsets))
        # Where two prompts have the same new part, the tree keeps the slots of the first.
        free.give(slots, is_new & (self.position < inserted.prefix_lengths[self.query]))
        tree.write_slots(inserted, self.table, self.rows)
        tree.unlock(found)
        return found.lengths


def random_prompts(engine: Engine, stems: torch.Tensor) -> torch.Tensor:
    """Return prompts that begin with one of some stems and go on as no other."""
    count, tokens = engine.table.shape
    prompts = torch.randint(1 << 30, (count, tokens), dtype=torch.int32)
    prompts[:, : stems.shape[1]] = stems[torch.randint(len(stems), (count,))]
    return prompts.reshape(-1)


def main(device: str = "auto", steps: int = 200) -> None:
    engine = Engine(device)
    stems = torch.randint(1 << 30, (8, TOKENS // 2), dtype=torch.int32)
    begun, cached = time.perf_counter(), 0
    for number in range(steps):
        engine.prompts.values.copy_(random_prompts(engine, stems))
        lengths = engine.step()
        if number % 50 == 0:
            cached = int(lengths.sum())  # waits, as an engine does when it wants to know
    engine.tree.raise_pending()
    taken = (time.perf_counter() - begun) / steps
    print(f"{steps} steps of {PROMPTS} x {TOKENS} tokens on {engine.tree.device}: {taken * 1e6:.0f} us each")
    print(f"{cached} of {PROMPTS * TOKENS} tokens were cached; {engine.tree}; {int(engine.free.count)} slots are free")


if __name__ == "__main__":
    main()
