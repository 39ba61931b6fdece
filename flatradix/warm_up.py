"""Compiling everything that a tree runs, or reading it from disk, before it is needed."""

from __future__ import annotations

import torch

from flatradix.inputs import devices


def warm_up(
    device: str | torch.device = "auto",
    page_size: int = 1,
    bigram: bool = False,
    slot_device: str | torch.device | None = None,
) -> None:
    """Run every operation once on a small tree. On a CPU, no later call of this process then compiles anything.

    The first warm-up on a machine takes 36 s on a 2-core EPYC, with queues and PrefixCache. numba keeps the machine
    code on disk, so later processes take 1.5 s. Without a warm-up, the first call of each operation compiles that
    operation. On the CPU, page size and bigrams make no difference.

    On a GPU, kernels are compiled for each page size, for bigrams, and for each form of the arguments (dtypes of tokens
    and slots, one name or priority for each query). The warm-up compiles the common kernels for `page_size` and
    `bigram`. Each other kernel takes a second or two at its first call. Triton keeps kernels on disk too. As many
    threads as there are cores compile; bench/RESULTS.md has the times.

    slot_device: as for RadixTree, for a tree on the CPU. Slots on a GPU need a kernel of their own.

    Raises the errors of RadixTree for a device that cannot be used.
    """
    found = devices.preferred(device)
    if found.type == "cuda":
        from flatradix.device.warm_up import warm_up_device

        warm_up_device(found, page_size, bigram)
    else:
        from flatradix.host.warm_up import warm_up_host

        warm_up_host(slot_device)
