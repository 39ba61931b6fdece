"""Machine code on the host that starts the GPU's kernels and reads what they tell. numba compiles it at its first use.

Python would take as long for a short look-up as the GPU does: to copy the key, fill in the parameters, call the driver
and read the answer takes 8 us of Python, but less than 1 us here, without the driver's own time. Each function releases
the GIL.
"""

from flatradix.kernels.native.answers import await_answer, await_lengths, await_word
from flatradix.kernels.native.evict import start_evict
from flatradix.kernels.native.insert import start_insert, start_insert_one
from flatradix.kernels.native.launch import (
    Record,
    launch,
    start_lock,
    start_long,
    start_match,
    start_matches,
    start_slots,
)
from flatradix.kernels.native.stage import commit, stage

FUNCTIONS = (
    await_answer, await_lengths, await_word, commit, launch, stage, start_evict, start_insert, start_insert_one,
    start_lock, start_long, start_match, start_matches, start_slots,
)  # fmt: skip


def prepare() -> None:
    """Compile all functions, or load them from disk."""
    for function in FUNCTIONS:
        function.prepare()


__all__ = [
    "FUNCTIONS",
    "Record",
    "await_answer",
    "await_lengths",
    "await_word",
    "commit",
    "launch",
    "prepare",
    "stage",
    "start_evict",
    "start_insert",
    "start_insert_one",
    "start_lock",
    "start_long",
    "start_match",
    "start_matches",
    "start_slots",
]
