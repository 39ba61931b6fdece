"""Indices into `TreeState.numbers`, and the codes that are stored there. Used as `numbers.CLOCK`.

Plain module constants, because every kernel compiler accepts them.
"""

from __future__ import annotations

# Set when a tree is made.
PAGE = 0
BIGRAM = 1
POLICY = 2
PROTECTED_THRESHOLD = 3  # slru protects a node after that many inserts have passed it
MAX_TOKENS = 4
ROW_CAPACITY = 5
POOL_PAGES = 6
GENERATION = 7

# Kept by `reset`.
CLOCK = 8
RELEASED = 9  # how many entries `TreeState.released` has
ERROR_QUERY = 10
ERROR_VALUE = 11

# Set by `reset` to the values of an empty tree. Only ROWS stays: all rows but the root are then free.
EVICTABLE = 12
PROTECTED = 13
NODES = 14
ROWS = 15
FREE_ROWS = 16
TABLE_MASK = 17
HEAP_SIZE = 18
RUN_LENGTH = 19
RUN_HEAD = 20
POOL_CURSOR = 21

# Only on a GPU: the end of the pool half in use, and the number of calls refused so far.
POOL_END = 22
ERRORS = 23

# Only in host memory. LAST_CALL to LAST_PREFIX: the last call that changed the tree, and what it did. If its Python is
# interrupted, the next call undoes it. LONGEST: the longest edge ever, which bounds what an eviction may free.
LAST_CALL = 24
CALL_BEFORE = 25  # the call that changed the tree before LAST_CALL
LAST_OPERATION = 26
LAST_HANDLE = 27  # of an eviction: the row that lost its last pages, or 0
LAST_LENGTH = 28  # of an eviction: its tokens
LAST_PREFIX = 29  # of an eviction: the pool ranges of its slots
LONGEST = 30
EVENTS = 31  # how many events were ever written to `TreeState.events`

BY_PAGE = 32  # set when a tree is made: 1 if an eviction frees only the last pages of its last node

# Only in host memory. At least the largest lock count, and the largest count of soft pins, of a node.
MOST_LOCKS = 33
MOST_WANTS = 34

TOMBSTONES = 35  # only on a GPU: nodes that were freed since the child table was built anew

SIZE = 36

# Kinds of events, which waiting queues and `BlockEvents` read. An event is two words: (kind << 32 | row), and what is
# said here.
LEAF = 1  # a new leaf below `row`, a row or ~namespace: (its row << 32 | the tag of its first page)
CUT = 2  # an edge was cut at a path length: (row of the upper part << 32 | that length); `row` is the lower part
FREED = 3  # a node went: (its parent, a row or ~namespace << 32 | path length at which its edge began)
ALL_FREED = 4  # a reset, or a drop that hides locked nodes: all prompts are looked up afresh
SHORTENED = 5  # the last pages of a node without children went: the path length at which `row` ends now
EVENT_RING = 1 << 15  # events that are kept

# Values of LAST_OPERATION.
LOCKED, UNLOCKED, INSERTED, EVICTED, COMPACTED, RESET, WANTED, UNWANTED = range(1, 9)

# Values of POLICY. SCORES: a function scores all nodes at each eviction.
LRU, LFU, SLRU, FIFO, FILO, PRIORITY, SCORES = range(7)

NO_NAMESPACE = 0
UNKNOWN_NAMESPACE = -1
HEAP_ARITY = 8
DIGIT_BITS = 11  # of a digit, where the queue is sorted

MAX_TOKEN = 2**31 - 1
MAX_UNITS = 2**31 - 1
MAX_HITS = 2**31 - 1
MAX_LOCKS = 2**30  # on one node, and as many soft pins: a call that would exceed them is refused
