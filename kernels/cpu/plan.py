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


@kernel
def plan(
    parents, lengths, ends, locks, rows, cached, tokens, left, token_budget, max_requests, reserve, skip, covered,
    chosen,
):  # fmt: skip
    """Choose prompts in order; return (how many, their new tokens). Fills `chosen`, int64 [N], with their positions.

    parents, lengths, ends, locks: int32 [R], columns of the tree. rows, cached, tokens: int32 [N], of the prompts.
    left: tokens that are free or evictable. covered: int32 [R], zeros: units of each edge that chosen prompts protect.
    """
    tree = (parents, lengths, ends, locks)
    touched, before = np.empty(len(parents), np.int32), np.empty(len(parents), np.int32)
    admitted, total = np.int64(0), np.int64(0)
    for at in range(len(rows)):
        if admitted >= max_requests:
            break
        needed = np.int64(tokens[at]) - cached[at] + reserve
        newly, count = _protect(tree, rows[at], cached[at], covered, touched, before)
        if needed > left - newly or total + needed > token_budget:
            for changed in range(count):
                covered[touched[changed]] = before[changed]
            if not skip:
                break
            continue
        left -= newly + needed
        total += needed
        chosen[admitted] = at
        admitted += 1
    return admitted, total
