"""Checks of every invariant of a PrefixCache. For tests; slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from flatradix.cache.counts import Counts
from flatradix.cache.request import Request
from flatradix.cache.share import Loans
from flatradix.inspect.check import check, equal
from flatradix.inspect.content import Content
from flatradix.layout.handles import ROW_MASK
from flatradix.results import Places


def check_slots(counts: Counts, content: Content, free: torch.Tensor, held: Sequence[torch.Tensor]) -> None:
    """Raise AssertionError unless every slot is exactly one of free, cached or held by a request."""
    check(content)
    live = content.live()
    edges = zip(content.column("start")[live].tolist(), content.column("length")[live].tolist(), strict=True)
    cached = [content.slots[begin : begin + length] for begin, length in edges]
    where = np.concatenate([free.cpu().numpy(), *cached, *(part.cpu().numpy() for part in held)]).astype(np.int64)
    equal(counts.free + counts.evictable + counts.protected + counts.held, counts.slots, "slots in all")
    equal(np.sort(where).tolist(), list(range(counts.slots)), "slots that are free, cached or held")


def check_holders(content: Content, running: Sequence[Request], places: Places) -> None:
    """Raise AssertionError unless each request holds a lock at its place, and there are no other locks."""
    equal(places.lengths.tolist(), [request.committed for request in running], "places that requests hold")
    holders = np.bincount(places.handles.cpu().numpy() & ROW_MASK, minlength=content.rows)
    holders[0] = 0  # nothing is locked at the root
    live = content.live()
    equal(holders[live].tolist(), content.column("own_locks")[live].tolist(), "requests that hold each node")


def check_slot_table(
    table: torch.Tensor, running: Sequence[Request], slots: list[list[int]], free_rows: list[int]
) -> None:
    """Raise AssertionError unless each request's row agrees with the tree, and every row is free or in use."""
    for request, cached in zip(running, slots, strict=True):
        equal(table[request.row, : request.committed].tolist(), cached, f"row {request.row} of the table")
    rows = sorted([*free_rows, *(request.row for request in running)])
    equal(rows, list(range(len(table))), "rows that are free or in use")


def check_loans(loans: Loans, table: torch.Tensor, running: Mapping[int, Request], page: int) -> None:
    """Raise AssertionError unless each loan is between running requests that have equal tokens and equal slots.

    And unless each request computes what it owns, except what it has committed.
    """
    for row, (lender, borrowed) in loans.items():
        what = f"the loan of row {row}"
        equal(row in running and lender in running, True, f"{what}: both requests run")
        one, other = running[row], running[lender]
        equal(one.namespace, other.namespace, f"{what}: namespaces")
        equal(borrowed % page, 0, f"{what}: tokens behind the last page")
        equal(one.committed, other.committed, f"{what}: committed tokens")
        lent = loans[lender].borrowed if lender in loans else 0
        equal(max(one.committed, lent) < borrowed <= min(one.length, other.length), True, f"{what}: its length fits")
        equal(one.tokens[:borrowed].tolist(), other.tokens[:borrowed].tolist(), f"{what}: tokens")
        equal(table[row, :borrowed].tolist(), table[lender, :borrowed].tolist(), f"{what}: slots")
    for row, request in running.items():
        lent = loans[row].borrowed if row in loans else 0
        equal(request.cached_length <= max(request.committed, lent), True, f"row {row}: its own tokens are computed")
