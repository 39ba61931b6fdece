"""Requests that share KV slots before they are committed: loans from one running request to another.

A loan says: the slots of a request up to `borrowed`, in whole pages, are those of another running request, its lender.
The lender may itself borrow a shorter prefix. A family is all requests that loans connect. Requests are given by their
rows of the slot table. Between two calls of the cache:

- A slot that is not in the tree has one owner: the request with the slot in its row, from its own `borrowed` on.
- A lender owns the page before `borrowed`, so it borrows less than it lends.
- All requests of a family have committed equally many tokens, and each borrower has committed less than it borrows.

Loans are never changed, only replaced as a whole: an interrupted call leaves the old or the new ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flatradix.inputs.namespaces import Key, Namespace, key_of

_TOKEN = np.dtype(np.int32)


class Loan(NamedTuple):
    """lender: the row of the request that lends. borrowed: the end of what it lends, in tokens from the start."""

    lender: int
    borrowed: int


Loans = Mapping[int, Loan]  # by the row of the borrower, in the order in which the borrowers began


class Sharing:
    """The prompts of one `begin` that start. Finds what another prompt shares with them.

    O(log B) comparisons of prompts for each of B prompts.
    """

    def __init__(self, page_size: int) -> None:
        self._page = page_size
        self._started: dict[Key, tuple[list[bytes], list[int]]] = {}  # by namespace: sorted prompts, their rows
        self._loans: dict[int, Loan] = {}

    def start(self, row: int, tokens: np.ndarray, namespace: Namespace, cached: int) -> Loan | None:
        """Start a prompt; return its loan, if it shares more than `cached` tokens with a prompt that started before.

        tokens: int64 [K], the prompt without the tokens that are never shared.
        """
        prompts, rows = self._started.setdefault(key_of(namespace), ([], []))
        prompt = tokens.astype(_TOKEN).tobytes()
        at = bisect_left(prompts, prompt)
        shared, lender = cached, -1
        for near in range(max(at - 1, 0), min(at + 1, len(prompts))):  # of sorted ones, neighbours share most
            common = _common(prompt, prompts[near]) // self._page * self._page
            if common > shared:
                shared, lender = common, rows[near]
        prompts.insert(at, prompt)
        rows.insert(at, row)
        if lender < 0:
            return None
        while lender in self._loans and self._loans[lender].borrowed >= shared:
            lender = self._loans[lender].lender
        loan = self._loans[row] = Loan(lender, shared)
        return loan

    def take_back(self, row: int, namespace: Namespace) -> None:
        """Forget a prompt that does not start after all. No prompt that starts may have a loan from it."""
        prompts, rows = self._started[key_of(namespace)]
        at = rows.index(row)
        del prompts[at], rows[at]
        self._loans.pop(row, None)


def _common(a: bytes, b: bytes) -> int:
    """Return how many tokens two prompts have in common."""
    count = min(len(a), len(b)) // _TOKEN.itemsize
    if count == 0:
        return 0
    differ = np.frombuffer(a, _TOKEN, count) != np.frombuffer(b, _TOKEN, count)
    first = int(differ.argmax())
    return first if differ[first] else count


def copies(loans: Loans, begins: Mapping[int, int]) -> dict[tuple[int, int, int], list[int]]:
    """Return which slots to copy between rows: (lender, first column, end) to the rows of the borrowers.

    begins: the first column that each borrower lacks. Copied in order, each lender's row is complete when it is read.
    """
    found: dict[tuple[int, int, int], list[int]] = {}
    for row, loan in loans.items():
        found.setdefault((loan.lender, begins[row], loan.borrowed), []).append(row)
    return found


# Commit


def _families(loans: Loans) -> list[list[int]]:
    """Return the rows of each family, every lender before its borrowers."""
    borrowers: dict[int, list[int]] = {}
    for row, loan in loans.items():
        borrowers.setdefault(loan.lender, []).append(row)
    families = []
    for root in borrowers:
        if root not in loans:
            family = [root]
            for row in family:  # grows
                family += borrowers.get(row, ())
            families.append(family)
    return families


def _spread(loans: Loans, family: Sequence[int], ends: Mapping[int, int]) -> dict[int, int]:
    """Return how much of each request of a family is computed, if `ends` are: what two requests share is the same."""
    found = {row: ends.get(row, 0) for row in family}
    inner = [row for row in family if row in loans]
    for row in reversed(inner):
        lender, borrowed = loans[row]
        found[lender] = max(found[lender], min(found[row], borrowed))
    for row in inner:
        lender, borrowed = loans[row]
        found[row] = max(found[row], min(found[lender], borrowed))
    return found


def together(loans: Loans, ends: Mapping[int, int]) -> dict[int, int]:
    """Return the ends of all requests that are committed if some are: theirs, and those of their families.

    ends: by row, in whole pages. In the result, every lender is before its borrowers; otherwise, the order is kept.
    """
    family_of = {row: family for family in _families(loans) for row in family}
    found: dict[int, int] = {}
    for row, end in ends.items():
        if row not in family_of:
            found[row] = end
        elif row not in found:
            found.update(_spread(loans, family_of[row], ends))
    return found


def unsettled(loans: Loans, committed: Mapping[int, int]) -> dict[int, Loan]:
    """Return the loans that go on, when so many tokens of requests are committed."""
    return {row: loan for row, loan in loans.items() if loan.borrowed > committed.get(row, 0)}


# End


class Ending(NamedTuple):
    """What follows when requests end.

    loans: those that go on. begins: for each request that ends, the first column of its row whose slots nobody takes
        over. heirs: the rows of requests that own slots which a lender owned before.
    """

    loans: dict[int, Loan]
    begins: list[int]
    heirs: set[int]


def end(loans: Loans, rows: Sequence[int]) -> Ending:
    """Return what follows when the requests of some rows end, one after the other.

    Of the borrowers of such a request, the one that borrows most becomes the heir, the first of equals. The heir owns
    what it borrowed, except what the lender borrowed in turn; the other borrowers borrow from the heir.
    """
    left, begins, heirs = dict(loans), [], set()
    for row in rows:
        own = left.pop(row, None)
        borrowers = [borrower for borrower, loan in left.items() if loan.lender == row]
        if not borrowers:
            begins.append(own.borrowed if own else 0)
            continue
        heir = max(borrowers, key=lambda borrower: left[borrower].borrowed)
        begins.append(left[heir].borrowed)
        for borrower in borrowers:
            left[borrower] = Loan(heir, left[borrower].borrowed)
        if own:
            left[heir] = own
        else:
            del left[heir]
        heirs.add(heir)
    return Ending(left, begins, heirs.difference(rows))


def end_others(loans: Loans, running: Collection[int]) -> Ending:
    """Return what follows when all requests but those of the rows `running` end."""
    members = dict.fromkeys(row for borrower, loan in loans.items() for row in (loan.lender, borrower))
    return end(loans, [row for row in members if row not in running])
