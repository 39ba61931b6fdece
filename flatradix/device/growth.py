"""The larger arrays to which a growing tree on a GPU moves."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flatradix.inputs.options import Options
from flatradix.kernels import gpu
from flatradix.kernels.gpu import Arrays
from flatradix.layout import numbers
from flatradix.layout.scratch import allocate_scratch, enlarge
from flatradix.layout.state import COLUMNS, TreeState, allocate_device, pool_units


class Larger(NamedTuple):
    """A whole tree in larger arrays. pool: of the slots."""

    options: Options
    state: TreeState
    pool: torch.Tensor
    arrays: Arrays


def _copy_numbers(old: TreeState, new: TreeState, first: int) -> None:
    """Copy all numbers but those that say how large the arrays are."""
    found, sizes = old.numbers.clone(), new.numbers
    for place in (numbers.MAX_TOKENS, numbers.ROW_CAPACITY, numbers.POOL_PAGES, numbers.TABLE_MASK, numbers.POOL_END):
        found[place] = sizes[place]
    found[numbers.POOL_CURSOR] -= first
    new.numbers.copy_(found)


@torch.inference_mode(False)  # else the tensors would be inference tensors forever
def larger_than(arrays: Arrays, pool: torch.Tensor, options: Options, max_tokens: int) -> Larger:
    """Return a copy of a tree in arrays for `max_tokens` tokens, when all its calls are done.

    Rows stay, and so do handles. The part of the pools in use moves to their beginning. O(cached tokens), there.
    """
    old, page, device = arrays.state, options.page_size, pool.device
    rows, free = int(old.numbers[numbers.ROWS]), int(old.numbers[numbers.FREE_ROWS])
    end, cursor = int(old.numbers[numbers.POOL_END]), int(old.numbers[numbers.POOL_CURSOR])
    first, units = end - pool_units(options.max_tokens, page), pool_units(max_tokens, page)
    new = allocate_device(max_tokens, page, options.bigram, 0, device)
    for name in COLUMNS:
        getattr(new, name)[:rows] = getattr(old, name)[:rows]
    new.start[:rows] -= first
    new.free_rows[:free] = old.free_rows[:free]
    new.namespace_children[: len(old.namespace_children)] = old.namespace_children
    new.multipliers.copy_(old.multipliers)
    slots = torch.zeros(2 * units, dtype=pool.dtype, device=device)
    for source, target in ((old.tokens, new.tokens), (old.seconds, new.seconds), (pool, slots)):
        target[: len(source[first:cursor])] = source[first:cursor]
    _copy_numbers(old, new, first)
    scratch = enlarge(allocate_scratch(len(new.parent), max_tokens, arrays.scratch.mail, device), arrays.scratch.batch)
    made = gpu.arrays_of(new, scratch, slots, page, options.bigram)
    gpu.rebuild(made)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # other streams may use the new arrays next, and none uses the old ones then
    return Larger(options._replace(max_tokens=max_tokens), new, slots, made)
