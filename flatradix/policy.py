"""Eviction policies: what goes first among the nodes without children and locks.

The built-in ones mean what SGLang's `mem_cache/evict_policy.py` (0.5.23) means by the same names. A policy of one's own
is a function from the node arrays to a score for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from flatradix import meta

SLRU_THRESHOLD = 2


class Nodes(NamedTuple):
    """What a policy sees: one entry a row, in tensors that are the tree's own and must not be written to.

    Rows that hold no node have arbitrary values, and their scores are ignored.
    """

    tick: torch.Tensor  # int64: last use; grows by 2 with each query
    created: torch.Tensor  # int64: the tick at which the node came to be
    priority: torch.Tensor  # int64
    hit_count: torch.Tensor  # int32: inserts that passed the node
    lock_ref: torch.Tensor  # int32
    children: torch.Tensor  # int32
    length: torch.Tensor  # int32: tokens on the edge
    end: torch.Tensor  # int32: tokens from the root to the node's end


Policy = Callable[[Nodes], torch.Tensor]


def most_recent(nodes: Nodes) -> torch.Tensor:
    """mru. A touch makes a node go sooner, which the lazy queue of the other policies cannot follow."""
    return -nodes.tick


NAMES = ("lru", "lfu", "slru", "fifo", "mru", "filo", "priority")


def resolve(policy: str | Policy) -> tuple[int, Policy | None]:
    """The code of a policy, and its function where it is one."""
    if callable(policy):
        return meta.SCORES, policy
    if policy == "mru":
        return meta.SCORES, most_recent
    if policy not in NAMES:
        raise ValueError(f"policy {policy!r} is unknown: one of {', '.join(NAMES)}, or a function of the nodes")
    return int(getattr(meta, policy.upper())), None


def built_in_scores(code: int, nodes: Nodes) -> torch.Tensor:
    """int64: what a built-in policy other than mru orders by, before the tick; smaller goes first."""
    if code == meta.LFU:
        return nodes.hit_count.to(torch.int64)
    if code == meta.SLRU:
        return (nodes.hit_count >= SLRU_THRESHOLD).to(torch.int64)
    if code == meta.FIFO:
        return nodes.created
    if code == meta.FILO:
        return -nodes.created
    return nodes.priority


def scores_of(policy: Policy, nodes: Nodes, live: torch.Tensor) -> torch.Tensor:
    """Call a policy; its scores as int64 that order the same way. `live`: bool, whether a row holds a node."""
    scores = policy(nodes)
    rows = len(nodes.tick)
    if not isinstance(scores, torch.Tensor) or scores.shape != (rows,):
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"the policy returned {got}; it must return a tensor with one score a row: ({rows},)")
    if scores.dtype.is_complex:
        raise ValueError(f"the policy returned scores of {scores.dtype}; they must be integers or floats")
    if not scores.dtype.is_floating_point:
        return scores.to(live.device, torch.int64).contiguous()
    broad = scores.to(live.device, torch.float64) + 0.0  # -0.0 becomes 0.0
    nan = broad.isnan() & live
    if bool(nan.any()):
        raise ValueError(f"the policy returned NaN for row {int(nan.nonzero()[0])}")
    bits = broad.contiguous().view(torch.int64)
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)
