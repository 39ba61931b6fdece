"""Running: the rows of the array with the state of a cache's running requests, int64 [FIELDS, R].

Each request has a column of this array. In host memory.
"""

from __future__ import annotations

SERIAL = 0  # the number of the request, 0 where the column is free; numbers begin at 1 and are never used again
NUM_TOKENS = 1  # tokens that are known
LENGTH = 2  # tokens that have slots
COMMITTED = 3  # tokens that are in the tree, whole pages
COUNTED = 4  # tokens for which an insert has counted a hit
CACHED = 5  # prompt tokens that need no computing
KEPT = 6  # tokens that the tree alone keeps; those behind are in the request's row of tokens
MISSING = 7  # slots that the last `extend` lacked
PRIORITY = 8  # of the inserts
MARK = 9  # 0; used within a call
FIELDS = 10

# Why requests are refused.
NOT_RUNNING, TWICE, TOO_MANY_TOKENS, TOO_LONG = 1, 2, 3, 4
