"""The numbers that the host and the kernels agree on; above all the places in `TreeState.meta`.

Plain constants of a module, because every kernel compiler takes those.
"""

from __future__ import annotations

# What never changes after the allocation.
PAGE = 0
BIGRAM = 1
POLICY = 2
THRESHOLD = 3
MAX_TOKENS = 4
ROW_CAPACITY = 5
POOL_PAGES = 6
GENERATION = 7

# What `reset` leaves as it is.
CLOCK = 8
RELEASED = 9
ERROR_QUERY = 10
ERROR_VALUE = 11

# What `reset` clears.
EVICTABLE = 12
PROTECTED = 13
NODES = 14
ROWS = 15
FREE_ROWS = 16
TABLE_MASK = 17
HEAP = 18
RUN = 19
RUN_HEAD = 20
POOL_CURSOR = 21

SIZE = 22

# Policies, in the place POLICY. SCORES: a function scores all nodes at each eviction.
LRU, LFU, SLRU, FIFO, FILO, PRIORITY, SCORES = range(7)

NO_HANDLE = -1
NO_NAMESPACE = 0
UNKNOWN_NAMESPACE = -1
HEAP_ARITY = 8
