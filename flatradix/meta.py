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

# On a GPU alone: the end of the half of the pools in use, and how many calls were refused so far.
POOL_END = 22
ERRORS = 23

SIZE = 32

# Policies, in the place POLICY. SCORES: a function scores all nodes at each eviction.
LRU, LFU, SLRU, FIFO, FILO, PRIORITY, SCORES = range(7)

NO_HANDLE = -1
NO_NAMESPACE = 0
UNKNOWN_NAMESPACE = -1
HEAP_ARITY = 8

# Places in `Workspace.number`, eight apart so that counters that many programs add to share no cache sector.
ARRIVED = 0  # programs of the launch that are done
WAITING = 8  # programs that have come to a barrier
ERROR = 16  # the first refusal of the call: 64 * query - reason, or NO_ERROR
NEWLY = 24  # tokens that became protected, or evictable
CUTS = 32  # whether queries end inside edges, which are to be cut
OPEN = 40  # queries of an insert whose new part is not settled; one place for each parity of the round
NEEDED = 56  # units that an insert stores
COMPACT = 64  # whether the pools must be compacted
COUNT = 80  # of the queries that cut
TOTAL = 88
HINT = 96  # three words that an eviction leaves for the next: a guess
NUMBERS = 128
NO_ERROR = 1 << 62

PARTIALS = 8192
MOST_PROGRAMS = PARTIALS // 2

# Rows of `Workspace.query`, one column a query.
(Q_ROW, Q_CUT, Q_LIST, Q_PLACE, Q_FIRST, Q_ABOVE, Q_BELOW, Q_SAME, Q_PASS, Q_LAST, Q_NEW, Q_EDGE, Q_AT, Q_BEGIN,
 Q_END, Q_OPEN, Q_GROUP, Q_ROUND, Q_LEAF, Q_OFFSET) = range(20)  # fmt: skip
QUERY_COLUMNS = 20

MAX_TOKEN = 2**31 - 1

HINTS = 8  # rows above each row that `Workspace.above` knows, 32 bytes

# Places in `Workspace.mail`. Each word carries the number of its call (or of its refusal) in the upper half, so that
# the host knows without any fence whether it has arrived.
MAIL_EVICTABLE, MAIL_PROTECTED, MAIL_NODES, MAIL_ERRORS, MAIL_TOKENS, MAIL_VICTIMS, MAIL_RELEASED, MAIL_ROOM = range(8)
MAIL_REFUSALS = 16
REFUSALS = 64
REFUSAL_WORDS = 8
MAIL_ANSWERS = MAIL_REFUSALS + REFUSALS * REFUSAL_WORDS
ANSWERS = 512
ANSWER_WORDS = 4
MAIL = MAIL_ANSWERS + ANSWERS * ANSWER_WORDS
CALL_MASK = 0x7FFFFFFF

OPERATIONS = ("match", "lock", "unlock", "slots", "write_slots", "insert", "evict")
(MATCH, LOCK, UNLOCK, SLOTS, WRITE_SLOTS, INSERT, EVICT) = range(7)
