"""Options: the arguments of a tree, checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from flatradix.inputs import devices
from flatradix.inputs.arguments import positive
from flatradix.inputs.namespaces import Namespace
from flatradix.inputs.policy import Order, Policy, order_of
from flatradix.layout import growth

EVICT_BY = ("node", "page")
OnEvict = Callable[[Namespace, np.ndarray, torch.Tensor], object]


class Options(NamedTuple):
    """The arguments of `RadixTree`, explained in its docstring.

    max_tokens: what fits into the arrays now. grows: whether the caller gave no `max_tokens`, so that the arrays grow.
    order: how `policy` orders nodes.
    """

    max_tokens: int
    grows: bool
    page_size: int
    policy: Policy
    slot_device: torch.device | None
    bigram: bool
    slot_dtype: torch.dtype
    check_slots: bool
    evict_by: str
    on_evict: OnEvict | None
    order: Order
    pin_budget: int | None = None


def read_options(
    max_tokens: int | None,
    page_size: int,
    policy: Policy,
    slot_device: str | torch.device | None,
    bigram: bool,
    slot_dtype: torch.dtype,
    check_slots: bool,
    evict_by: str,
    on_evict: OnEvict | None,
    pin_budget: int | None = None,
) -> Options:
    """Check the arguments of a tree.

    Raises ValueError for an option out of range, DeviceUnavailableError for a slot device that cannot be used.
    """
    page_size = positive("page_size", page_size)
    capacity = growth.first_capacity(page_size) if max_tokens is None else positive("max_tokens", max_tokens)
    _check_sizes(capacity, page_size)
    if slot_dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slot_dtype must be torch.int32 or torch.int64, not {slot_dtype}")
    if evict_by not in EVICT_BY:
        raise ValueError(f'evict_by must be "node" or "page", not {evict_by!r}')
    if not (on_evict is None or callable(on_evict)):
        raise ValueError(f"on_evict must be a function or None, not {on_evict!r}")
    return Options(
        capacity,
        max_tokens is None,
        page_size,
        policy,
        None if slot_device is None else devices.memory_on("slot_device", slot_device),
        bool(bigram),
        slot_dtype,
        bool(check_slots),
        evict_by,
        on_evict,
        order_of(policy),
        None if pin_budget is None else positive("pin_budget", pin_budget),
    )


def _check_sizes(max_tokens: int, page_size: int) -> None:
    if max_tokens < page_size:
        raise ValueError(f"max_tokens {max_tokens} is less than one page of {page_size}")
    if growth.is_too_large(max_tokens, page_size):
        raise ValueError(
            f"max_tokens {max_tokens} with page_size {page_size} is too large: at most 1.7e9 tokens and 2.6e8 pages"
        )
