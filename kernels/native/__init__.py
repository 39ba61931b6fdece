"""Machine code on the host that starts the GPU's kernels and reads what they tell. numba compiles it at its first use.

Python would take as long for a short look-up as the GPU does: to copy the key, fill in the parameters, call the driver
and read the answer takes 8 us of Python, but less than 1 us here, without the driver's own time. Each function releases
the GIL.
"""

from flatradix.kernels.native.answers import await_answer, await_lengths, await_word
from flatradix.kernels.native.evict import start_evict
from flatradix.kernels.native.launch import Record, launch, start_match
from flatradix.kernels.native.stage import commit_key, stage_key

__all__ = [
    "Record",
    "await_answer",
    "await_lengths",
    "await_word",
    "commit_key",
    "launch",
    "stage_key",
    "start_evict",
    "start_match",
]
