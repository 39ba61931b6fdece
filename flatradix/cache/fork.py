"""Fork: requests that continue a running one. They share its whole pages."""

from __future__ import annotations

import numpy as np
import torch

from flatradix.cache.requests import Request, Requests
from flatradix.cache.state import State
from flatradix.layout import running


def fork_request(state: State, row: int, n: int) -> tuple[Requests, torch.Tensor]:
    """Start `n` requests with all that a row has, if they fit; return them, and the pages to copy: int64 [K, 2]."""
    columns, pages = state.columns, state.pages
    pages.give_back_duplicates()
    begin, length = int(columns.committed[row]), int(columns.length[row])
    end = state.in_pages(length)
    needed, left = n * (end - begin), state.available_slots
    if needed > left or n > len(columns.free_rows):
        return _refuse(state, row, n, max(needed - left, 0)), torch.empty(
            0, 2, dtype=torch.int64, device=pages.kv_device
        )
    rows = columns.next_rows(n)
    place = pages.places(np.full(n, row), np.full(n, begin))
    state.tree.lock(place)
    state.make_space(needed)
    pages.copy(row, rows, 0, begin)
    pages.take(rows, np.full(n, begin), np.full(n, end))
    pages.copy_tokens(row, rows)
    pages.set_places(rows, place)
    columns.data[running.SERIAL + 1 :, rows] = columns.data[running.SERIAL + 1 :, row, None]
    columns.names[rows] = columns.names[row]
    columns.cached[rows] = begin
    columns.missing[rows] = columns.borrowed[rows] = 0
    columns.start(rows)
    table, parts = pages.page_table, slice(begin // state.page_size, end // state.page_size)
    new = torch.stack([table[one, parts] for one in rows.tolist()])
    old = table[row, parts].expand_as(new)
    return state.batch(rows), torch.stack([old.reshape(-1), new.reshape(-1)], 1).to(torch.int64)


def _refuse(state: State, row: int, n: int, missing: int) -> Requests:
    columns = state.columns
    names = columns.names[row], int(columns.priority[row])
    why = (
        f"{missing} slots too few"
        if missing
        else f"all {state.max_requests} requests that max_requests allows are running"
    )
    refused = {at: Request.refused(state, int(columns.num_tokens[row]), names, why, missing) for at in range(n)}
    state.refused += n
    return Requests(state, np.full(n, -1), np.zeros(n, np.int64), refused)
