"""Undoing a call on a GPU after its Python was interrupted.

The device tells whether the call took effect: each call's kernels leave its number, and no other call runs meanwhile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from flatradix.device.calls import Calls
from flatradix.device.dropping import Marks
from flatradix.device.mailbox import is_later
from flatradix.dropping import times_of
from flatradix.kernels import gpu
from flatradix.kernels.gpu import Arrays
from flatradix.layout import mail, numbers
from flatradix.layout.queries import PlaceAddresses
from flatradix.layout.scratch import STARTED, clean
from flatradix.layout.state import FREE_ROW
from flatradix.victims import Freed

NOTHING, LOCK, UNLOCK, INSERT, EVICT, RESET, WANT, UNWANT, DROP = range(9)
_REVERSED = {LOCK: gpu.unlock, UNLOCK: gpu.lock, WANT: gpu.unwant, UNWANT: gpu.want_again}


class OpenCall(NamedTuple):
    """A call that may have been interrupted, and the data to undo it.

    call: the number of the launch that makes the change. changes: the index's count of changes before the call. places:
    of a lock or unlock. batch: queries of an insert. slots: the tensor to which an eviction writes. before: slots that
    an earlier, interrupted eviction did not return; an eviction copies them to the front of `slots`, a reset drops
    them. freed: what to tell the callback of an eviction. marks: what a drop writes before it frees, to be taken back
    where it has not freed. owner: keeps memory alive.
    """

    operation: int
    call: int
    changes: int
    places: PlaceAddresses | None = None
    batch: int = 0
    slots: torch.Tensor | None = None
    before: torch.Tensor | None = None
    freed: Freed | None = None
    marks: Marks | None = None
    owner: Any = None


NOTHING_YET = OpenCall(NOTHING, 0, 0)  # the one of a call that has changed nothing yet


def undo(done: OpenCall, arrays: Arrays, calls: Calls) -> bool:
    """Undo what the device did for a call, except an eviction, a drop or a reset. Return whether the call took effect.

    Waits for the device. May itself be interrupted: once the undo has run, `call` is no longer the device's last call,
    so it is not undone twice.
    """
    device = arrays.state.parent.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    _finish_second_launch(done, arrays, calls)
    clean(arrays.scratch)
    if not calls.mailbox.has_run(done.call) or calls.mailbox.was_refused(done.call):
        if done.marks is not None:
            done.marks.take_back(arrays)
        return False
    if done.operation == INSERT:
        _remove_new(arrays, done.batch, calls.next())
    elif done.places is not None:
        _REVERSED[done.operation](arrays, done.places, calls.next())
    return True


def _finish_second_launch(done: OpenCall, arrays: Arrays, calls: Calls) -> None:
    """Locks and unlocks of many places take two launches. Do the second launch if only the first was done."""
    started = int(arrays.scratch.counters[STARTED])
    call = abs(started)
    last, _refusals = calls.mailbox.latest(mail.ERRORS)
    if done.places is not None and call and last != call and is_later(call, last):
        (gpu.finish_lock if started > 0 else gpu.finish_unlock)(arrays, done.places, call)
        if arrays.device >= 0:
            torch.cuda.synchronize(arrays.device)


def _remove_new(arrays: Arrays, batch: int, call: int) -> None:
    """Free the nodes that the last call, an insert of `batch` queries, has made. Pieces of split edges stay."""
    state = arrays.state
    found = state.numbers.cpu().numpy()
    rows = int(found[numbers.ROWS])
    parent, created = (column[:rows].cpu().numpy() for column in (state.parent, state.created))
    live = parent != FREE_ROW
    live[0] = False
    created = times_of(created)
    # Pieces that a lock has split off since the insert before were created one tick after the clock of that time.
    new = live & (created > found[numbers.CLOCK] - 2 * batch + 1)
    above = np.unique(parent[live & ~new])
    while (above := above[above > 0]).size:  # a new node above an older node is a piece of a split edge
        new[above] = False
        above = np.unique(parent[above])
    victims = torch.from_numpy(np.flatnonzero(new)).to(state.parent.device)
    if len(victims):
        gpu.set_victims(arrays, victims)
        tokens = int(state.length[victims].sum())
        dtype = torch.int64 if arrays.pool_wide else torch.int32
        slots = torch.empty(tokens, dtype=dtype, device=state.parent.device)
        gpu.free(arrays, len(victims), tokens, slots.data_ptr(), call)
