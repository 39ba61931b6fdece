"""The orders of a waiting queue: positions by age in, positions in turn out.

numpy computes them: torch would start threads for long queues, which do not survive a fork.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from flatradix.inputs.policy import sortable
from flatradix.kernels import cpu


class Columns(NamedTuple):
    """What an order may look at: one value for each of N waiting prompts, the oldest first.

    cached: int32 [N], tokens that are cached. length: int32 [N], tokens of the prompt. shared: int32 [N], tokens that
    are not cached and that an older waiting prompt has too. waited: float64 [N], how long it has waited. priority:
    int64 [N]. arrival: float64 [N].
    """

    cached: torch.Tensor
    length: torch.Tensor
    shared: torch.Tensor
    waited: torch.Tensor
    priority: torch.Tensor
    arrival: torch.Tensor


OrderFunction = Callable[[Columns], torch.Tensor]
NAMES = ("fcfs", "lpm", "dfs-weight", "hrrn", "shortest-prefill", "aged", "k-lpm")


def uncached(columns: Columns) -> np.ndarray:
    return columns.length.numpy() - columns.cached.numpy()


def response_ratio(columns: Columns) -> np.ndarray:
    """Return the scores of hrrn: minus the time waited for each token to compute. Nothing to compute goes first."""
    left = uncached(columns)
    return np.where(left <= 0, -np.inf, -(columns.waited.numpy() / np.maximum(left, 1)))


def aged(columns: Columns, patience: float) -> np.ndarray:
    """Return the scores of `aged`: minus the cached share of the prompt, and of `patience` that it has waited."""
    length, cached = columns.length.numpy(), columns.cached.numpy()
    return -(cached / np.maximum(length, 1) + columns.waited.numpy() / patience)


def scores_of(policy: str | OrderFunction, columns: Columns, patience: float) -> torch.Tensor:
    """Return the scores of a policy other than fcfs and dfs-weight: [N], the lowest goes first."""
    if callable(policy):
        return policy(columns)
    built_in: dict[str, Callable[[], np.ndarray]] = {
        "lpm": lambda: -columns.cached.numpy(),
        "k-lpm": lambda: -columns.cached.numpy(),
        "hrrn": lambda: response_ratio(columns),
        "shortest-prefill": lambda: np.maximum(uncached(columns), 1),
        "aged": lambda: aged(columns, patience),
    }
    return torch.from_numpy(built_in[policy]())


def by_scores(scores: torch.Tensor, count: int) -> np.ndarray:
    """Return the positions by score, the lowest first, of equal scores the oldest: int64 [count].

    Raises ValueError for scores of the wrong shape or dtype, or with NaN.
    """
    keys = sortable(scores, count, "order", "waiting prompt").cpu()
    order = np.arange(count)
    cpu.sort_by(keys.numpy(), order)
    return order


def depth_first(parents: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return positions depth first through a tree, the branches with the most prompts first: int64 [N].

    parents: int32 [R], of the tree. rows: int32 [N], the row on which each match ends, 0 for the root. Of equal
    branches, that with the first prompt goes first; prompts that end at a node come after those below.
    """
    order = np.empty(len(rows), np.int64)
    cpu.depth_first(parents, rows, order)
    return order


def in_classes(order: np.ndarray, columns: Columns, deferred: bool) -> np.ndarray:
    """Return an order by priority, the highest first, and of equal priority those that share something last."""
    if deferred:
        shares = (columns.shared.numpy() > 0)[order]
        order = np.concatenate([order[~shares], order[shares]])
    keys = np.ascontiguousarray(~columns.priority.numpy())  # falls as the priority rises, also for the lowest of all
    if len(keys) and keys.min() != keys.max():
        order = order.copy()
        cpu.sort_by(keys, order)
    return order


def with_oldest(order: np.ndarray, columns: Columns, every: int) -> np.ndarray:
    """Return an order by class in which every `every`-th turn of a class goes to its oldest prompt that is left."""
    out = np.empty_like(order)
    cpu.with_oldest(order, np.ascontiguousarray(columns.priority.numpy()), every, out)
    return out
