"""Repairing a PrefixCache after an interrupted call.

No record tells how far the call came. The content of the tree and the running requests determine where each slot is,
and which locks must exist. If the tree holds a request's own slots, the request was committed up to these slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from flatradix.cache import share
from flatradix.cache.request import RUNNING, Request
from flatradix.layout import numbers
from flatradix.layout.handles import ROW_MASK, pack_handle
from flatradix.results import Places
from flatradix.tree import RadixTree

BEGIN, EXTEND, COMMIT, END, RESET, OTHER = "begin", "extend", "commit", "end", "reset", "other"


class UnderWay(NamedTuple):
    """A call that has begun: its requests, and their numbers before the call."""

    operation: str
    requests: Sequence[Request] = ()
    lengths: Sequence[int] = ()
    num_tokens: Sequence[int] = ()
    committed: Sequence[int] = ()


READING = UnderWay("reading")  # a call that has changed nothing so far


def begun(operation: str, requests: Sequence[Request]) -> UnderWay:
    """Return the record of a call on running requests."""
    return UnderWay(
        operation,
        requests,
        [request.length for request in requests],
        [request.num_tokens for request in requests],
        [request.committed for request in requests],
    )


def requests_left(cut: UnderWay, running: dict[int, Request]) -> list[Request]:
    """Return the requests that run on. End the other requests of the call, and all that an interrupted `begin` started.

    After an `extend`, the lengths from before the call are restored.
    """
    left = list(running.values())
    if cut.operation in (BEGIN, RESET):
        began = set(map(id, cut.requests))
        left = [request for request in left if id(request) not in began]
    runs = set(map(id, left))
    for request in cut.requests:
        if request.state == RUNNING and id(request) not in runs:
            request.end()
    if cut.operation == EXTEND:
        for request, length in zip(cut.requests, cut.lengths, strict=True):
            request.length = length
    return left


def find_committed(
    tree: RadixTree, table: torch.Tensor, requests: list[Request], page: int, loans: share.Loans
) -> tuple[Places, list[int]]:
    """Return a place on the path of each request, and how many of its tokens are in the tree, in whole pages.

    At least `request.committed` tokens are in the tree, and those up to the last slot of its own that the tree holds.
    What a request shares with others by `loans` is in the tree for all of these requests.
    """
    device = tree.device
    if not requests:
        empty = torch.empty(0, dtype=torch.int32, device=device)
        return Places(empty, empty.to(torch.int64)), []
    keys = [request.tokens[: min(request.length, request.num_tokens) // page * page] for request in requests]
    match = tree.match(keys, [request.namespace for request in requests], touch=False)
    cached = tree.slots(match).to("cpu")
    committed = []
    for query, request in enumerate(requests):
        slots = cached[query].numpy()
        own = table[request.row, : len(slots)].cpu().numpy()
        same = np.flatnonzero(slots[request.committed :] == own[request.committed :])
        committed.append(request.committed + (int(same[-1]) + 1 if len(same) else 0))
    if loans:
        ends = {request.row: end for request, end in zip(requests, committed, strict=True)}
        known = share.together(loans, ends)
        committed = [known[row] for row in ends]
    lengths = torch.tensor(committed, dtype=torch.int32, device="cpu").to(device)
    return Places(lengths, match.handles), committed


def forget_tokens(cut: UnderWay, committed: dict[int, int]) -> None:
    """Drop the new tokens of an interrupted commit, unless it reached the tree. committed: by the id of a request."""
    if cut.operation not in (COMMIT, END):
        return
    before = zip(cut.requests, cut.committed, strict=True)
    if not any(committed.get(id(request), 0) > known for request, known in before):
        for request, known in zip(cut.requests, cut.num_tokens, strict=True):
            request.num_tokens = known


def lock_exactly(tree: RadixTree, places: Places) -> None:
    """Change the locks of the tree to one for each of these places. Renew the handles of `places`."""
    tree.split(places)
    content = tree.content(slots=False)
    rows = places.handles.cpu().numpy() & ROW_MASK
    wanted = np.bincount(rows, minlength=content.rows)
    own = np.where(np.isin(np.arange(content.rows), content.live()), content.column("own_locks"), 0)
    wanted[0] = 0  # nothing is locked at the root
    generation = content.number(numbers.GENERATION)
    for surplus, operation in ((own - wanted, tree.unlock), (wanted - own, tree.lock)):
        found = np.repeat(np.arange(content.rows), np.maximum(surplus, 0))
        if len(found):
            packed = [pack_handle(int(row), generation + int(content.column("generation")[row])) for row in found]
            handles = torch.tensor(packed, dtype=torch.int64, device="cpu").to(tree.device)
            lengths = torch.from_numpy(content.column("end")[found].astype(np.int32)).to(tree.device)
            operation(Places(lengths, handles))


def free_pages(tree: RadixTree, held: list[torch.Tensor], pages: int, page: int) -> torch.Tensor:
    """Return the pages with slots that are neither in the tree nor held by a request: int64 [K], the lowest last."""
    tree.evict(0)  # drops the slots of an interrupted eviction from the tree: no node holds them, so they are free
    content = tree.content()
    used = np.zeros(pages, np.bool_)
    for row in content.live().tolist():
        begin = int(content.column("start")[row])
        slots = content.slots[begin : begin + int(content.column("length")[row]) : page]
        used[slots // page] = True
    for part in held:
        used[part[::page].cpu().numpy() // page] = True
    return torch.from_numpy(np.flatnonzero(~used)[::-1].copy())
