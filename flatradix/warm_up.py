"""Compiling, or reading from disk, everything that a tree runs, before it is wanted."""

from __future__ import annotations

import torch

from flatradix.tree import RadixTree


def warm_up(device: str | torch.device = "auto") -> None:
    """Run every operation once on a small tree, so that no later call of this process compiles anything.

    The first time on a machine it takes 20 s on one core; numba keeps the machine code on disk, and later processes
    take half a second. Without it, each operation pays its own share at its first call. Which options a tree has makes
    no difference. Raises as RadixTree does for a device that cannot be used.
    """
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
    tree.unlock(several)
    tree.evict(2)
    tree._compact()
    tree.digest()
    tree._kernels.rebuild(tree._table)
    RadixTree(16, page_size=2, device=device, slot_device="cpu")._compact()
    tree.reset()
