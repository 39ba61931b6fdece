"""The marks of a drop on a GPU: written before its victims are freed, and taken back if the call is cut short there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from flatradix.dropping import COLUMNS, Plan, Rows, Settings
from flatradix.kernels import gpu
from flatradix.kernels.gpu import Arrays
from flatradix.layout import numbers
from flatradix.layout.state import TreeState

Change = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def rows_of(state: TreeState, page_size: int) -> Rows:
    """Return the columns that a plan needs, copied to the host. Waits for the device."""
    found = state.numbers.cpu()
    used = int(found[numbers.ROWS])
    columns = {name: getattr(state, name)[:used].cpu().numpy() for name in COLUMNS}
    return Rows(**columns, settings=Settings(int(found[numbers.GENERATION]), page_size, bool(found[numbers.BY_PAGE])))


class Marks(NamedTuple):
    """What changes in a tree before the victims of a drop are freed.

    changes: of each a column, the rows that change, their values before, and their new values. moves: whether entries
    of the child table change; the table is then built anew, so that entries of inverted tags never fill it up.
    """

    changes: list[Change]
    moves: bool

    def write(self, arrays: Arrays) -> None:
        """Mark what was dropped. May be called again, and after `take_back`."""
        self._set(arrays, 3)

    def take_back(self, arrays: Arrays) -> None:
        """Undo `write`, also one that was cut short. May be called again."""
        self._set(arrays, 2)

    def _set(self, arrays: Arrays, which: int) -> None:
        for change in self.changes:
            column, rows, values = change[0], change[1], change[which]
            column[rows] = values
        if self.moves:
            gpu.rebuild(arrays)


def marks_of(state: TreeState, rows: Rows, plan: Plan, pinned: bool) -> Marks:
    """Return the changes of a plan. pinned: whether there are soft pins. Those of dropped nodes end."""
    changes = [_change(state.created, plan.kept, rows.created[plan.kept] - plan.less)]
    if len(plan.hidden):
        tags = state.tag[: len(rows.parent)].cpu().numpy()[plan.hidden]
        changes.append(_change(state.tag, plan.hidden, ~tags))
    if pinned:
        changes += _ended_wants(state, rows, plan)
    return Marks([change for change in changes if len(change[1])], len(plan.hidden) > 0)


def _change(column: torch.Tensor, rows: np.ndarray, values: np.ndarray) -> Change:
    where = torch.from_numpy(rows).to(column.device)
    return column, where, column[where], torch.from_numpy(values).to(column.device, column.dtype)


def _ended_wants(state: TreeState, rows: Rows, plan: Plan) -> list[Change]:
    """Return the changes of the wants. The nodes above lose what dropped nodes wanted."""
    used = len(rows.parent)
    own, wanted = (column[:used].cpu().numpy().copy() for column in (state.own_wants, state.wanted))
    before = wanted.copy()
    ended = np.concatenate([plan.kept, plan.victims])
    ended = ended[own[ended] > 0]
    above = ended
    counts = own[ended]
    while len(above):
        np.subtract.at(wanted, above, counts)
        above = rows.parent[above]
        counts, above = counts[above > 0], above[above > 0]
    changed = np.flatnonzero(wanted != before)
    return [
        _change(state.own_wants, ended, np.zeros(len(ended), np.int32)),
        _change(state.wanted, changed, wanted[changed]),
    ]
