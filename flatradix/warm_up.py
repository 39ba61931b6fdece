"""Compiling, or reading from disk, everything that a tree runs, before it is wanted."""

from __future__ import annotations

import torch

from flatradix import backend
from flatradix.device_warm_up import warm_up_device
from flatradix.tree import RadixTree


def warm_up(
    device: str | torch.device = "auto",
    page_size: int = 1,
    bigram: bool = False,
    slot_device: str | torch.device | None = None,
) -> None:
    """Run every operation once on a small tree: on a CPU, no later call of this process compiles anything.

    The first time on a machine it takes 20 s on one core; numba keeps the machine code on disk, and later processes
    take half a second. Without it, each operation pays its own share at its first call. On the CPU, which options a
    tree has makes no difference.

    On a GPU, kernels are compiled for each page size, for bigrams, and for what calls bring (the types of tokens and
    slots, names and priorities for each query): this compiles the common ones for `page_size` and `bigram`, and each
    other one takes a second or two at its first call. Triton keeps them on disk too. As many threads as there are cores
    compile; what that took is in bench/RESULTS.md.

    slot_device: as of RadixTree, for a tree on the CPU: slots on a GPU have a kernel of their own.

    Raises as RadixTree does for a device that cannot be used.
    """
    resolved = backend.resolve(device)
    if resolved.type == "cuda":
        warm_up_device(resolved, page_size, bigram)
        return
    tree = RadixTree(16, page_size=2, device=device)
    one = tree.insert([1, 2, 3, 4], [0, 1, 2, 3])
    found = tree.match([1, 2, 9])
    tree.lock(found)
    tree.slots(found)
    tree.unlock(found)
    tree.insert([5, 6], [4, 5], start=one)
    several = tree.insert([[1, 2], [7, 8]], [[0, 1], [6, 7]])
    tree.lock(several)
    tree.slots(tree.match([[1, 2], [7, 8]]))
    tree.write_slots(several, torch.zeros((2, 2), dtype=torch.int32, device="cpu"), [0, 1])
    tree.unlock(several)
    tree.evict(2)
    tree._compact()
    tree.digest()
    tree._rebuild()
    tree.reset()
    _use_slots_apart(RadixTree(16, page_size=2, device=device, slot_device=slot_device or "cpu"))


def _use_slots_apart(tree: RadixTree) -> None:
    places = tree.insert([[1, 2], [3, 4]], [[0, 1], [2, 3]])
    table = torch.zeros((2, 2), dtype=torch.int32, device=tree.slot_device)
    tree.slots(places)
    tree.write_slots(places, table, [0, 1])
    tree._compact()
