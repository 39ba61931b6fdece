"""Indices into a tree's desk, int64: where single keys, and their slots, wait in pinned memory. Used as `desk.NEXT`.

MAIL: address of the mail. STAGES: address of COUNT pinned buffers, used in turn, each int32 [STAGED_TOKENS]. STAGING:
address of device memory of that size, to which a kernel copies its key. NEXT: the buffer for the next key. FIRST_CALL:
for each buffer, the call whose kernel reads it, or 0.
"""

from __future__ import annotations

COUNT = 32
STAGED_TOKENS = 1 << 13

MAIL, STAGES, STAGING, NEXT, FIRST_CALL = range(5)

SIZE = FIRST_CALL + COUNT
