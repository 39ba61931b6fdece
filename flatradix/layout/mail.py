"""Indices of the words that GPU kernels write for the host in pinned memory (`Scratch.mail`). Used as `mail.EVICTABLE`.

The upper half of each word holds the number of its call, or of its refusal. The host therefore needs no fence to know
whether the word has arrived.
"""

from __future__ import annotations

EVICTABLE, PROTECTED, NODES, ERRORS, TOKENS, VICTIMS, RELEASED, FREE_UNITS, FREED, GONE = range(10)

FIRST_REFUSAL = 16
REFUSAL_RING = 64
REFUSAL_WORDS = 8

FIRST_ANSWER = FIRST_REFUSAL + REFUSAL_RING * REFUSAL_WORDS
ANSWER_RING = 512
ANSWER_WORDS = 4

# The lengths that batches of up to MOST_TOLD queries matched, one word each.
FIRST_TOLD = FIRST_ANSWER + ANSWER_RING * ANSWER_WORDS
TOLD_RING = 1 << 16
MOST_TOLD = 1 << 13
NO_LENGTH = 0xFFFFFFFF  # of a query that is refused

SIZE = FIRST_TOLD + TOLD_RING
CALL_MASK = 0x7FFFFFFF

# A bit of the words VICTIMS and GONE: the victims are final, but not yet in the order of eviction.
UNORDERED = 1 << 30

OPERATIONS = ("match", "lock", "unlock", "slots", "write_slots", "insert", "evict", "want", "unwant", "rematch")
(MATCH, LOCK, UNLOCK, SLOTS, WRITE_SLOTS, INSERT, EVICT, WANT, UNWANT, REMATCH) = range(10)
