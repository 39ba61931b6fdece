"""Running: the state of a cache's running requests, as one tuple of flat arrays in host memory.

Each request has a row. Of a cache whose index is on a GPU, only `data`, `free_rows` and `counts` are in use.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# The rows of `Running.data`.
SERIAL = 0  # the number of the request, 0 where the row is free; numbers begin at 1 and are never used again
NUM_TOKENS = 1  # tokens that are known
LENGTH = 2  # tokens that have slots
COMMITTED = 3  # tokens that are in the tree, whole pages
COUNTED = 4  # tokens for which an insert has counted a hit
CACHED = 5  # prompt tokens that need no computing
KEPT = 6  # tokens that the tree alone keeps; those behind are in the request's row of tokens
MISSING = 7  # slots that the last `extend` lacked
PRIORITY = 8  # of the inserts
BORROWED = 9  # tokens before which another request may own the slots, whole pages; 0 without a lender
MARK = 10  # 0; used within a call
FIELDS = 11

# Indices into `Running.counts`. The first are the sizes of the cache.
ROWS = 0
PAGE = 1  # tokens of a page
WIDTH = 2  # pages of a row
MOST_KNOWN = 3  # the most tokens of a request that are known
MOST_SLOTS = 4  # the most tokens of a request that have slots
FREE_ROWS = 5
FREE_PAGES = 6
NEXT_SERIAL = 7
# Totals since the start.
BEGUN = 8
PROMPT_TOKENS = 9
CACHED_TOKENS = 10
SHARED_TOKENS = 11
DUPLICATE_TOKENS = 12
SIZE = 13
TOTALS = slice(BEGUN, SIZE)

# Why requests are refused.
NOT_RUNNING, TWICE, TOO_MANY_TOKENS, TOO_LONG, BAD_END = 1, 2, 3, 4, 5


class Running(NamedTuple):
    """R rows of requests, W pages in each, P pages in all."""

    data: np.ndarray  # int64 [FIELDS, R]
    free_rows: np.ndarray  # int64 [R]: a stack
    counts: np.ndarray  # int64 [SIZE]
    pages: np.ndarray  # int32 [R, W]: the page of each PAGE tokens
    stack: np.ndarray  # int32 [P]: the free pages; the last is allocated first
    handles: np.ndarray  # int64 [R]: the place that each request holds, COMMITTED tokens from the root
    pool: np.ndarray  # int32: the page of each page of the tree's pools
    tokens: np.ndarray  # int32 [R, MOST_KNOWN]


DTYPES = {
    "data": np.int64, "free_rows": np.int64, "counts": np.int64, "pages": np.int32, "stack": np.int32,
    "handles": np.int64, "pool": np.int32, "tokens": np.int32,
}  # fmt: skip
