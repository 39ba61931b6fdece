"""Words that the kernels of a GPU leave for the host in pinned memory (`Scratch.mail`). Used as `mail.EVICTABLE`.

Each word carries the number of its call (or of its refusal) in the upper half, so that the host knows without any fence
whether it has arrived.
"""

from __future__ import annotations

EVICTABLE, PROTECTED, NODES, ERRORS, TOKENS, VICTIMS, RELEASED, ROOM = range(8)

FIRST_REFUSAL = 16
REFUSALS = 64
REFUSAL_WORDS = 8

FIRST_ANSWER = FIRST_REFUSAL + REFUSALS * REFUSAL_WORDS
ANSWERS = 512
ANSWER_WORDS = 4

SIZE = FIRST_ANSWER + ANSWERS * ANSWER_WORDS
CALL_MASK = 0x7FFFFFFF

# In the word VICTIMS: the victims are the right ones, but not in the order of eviction yet.
UNORDERED = 1 << 30

OPERATIONS = ("match", "lock", "unlock", "slots", "write_slots", "insert", "evict")
(MATCH, LOCK, UNLOCK, SLOTS, WRITE_SLOTS, INSERT, EVICT) = range(7)
