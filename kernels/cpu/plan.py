"""Plan: which waiting prompts can be admitted together, without a change of the tree."""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper, kernel


@helper
def _protect(tree, row, length, covered, rows, before):
    """Cover the path to a place; return (tokens that a lock would newly protect, rows whose cover has changed)."""
    count = 0
    parents, lengths, ends, locks = tree
    newly = np.int64(0)
    row = np.int64(row)
    while row > 0 and locks[row] == 0:
        reach = min(np.int64(length), np.int64(ends[row])) - (ends[row] - lengths[row])
        if covered[row] >= reach:
            break  # what is above is covered, too
        rows[count], before[count] = row, covered[row]
        count += 1
        newly += reach - covered[row]
        covered[row] = reach
        row = np.int64(parents[row])
    return newly, count


@helper
def _shared(parents, ends, leaf, marked):
    """Return how many units a prompt shares with the prompts on whose paths the rows of the prompt tree are marked."""
    row = np.int64(leaf)
    while row > 0 and not marked[row]:
        row = np.int64(parents[row])
    return np.int64(ends[row]) if row > 0 else np.int64(0)


@helper
def _mark(parents, leaf, marked):
    """Mark the path of a prompt in the prompt tree."""
    row = np.int64(leaf)
    while row > 0 and not marked[row]:
        marked[row] = True
        row = np.int64(parents[row])


@kernel
def plan(
    parents, lengths, ends, locks, rows, cached, tokens, left, token_budget, max_requests, reserve, skip, covered,
    chosen, share, leaves, prompt_parents, prompt_ends, marked,
):  # fmt: skip
    """Choose prompts in order; return (how many, their new tokens). Fills `chosen`, int64 [N], with their positions.

    parents, lengths, ends, locks: int32 [R], columns of the tree. rows, cached: int32 [N], tokens: int64 [N], of the
    prompts. left: tokens that are free or evictable. covered: int32 [R], zeros: units of each edge that chosen prompts
    protect. share: whether new tokens that chosen prompts share count once. leaves: int32 [N], where the prompts end in
    the prompt tree. prompt_parents, prompt_ends: int32 [P], columns of the prompt tree. marked: bool [P], False.
    """
    tree = (parents, lengths, ends, locks)
    touched, before = np.empty(len(parents), np.int32), np.empty(len(parents), np.int32)
    admitted, total = np.int64(0), np.int64(0)
    for at in range(len(rows)):
        if admitted >= max_requests:
            break
        known = np.int64(cached[at])
        if share:
            known = max(known, _shared(prompt_parents, prompt_ends, leaves[at], marked))
        needed = np.int64(tokens[at]) - known + reserve
        newly, count = _protect(tree, rows[at], cached[at], covered, touched, before)
        if needed > left - newly or total + needed > token_budget:
            for changed in range(count):
                covered[touched[changed]] = before[changed]
            if not skip:
                break
            continue
        left -= newly + needed
        total += needed
        if share:
            _mark(prompt_parents, leaves[at], marked)
        chosen[admitted] = at
        admitted += 1
    return admitted, total
