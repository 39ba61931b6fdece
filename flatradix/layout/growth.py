"""How large the arrays of a tree without `max_tokens` are: at first, and when an insert needs more room."""

from __future__ import annotations

from flatradix.layout.numbers import MAX_UNITS
from flatradix.layout.state import POOL_SLACK, pool_units, row_capacity

FIRST_TOKENS = 1 << 12
MOST_ROWS = 1 << 28


def is_too_large(max_tokens: int, page_size: int, halves: int = 1) -> bool:
    """Return whether a tree's arrays would exceed the largest index. halves: of each pool, 2 on a GPU."""
    return halves * pool_units(max_tokens, page_size) > MAX_UNITS or row_capacity(max_tokens, page_size) >= MOST_ROWS


def most_tokens(page_size: int, halves: int = 1) -> int:
    """Return the tokens of the largest tree."""
    pages = min(MAX_UNITS // halves // page_size * POOL_SLACK // (POOL_SLACK + 1), MOST_ROWS - 2)
    return pages * page_size


def first_capacity(page_size: int) -> int:
    return max(FIRST_TOKENS // page_size, 1) * page_size


def next_capacity(capacity: int, needed: int, most: int) -> int:
    """Return the capacity after a growth: twice as much as often as `needed` tokens take. `most` is enough for them."""
    while capacity < needed:
        capacity *= 2
    return min(capacity, most)
