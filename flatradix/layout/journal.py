"""Journal: one int64 array of what the calls of a tree did, for `flatradix.ranks`.

The state comes first: the number of entries ever written, two hashes over all of them, and what tells whether the tree
has changed since. Then come KEPT entries, used in turns.
"""

from __future__ import annotations

KEPT = 1 << 12
NUMBER, BY_CALLS, BY_NUMBERS, STAMP, STATE = range(5)
NAME, QUERIES, CLOCK, EVICTABLE, PROTECTED, NODES, DIGEST, CALLS_HASH, NUMBERS_HASH, ENTRY = range(10)
UNKNOWN = -1
