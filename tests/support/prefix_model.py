"""A cheap model of a PrefixCache: which prefix each page holds, and who holds it. One number names a prefix.

A prefix of whole pages in a namespace is a chain, an int: its last page hangs below the chain without that page. The
model says what each call must return and where all slots are. It does not say which pages an eviction takes: it is told
which pages are left, and asserts that as many as needed went, that none was locked, and that none left a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flatradix.cache.counts import Counts


class Prompt(NamedTuple):
    """chains: of its whole pages. key: those that may be cached, which leaves the last token to compute."""

    tokens: list[int]
    namespace: Any
    chains: list[int]
    key: list[int]


class Found(NamedTuple):
    """What a `begin` returned for a prompt. serial: 0 if it was refused."""

    row: int
    serial: int
    cached: int
    committed: int
    missing: int


@dataclass(eq=False, slots=True)
class Record:
    """A running request. pages: those of its slots, as far as the model knows. lender, borrowed: as for Request."""

    row: int
    serial: int
    namespace: Any
    tokens: list[int]
    chains: list[int]
    pages: list[int]
    length: int
    committed: int
    cached: int
    lender: Record | None = None
    borrowed: int = 0
    shares: bool = field(default=False)


def expect(found: Any, wanted: Any, what: str) -> None:
    assert found == wanted, f"{what}: {found}, not {wanted}"


class Model:
    """All slots of a cache. Numbers of pages are in pages; lengths of requests are in tokens, as in the cache."""

    def __init__(self, num_pages: int, page: int, max_requests: int, max_length: int, by_page: bool) -> None:
        self.num_pages, self.page = num_pages, page
        self.max_requests, self.max_length, self.by_page = max_requests, max_length, by_page
        self.page_of: dict[int, int] = {}  # by cached chain
        self.chain_of: dict[int, int] = {}  # by page that is in the tree
        self.locks: dict[int, int] = {}  # by chain: requests that have committed it
        self.children: dict[int, int] = {}  # by chain: cached chains that are one page longer
        self.holders: dict[int, int] = {}  # by page: requests that have it and have not committed it
        self.running: list[Record] = []
        self.totals = dict.fromkeys(Counts._fields[:8], 0)
        self.short = 0  # pages that the call had to evict
        self._chains: dict[Any, int] = {}
        self._above: list[int] = [0]

    # Chains

    def extend_chains(self, namespace: Any, chains: list[int], tokens: list[int]) -> list[int]:
        """Append the chains of whole pages of `tokens` that are not in `chains`."""
        page, chain = self.page, chains[-1] if chains else 0
        for begin in range(len(chains) * page, len(tokens) // page * page, page):
            key = (chain or namespace, tokens[begin] if page == 1 else tuple(tokens[begin : begin + page]))
            above, chain = chain, self._chains.setdefault(key, len(self._above))
            if chain == len(self._above):
                self._above.append(above)
            chains.append(chain)
        return chains

    def prompt(self, tokens: list[int], namespace: Any) -> Prompt:
        chains = self.extend_chains(namespace, [], tokens)
        return Prompt(tokens, namespace, chains, chains[: (len(tokens) - 1) // self.page])

    def cached(self, chains: Sequence[int]) -> int:
        return leading(chains, self.page_of)

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.page)

    # Slots

    @property
    def free(self) -> int:
        return self.num_pages - len(self.chain_of) - len(self.holders)

    @property
    def available(self) -> int:
        """Pages that are free or can be evicted."""
        return self.num_pages - len(self.locks) - len(self.holders)

    @property
    def free_rows(self) -> int:
        return self.max_requests - len(self.running)

    def counts(self) -> Counts:
        evictable = len(self.chain_of) - len(self.locks)
        slots = [self.num_pages, self.free, evictable, len(self.locks), len(self.holders)]
        self.totals["running"] = len(self.running)
        return Counts(**self.totals, **dict(zip(Counts._fields[8:], (self.page * n for n in slots), strict=True)))

    def drop_evicted(self, left: set[int]) -> None:
        """Forget the cached pages that an eviction has taken. left: the pages in the tree."""
        assert left <= self.chain_of.keys(), f"pages in the tree that nobody committed: {left - self.chain_of.keys()}"
        gone = [(page, chain) for page, chain in self.chain_of.items() if page not in left]
        for page, chain in gone:
            assert chain not in self.locks, f"page {page} was evicted, but a request holds it"
            del self.page_of[chain], self.chain_of[page]
            add(self.children, self._above[chain], -1)
        for page, chain in gone:
            assert chain not in self.children, f"page {page} was evicted from before pages that are cached"
        enough = len(gone) == self.short if self.by_page else len(gone) >= self.short
        assert enough, f"{len(gone)} pages were evicted; {self.short} were needed"
        self.totals["evicted_tokens"] += len(gone) * self.page
        self.short = 0

    def learn(self, table: np.ndarray) -> None:
        """Take up the pages that requests have got: each was free. table: the page table of the cache."""
        for record in self.running:
            end = self.pages(record.length)
            if len(record.pages) == end:
                continue
            row = table[record.row, :end].tolist()
            for at in range(len(record.pages), end):
                page, lent = row[at], at * self.page < record.borrowed
                if lent and record.lender is not None:
                    expect(page, record.lender.pages[at], f"page {at} of a request that borrows")
                else:
                    assert page not in self.chain_of, f"page {page} is in the tree, and was given to a request"
                    assert page not in self.holders, f"page {page} of a request was given to another"
                    assert 0 <= page < self.num_pages, f"there is no page {page}"
                add(self.holders, page, 1)
                record.pages.append(page)

    # Begin

    def shared(self, prompt: Prompt, started: list[Record], cached: int) -> tuple[Record | None, int]:
        """Return from whom a prompt borrows, and up to which page."""
        lender, most = None, cached
        for other in started:
            if other.namespace == prompt.namespace:
                ours, theirs = prompt.key, other.chains[: (len(other.tokens) - 1) // self.page]
                common = next((at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
                common = min(len(ours), len(theirs)) if common < 0 else common
                if common > most:
                    lender, most = other, common
        return lender, most

    def slots_at_first(self, prompt: Prompt, begin: int, chunk: int | None) -> int:
        count = len(prompt.tokens)
        return count if chunk is None else min(count, begin * self.page + chunk)

    def fit_together(self, prompts: Sequence[Prompt], share: bool, chunk: int | None) -> bool:
        if len(prompts) > self.free_rows:
            return False
        needed, locked, started = 0, set(self.locks), []
        for prompt in prompts:
            cached = self.cached(prompt.key)
            locked.update(prompt.key[:cached])
            begin = self.shared(prompt, started, cached)[1] if share else cached
            needed += self.pages(self.slots_at_first(prompt, begin, chunk)) - begin
            if share:
                started.append(Record(0, 0, prompt.namespace, prompt.tokens, prompt.chains, [], 0, 0, 0))
        return needed <= self.num_pages - len(locked) - len(self.holders)

    def begin(
        self, prompts: Sequence[Prompt], found: Sequence[Found], share: bool = False, chunk: int | None = None
    ) -> list[Record]:
        """Assert that a `begin` started what it must, with what is cached; return the requests that started."""
        most = [self.cached(prompt.key) for prompt in prompts]
        fitting = [prompt for prompt in prompts if len(prompt.tokens) <= self.max_length]
        together = self.fit_together(fitting, share, chunk)
        free, left, evicts = self.free, self.available, False
        started: list[Record] = []
        for prompt, cached, one in zip(prompts, most, found, strict=True):
            if len(prompt.tokens) > self.max_length:
                expect((one.serial, one.missing), (0, 0), "a prompt that is too long")
                self.totals["refused"] += 1
                continue
            locked, known = leading(prompt.key, self.locks), together or not evicts
            if not known:  # an eviction of this call may have cut down what is cached
                least, cached = locked, min(cached, one.committed // self.page) if one.serial else locked
                assert cached >= least, "less is cached than other requests hold"
            lender, begin = None, cached
            if share and (together or self.free_rows):
                lender, begin = self.shared(prompt, started, cached)
            length = self.slots_at_first(prompt, begin, chunk)
            needed, had = self.pages(length) - begin, left - (cached - locked)
            if not one.serial:
                assert not together, "a prompt was refused, though all fit together"
                if known or not (share or chunk):
                    expect(one.missing, self.page * max(0, needed - had), "slots that are missing")
                    assert needed > had or not self.free_rows, "a prompt was refused that fits"
                self.totals["refused"] += 1
                continue
            assert self.free_rows, "more requests run than max_requests allows"
            assert together or needed <= had, "a prompt began that does not fit"
            expect((one.committed, one.cached), (cached * self.page, begin * self.page), "tokens that are cached")
            record = self._start(prompt, one, length, lender)
            record.shares = share
            started.append(record)
            if together or self.by_page or not evicts:
                self.short += max(0, needed - free)
            evicts = evicts or needed > free
            free, left = max(0, free - needed), had - needed
        return started

    def _start(self, prompt: Prompt, one: Found, length: int, lender: Record | None) -> Record:
        chains = prompt.chains[: one.committed // self.page]
        pages = [self.page_of[chain] for chain in chains]
        numbers = (length, one.committed, one.cached)
        borrowed = one.cached if lender else 0
        record = Record(
            one.row, one.serial, prompt.namespace, prompt.tokens, prompt.chains, pages, *numbers, lender, borrowed
        )
        for chain in chains:
            add(self.locks, chain, 1)
        self.running.append(record)
        for name, count in (
            ("requests", 1),
            ("prompt_tokens", len(prompt.tokens)),
            ("cached_tokens", one.committed),
            ("shared_tokens", one.cached - one.committed),
        ):
            self.totals[name] += count
        return record

    # Commit and extend

    def append(self, record: Record, tokens: list[int]) -> None:
        record.tokens = record.tokens + tokens
        self.extend_chains(record.namespace, record.chains, record.tokens)

    def commit(self, records: Sequence[Record], ends: Sequence[int]) -> set[Record]:
        """Commit requests up to `ends`, in order; return those whose next page was in the tree by then."""
        targets: dict[Record, int] = {}
        for record, end in zip(records, ends, strict=True):
            record.length = max(record.length, end)
            targets[record] = end // self.page
        changed, freed = set(), 0
        for record, target in self._with_families(targets).items():
            begin = record.committed // self.page
            if target > begin and record.chains[begin] in self.page_of:
                changed.add(record)
            for at in range(begin, target):
                chain, page = record.chains[at], record.pages[at]
                add(self.holders, page, -1)
                if chain not in self.page_of:
                    self.page_of[chain], self.chain_of[page] = page, chain
                    add(self.children, self._above[chain], 1)
                elif page not in self.holders and page not in self.chain_of:
                    freed += 1
                record.pages[at] = self.page_of[chain]
                add(self.locks, chain, 1)
            record.committed = max(record.committed, target * self.page)
            if record.borrowed <= record.committed:
                record.lender, record.borrowed = None, 0
        self.totals["duplicate_tokens"] += freed * self.page
        return changed

    def _with_families(self, targets: dict[Record, int]) -> dict[Record, int]:
        """Let a commit of one request be a commit of all that share its tokens. A lender is before its borrowers."""
        borrowers: dict[Record, list[Record]] = {}
        for record in self.running:
            if record.lender:
                borrowers.setdefault(record.lender, []).append(record)
        found: dict[Record, int] = {}
        for record, target in targets.items():
            if record in found:
                continue
            family = [root_of(record)]
            for one in family:  # grows
                family += borrowers.get(one, ())
            found.update({one: targets.get(one, 0) for one in family} if len(family) > 1 else {record: target})
        again = bool(borrowers)
        while again:
            again = False
            for record in found:
                if record.lender:
                    whole = min(max(found[record], found[record.lender]), record.borrowed // self.page)
                    for one in (record, record.lender):
                        again |= whole > found[one]
                        found[one] = max(found[one], whole)
        return found

    def extend(self, records: Sequence[Record], more: Sequence[int]) -> dict[Record, int]:
        """Give requests slots; return those that get none, each with the slots that are missing."""
        needed = [self.pages(one.length + n) - self.pages(one.length) for one, n in zip(records, more, strict=True)]
        left, short = self.available, {}
        for record, n, pages in zip(records, more, needed, strict=True):
            if pages > left:
                short[record] = (pages - left) * self.page
            else:
                left -= pages
                record.length += n
        self.short += max(0, self.available - left - self.free)
        return short

    # Fork and end

    def fork(self, record: Record, found: Sequence[tuple[int, int]]) -> list[Record]:
        """Assert that a fork of a committed request starts if it fits. found: row and serial of each, 0 if refused."""
        needed = len(found) * (self.pages(record.length) - record.committed // self.page)
        fits = needed <= self.available and len(found) <= self.free_rows
        expect([serial > 0 for _, serial in found], [fits] * len(found), "forks that run")
        if not fits:
            self.totals["refused"] += len(found)
            return []
        self.short += max(0, needed - self.free)
        committed, end = record.committed, record.committed // self.page
        forks = [
            Record(
                row, serial, record.namespace, record.tokens, [*record.chains], record.pages[:end], record.length,
                committed, committed,
            )
            for row, serial in found
        ]  # fmt: skip
        for _ in forks:
            for chain in record.chains[:end]:
                add(self.locks, chain, 1)
        self.running += forks
        return forks

    def release(self, records: Sequence[Record]) -> None:
        for record in records:
            end = record.committed // self.page
            for chain in record.chains[:end]:
                add(self.locks, chain, -1)
            for page in record.pages[end:]:
                add(self.holders, page, -1)
        gone = set(records)
        self.running = [record for record in self.running if record not in gone]


def root_of(record: Record) -> Record:
    """Return the request of a family that borrows nothing."""
    while record.lender:
        record = record.lender
    return record


def leading(chains: Sequence[int], known: dict[int, int]) -> int:
    """Return how many chains are known, up to the first that is not."""
    count = 0
    for chain in chains:
        if chain not in known:
            break
        count += 1
    return count


def add(counts: dict[int, int], key: int, by: int) -> None:
    """Count up or down; no key stays with 0."""
    count = counts.get(key, 0) + by
    if count:
        counts[key] = count
    else:
        del counts[key]
