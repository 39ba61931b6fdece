"""Taking back what a call on a GPU did whose Python was cut short.

The kernels themselves tell whether it was done: nothing else runs then, and each leaves the number of its call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.device.calls import Calls
from flatradix.device.mailbox import is_later
from flatradix.kernels import gpu
from flatradix.kernels.gpu import Arrays
from flatradix.layout import mail, numbers
from flatradix.layout.queries import Places
from flatradix.layout.scratch import STARTED, clean
from flatradix.layout.state import FREE_ROW

NOTHING, LOCK, UNLOCK, INSERT, EVICT, RESET = range(6)


class Done(NamedTuple):
    """A call that may have been cut short, and what it is taken back by.

    call: the number of the launch that makes its change. changes: of the index before it. places: of a lock or unlock.
    batch: queries of an insert. slots: where an eviction puts them. before: those among them, or left by a reset, that
    an eviction before could not return. owner: keeps memory alive.
    """

    operation: int
    call: int
    changes: int
    places: Places | None = None
    batch: int = 0
    slots: torch.Tensor | None = None
    before: torch.Tensor | None = None
    owner: Any = None


def take_back(done: Done, arrays: Arrays, calls: Calls) -> bool:
    """Undo what the device has done of a call, but for evictions and resets; whether it had done anything.

    Waits for the device. May be cut short itself: what is taken back is no longer the last that the device has done.
    """
    device = arrays.state.parent.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    _finish_second_launch(done, arrays, calls)
    clean(arrays.scratch)
    if not calls.mailbox.has_run(done.call) or calls.mailbox.was_refused(done.call):
        return False
    if done.operation == INSERT:
        _remove_new(arrays, done.batch, calls.next())
    elif done.places is not None:
        (gpu.unlock if done.operation == LOCK else gpu.lock)(arrays, done.places, calls.next())
    return True


def _finish_second_launch(done: Done, arrays: Arrays, calls: Calls) -> None:
    """Locks and unlocks of many places take two launches: do the second where only the first was done."""
    started = int(arrays.scratch.counters[STARTED])
    call = abs(started)
    last, _refusals = calls.mailbox.latest(mail.ERRORS)
    if done.places is not None and call and last != call and is_later(call, last):
        (gpu.finish_lock if started > 0 else gpu.finish_unlock)(arrays, done.places, call)
        if arrays.device >= 0:
            torch.cuda.synchronize(arrays.device)


def _remove_new(arrays: Arrays, batch: int, call: int) -> None:
    """Free the nodes that the last call, an insert of `batch` queries, has made, but for pieces of edges it has cut."""
    state = arrays.state
    found = state.numbers.cpu().numpy()
    rows = int(found[numbers.ROWS])
    parent, created = (column[:rows].cpu().numpy() for column in (state.parent, state.created))
    live = parent != FREE_ROW
    live[0] = False
    new = live & (created > found[numbers.CLOCK] - 2 * batch)
    above = np.unique(parent[live & ~new])
    while (above := above[above > 0]).size:  # what an older node hangs below stays
        new[above] = False
        above = np.unique(parent[above])
    victims = torch.from_numpy(np.flatnonzero(new)).to(state.parent.device)
    if len(victims):
        gpu.set_victims(arrays, victims)
        tokens = int(state.length[victims].sum())
        dtype = torch.int64 if arrays.pool_wide else torch.int32
        slots = torch.empty(tokens, dtype=dtype, device=state.parent.device)
        gpu.free(arrays, len(victims), tokens, slots.data_ptr(), call)
