"""Whose turn is next: SGLang's cache-aware policies, from columns instead of requests. Ties are SGLang's too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flatradix.integrations.sglang.followed import Columns, FollowedQueue


def longest_match(columns: Columns, deferred: np.ndarray) -> np.ndarray:
    """Return positions for `lpm`: the longest match first; those that are deferred last."""
    return np.argsort(np.where(deferred, 1, -columns.matched), kind="stable")


def shortest_prefill(columns: Columns, deferred: np.ndarray) -> np.ndarray:
    """Return positions for `shortest-prefill-first`: the fewest tokens to compute first, of equals the oldest."""
    work = np.maximum(1, columns.length - columns.matched)
    return np.lexsort((columns.entered, work, deferred))


def response_ratio(columns: Columns, deferred: np.ndarray, processed: int) -> np.ndarray:
    """Return the scores of `hrrn`: minus the tokens processed while it waited, for each token to compute."""
    uncached = columns.prompt - columns.matched
    waited = np.maximum(0, processed - columns.arrival)
    scores = -(waited / np.maximum(uncached, 1))
    scores[uncached <= 0] = -np.inf
    scores[deferred] = np.inf
    return scores


def by_score(scores: np.ndarray, ranks: Callable[[], np.ndarray]) -> np.ndarray:
    """Return positions by score, the lowest first, of equals by rank. ranks: called only if there are equals."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    return np.lexsort((ranks(), scores)) if (ordered[1:] == ordered[:-1]).any() else order


def turns(policy: str, followed: FollowedQueue, least: int | None, processed: int) -> np.ndarray:
    """Return positions in the list in the order of a policy of SGLang.

    least: how many tokens an older request must compute for a request to be deferred; None: nobody is deferred.
    processed: SGLang's tokens processed so far.
    """
    if policy == "dfs-weight":
        return followed.depth_first()
    columns = Columns(*(column[followed.listed] for column in followed.columns))
    deferred = np.zeros(len(columns.id), np.bool_) if least is None else columns.gain >= max(1, least)
    if policy == "lpm":
        return longest_match(columns, deferred)
    if policy == "hrrn":
        return by_score(response_ratio(columns, deferred, processed), followed.rid_ranks)
    if policy == "shortest-prefill-first":
        return shortest_prefill(columns, deferred)
    raise ValueError(f"no order is known for the policy {policy}")
