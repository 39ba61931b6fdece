"""Groups of keys of an insert: the keys that leave the tree at the same point with the same next page.

The lowest query of a group represents the group and owns the new leaf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.children import tag_of
from flatradix.kernels.gpu.cut import get, put
from flatradix.kernels.gpu.finish import acquire
from flatradix.kernels.gpu.walk import name_of, pages_at
from flatradix.layout import scratch


@triton.jit
def key_at(values, offsets, w, batch, query, at):
    """Return a pointer to the token of a key at path length `at`."""
    return values + tl.load(offsets + query) + (at - get(w, batch, query, scratch.Q_BEGIN))


@triton.jit
def equal_tokens(a, b, count, BLOCK: tl.constexpr):
    """Return how many of the first `count` tokens of `a` and `b` are equal before the first difference; scalar."""
    equal = tl.zeros([], tl.int64)
    going = count > 0
    while going:
        j = tl.arange(0, BLOCK)
        inside = equal + j < count
        different = tl.load(a + equal + j, mask=inside, other=0) != tl.load(b + equal + j, mask=inside, other=0)
        first = tl.min(tl.where(different, j, BLOCK)).to(tl.int64)
        equal = tl.minimum(equal + first, count)
        going = (first == BLOCK) & (equal < count)
    return equal


@triton.jit
def claims_of(w, this_round, mask):
    """Return the claim table of a round: `mask` + 1 queries, -1 where empty. Rounds alternate between two tables."""
    return w.claims + (this_round % 2) * (mask + 1)


@triton.jit
def claim(
    s, w, values, offsets, names, name, query, batch, key, edge, at, code, this_round, mask,
    PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr, NAMES: tl.constexpr,
):  # fmt: skip
    """Enter a query into the group of its key for this round. Q_GROUP then holds the group's position in the table.

    key: the rest of the key, which leaves the tree at (edge, at). The other columns of the query must be set before:
    the next query of the group compares its own columns with them, maybe in the same launch.
    """
    claims = claims_of(w, this_round, mask)
    parent = tl.where(edge > 0, edge, ~code.to(tl.int64)) ^ (at << 32)
    page, second = pages_at(key, 0, PAGE, PAGE, WIDTH, BIGRAM)
    place = tag_of(s, page, second, parent, PAGE, WIDTH, BIGRAM) & mask
    tl.debug_barrier()  # all warps have read the columns that are set below, and all their stores will be released
    joined = False
    while not joined:
        other = tl.atomic_cas(claims + place, -1, query, sem="release")
        joined = other == -1
        if not joined:
            acquire(claims + place, 0)
            their_code, _theirs = name_of(names, name, other, NAMES)
            alike = (get(w, batch, other, scratch.Q_EDGE) == edge) & (get(w, batch, other, scratch.Q_AT) == at)
            alike = alike & ((edge > 0) | (their_code == code))
            if alike:
                theirs = key_at(values, offsets, w, batch, other, at)
                alike = equal_tokens(key, theirs, at * 0 + PAGE + BIGRAM, WIDTH) == PAGE + BIGRAM
            if alike:
                # A release too: the next query may find this query here.
                tl.atomic_min(claims + place, query, sem="acq_rel")
                joined = other >= 0
            else:
                place = (place + 1) & mask
    put(w, batch, query, place, scratch.Q_GROUP)
    put(w, batch, query, this_round, scratch.Q_ROUND)


@triton.jit
def clear_claim(w, batch, query, this_round, mask):
    """Remove the claim of a query from the claim table of a round, which must be empty for its next use."""
    if get(w, batch, query, scratch.Q_ROUND) == this_round:
        tl.store(claims_of(w, this_round, mask) + get(w, batch, query, scratch.Q_GROUP), -1)
