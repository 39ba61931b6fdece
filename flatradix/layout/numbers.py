"""Places in `TreeState.numbers`, and the codes that are kept there. Used as `numbers.CLOCK`.

Plain constants of a module, because every kernel compiler takes those.
"""

from __future__ import annotations

# Set when a tree is made.
PAGE = 0
BIGRAM = 1
POLICY = 2
PROTECTED_THRESHOLD = 3  # of slru: inserts that must have passed a node for it to be protected
MAX_TOKENS = 4
ROW_CAPACITY = 5
POOL_PAGES = 6
GENERATION = 7

# What `reset` leaves as it is.
CLOCK = 8
RELEASED = 9  # entries of `TreeState.released`
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

# On a GPU alone: the end of the half of the pools in use, and how many calls were refused so far.
POOL_END = 22
ERRORS = 23

# In host memory alone: which call changed the tree last, and what it did, so that it can be taken back if its Python is
# cut short; and the longest edge ever, which bounds what an eviction may free.
LAST_CALL = 24
CALL_BEFORE = 25  # that changed the tree before the last one
LAST_OPERATION = 26
LAST_HANDLE = 27
LAST_LENGTH = 28
LAST_PREFIX = 29
LONGEST = 30

SIZE = 32

# Operations, in the place LAST_OPERATION.
LOCKED, UNLOCKED, INSERTED, EVICTED, COMPACTED, RESET = range(1, 7)

# Policies, in the place POLICY. SCORES: a function scores all nodes at each eviction.
LRU, LFU, SLRU, FIFO, FILO, PRIORITY, SCORES = range(7)

NO_NAMESPACE = 0
UNKNOWN_NAMESPACE = -1
HEAP_ARITY = 8

MAX_TOKEN = 2**31 - 1
MAX_UNITS = 2**31 - 1
MAX_HITS = 2**31 - 1
