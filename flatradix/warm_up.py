"""Compiling, or reading from disk, everything that a tree runs, before it is wanted."""

from __future__ import annotations

import torch

from flatradix.inputs import devices


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
    found = devices.preferred(device)
    if found.type == "cuda":
        from flatradix.device.warm_up import warm_up_device

        warm_up_device(found, page_size, bigram)
    else:
        from flatradix.host.warm_up import warm_up_host

        warm_up_host(slot_device)
