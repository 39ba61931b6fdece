"""The larger arrays to which a growing tree in host memory moves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from flatradix.host.slots import SlotPool
from flatradix.inputs.options import Options
from flatradix.inputs.sequences import address_of
from flatradix.kernels import cpu
from flatradix.layout.state import TreeState, allocate_host, pool_units


class Larger(NamedTuple):
    """Larger arrays, and a copy of the slots. table: the addresses of the arrays."""

    options: Options
    state: TreeState
    table: np.ndarray
    slots: torch.Tensor


@torch.inference_mode(False)  # else the tensors would be inference tensors forever
def larger_than(state: TreeState, slots: SlotPool, options: Options, max_tokens: int) -> Larger:
    """Return arrays for `max_tokens` tokens, which share with `state` what does not depend on the capacity."""
    page = options.page_size
    new = allocate_host(max_tokens, page, options.bigram, 0)
    new = new._replace(numbers=state.numbers, events=state.events, multipliers=state.multipliers)
    copy = slots.enlarged(pool_units(max_tokens, page))
    return Larger(options._replace(max_tokens=max_tokens), new, cpu.address_table(new), copy)


def move(addresses: int, larger: Larger) -> None:
    """Copy a tree to larger arrays. From now on its address table has their addresses. Python cannot interrupt it."""
    max_tokens, page = larger.options.max_tokens, larger.options.page_size
    pages = pool_units(max_tokens, page) // page
    cpu.enlarge(addresses, address_of(larger.table), max_tokens, len(larger.state.parent), pages)


def has_moved(table: np.ndarray, larger: Larger) -> bool:
    """Return whether a tree's address table has the addresses of larger arrays already."""
    at = TreeState._fields.index("parent")
    return bool(table[at] == larger.table[at])
