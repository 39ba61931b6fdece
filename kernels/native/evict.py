"""Launch both kernels of an eviction: the second reads what the first has selected."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import fixed_types
from flatradix.kernels.native.launch import cells_of, start


@fixed_types(f"({'int64, ' * 16})", nogil=True)
def start_evict(
    select, free, stream, call, asked, more, comparable, selecting, most_steps,
    pool, slots, counts, space, returned, programs, freeing,
):  # fmt: skip
    """Launch `select_kernel` with `selecting` programs, then `free_kernel` with `programs`; return the driver's code.

    select, free: addresses of the records of both. The other arguments are those of the kernels.
    """
    cells = cells_of(select)
    cells[0] = asked
    cells[1] = more
    cells[2] = comparable
    cells[3] = call
    cells[4] = selecting
    cells[5] = most_steps
    code = start(select, selecting, stream)
    if code != 0:
        return code
    cells = cells_of(free)
    cells[0] = pool
    cells[1] = slots
    cells[2] = counts
    cells[3] = -1
    cells[4] = 0
    cells[5] = 0
    cells[6] = space
    cells[7] = returned
    cells[8] = call
    cells[9] = programs
    cells[10] = freeing
    return start(free, programs, stream)
