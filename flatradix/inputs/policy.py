"""Eviction policies: which of the nodes without children and locks goes first.

The built-in policies mean what SGLang's `mem_cache/evict_policy.py` (0.5.23) means by the same names. A custom policy
is a function from the node arrays to a score for each node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.layout import numbers


class Nodes(NamedTuple):
    """The input of a policy function: one entry a row. The tensors belong to the tree and must not be written to.

    Rows that hold no node have arbitrary values, and their scores are ignored.
    """

    tick: torch.Tensor  # int64: last use; the clock goes up by 2 with each query
    created: torch.Tensor  # int64: the tick at which the node was made
    priority: torch.Tensor  # int64
    hit_count: torch.Tensor  # int32: inserts that passed the node
    lock_ref: torch.Tensor  # int32
    children: torch.Tensor  # int32
    length: torch.Tensor  # int32: tokens on the edge
    end: torch.Tensor  # int32: tokens from the root to the node's end


Score = Callable[[Nodes], torch.Tensor]


class Slru(NamedTuple):
    """The policy slru with a given threshold. `slru` makes it."""

    protected_threshold: int

    def __repr__(self) -> str:
        return f"slru(protected_threshold={self.protected_threshold})"


def slru(protected_threshold: int = 2) -> Slru:
    """Return the policy slru: nodes that `protected_threshold` or more inserts have passed go after all others.

    Raises ValueError unless the threshold is an integer of at least 1. With 2, the default, the policy equals "slru".
    """
    if isinstance(protected_threshold, bool) or not isinstance(protected_threshold, int) or protected_threshold < 1:
        raise ValueError(f"slru: protected_threshold must be an integer of at least 1, not {protected_threshold!r}")
    if protected_threshold > numbers.MAX_HITS:
        raise ValueError(f"slru: protected_threshold {protected_threshold} is more than any node can count")
    return Slru(protected_threshold)


Policy = str | Slru | Score


def most_recent(nodes: Nodes) -> torch.Tensor:
    """Return the scores of mru. A touch makes a node go sooner; the lazy queue of other policies cannot follow that."""
    return torch.from_numpy(-nodes.tick.numpy()) if nodes.tick.is_cpu else -nodes.tick


NAMES = ("lru", "lfu", "slru", "fifo", "mru", "filo", "priority")


class Order(NamedTuple):
    """How a tree orders nodes for eviction. code: numbers.LRU and the like. score: the function if code is SCORES."""

    code: int
    score: Score | None
    protected_threshold: int


def order_of(policy: Policy) -> Order:
    """Return how a policy orders nodes. Raises ValueError for an unknown policy."""
    threshold = slru().protected_threshold
    if isinstance(policy, Slru):
        return Order(numbers.SLRU, None, policy.protected_threshold)
    if callable(policy):
        return Order(numbers.SCORES, policy, threshold)
    if policy == "mru":
        return Order(numbers.SCORES, most_recent, threshold)
    if policy not in NAMES:
        raise ValueError(
            f"policy {policy!r} is unknown: one of {', '.join(NAMES)}, flatradix.slru(protected_threshold=...), or a "
            "function of the nodes"
        )
    return Order(int(getattr(numbers, policy.upper())), None, threshold)


def built_in_scores(order: Order, nodes: Nodes) -> torch.Tensor:
    """Return int64 scores of a built-in policy other than mru. The lowest goes first; the tick breaks ties."""
    if order.code == numbers.LRU:
        return torch.zeros_like(nodes.tick)
    if order.code == numbers.LFU:
        return nodes.hit_count.to(torch.int64)
    if order.code == numbers.SLRU:
        return (nodes.hit_count >= order.protected_threshold).to(torch.int64)
    if order.code == numbers.FIFO:
        return nodes.created
    if order.code == numbers.FILO:
        return -nodes.created
    return nodes.priority


def scores_of(score: Score, nodes: Nodes, live: torch.Tensor) -> torch.Tensor:
    """Call a policy function. Return its scores as int64 of the same order. live: bool [R], whether a row holds a node.

    Raises ValueError for a result of the wrong shape or dtype, or with NaN for a node.
    """
    return sortable(score(nodes), len(nodes.tick), "policy", "row", live)


def sortable(scores: Any, count: int, who: str, what: str, live: torch.Tensor | None = None) -> torch.Tensor:
    """Return scores, [count] of any real dtype, as int64 of the same order. live: where NaN is refused; None: all.

    Raises ValueError for a wrong shape or dtype, or NaN. who, what: for the message.
    """
    if not isinstance(scores, torch.Tensor) or scores.shape != (count,):
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"the {who} returned {got}; it must return a tensor with one score a {what}: ({count},)")
    if scores.dtype.is_complex:
        raise ValueError(f"the {who} returned scores of {scores.dtype}; they must be integers or floats")
    device = scores.device if live is None else live.device
    if scores.is_cpu and device.type == "cpu" and scores.dtype != torch.bfloat16:
        return _sortable_on_host(scores.detach().numpy(), who, what, None if live is None else live.numpy())
    if not scores.dtype.is_floating_point:
        return scores.to(device, torch.int64).contiguous()
    broad = scores.to(device, torch.float64) + 0.0  # -0.0 becomes 0.0
    nan = broad.isnan() if live is None else broad.isnan() & live
    if nan.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a CUDA graph cannot hold a search for NaN: have the {who} return integers")
    if bool(nan.any()):
        raise ValueError(f"the {who} returned NaN for {what} {int(nan.nonzero()[0])}")
    bits = broad.contiguous().view(torch.int64)
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def _sortable_on_host(scores: np.ndarray, who: str, what: str, live: np.ndarray | None) -> torch.Tensor:
    """Do what `sortable` does, with numpy: threads of torch do not survive a fork."""
    if scores.dtype.kind != "f":
        return torch.from_numpy(np.ascontiguousarray(scores, np.int64))
    broad = scores.astype(np.float64) + 0.0
    nan = np.isnan(broad) if live is None else np.isnan(broad) & live
    if nan.any():
        raise ValueError(f"the {who} returned NaN for {what} {int(nan.argmax())}")
    bits = broad.view(np.int64)
    return torch.from_numpy(np.where(bits < 0, bits ^ np.iinfo(np.int64).max, bits))
