"""Indices into a tree's desk, int64: where single keys, and their slots, wait in pinned memory. Used as `desk.NEXT`.

A tree has a desk for short keys and, from its first long key on, one for long keys. MAIL: address of the mail. STAGES:
address of BUFFERS pinned buffers, used in turn, each int32 [TOKENS]. STAGING: address of device memory of that size, to
which a kernel copies its key. NEXT: the buffer for the next key. FIRST_CALL: for each buffer, the call whose kernel
reads it, or 0.
"""

from __future__ import annotations

COUNT = 32
STAGED_TOKENS = 1 << 13
LONG_COUNT = 4
LONG_TOKENS = 1 << 18  # longer keys are copied by torch

MAIL, STAGES, STAGING, BUFFERS, TOKENS, NEXT, FIRST_CALL = range(7)

SIZE = FIRST_CALL + COUNT
