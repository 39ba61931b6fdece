"""A random program for a PrefixCache beside its model, which looks at all slots and requests after each call."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from contextlib import nullcontext
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

from flatradix import PrefixCache, QueryError, Ragged, Requests
from flatradix.cache import home
from flatradix.cache.waiting import RequestQueue
from tests.support.prefix_model import Found, Model, Prompt, Record, expect

NAMES = (None, None, None, "a", b"b", "tenant")
ORDERS = ("fcfs", "lpm", "aged", "shortest-prefill", "dfs-weight")
LENGTHS = {1: 48, 2: 72, 16: 200, 64: 520}  # max_length, about
CALLS_A_CHECK = 300


class Configuration(NamedTuple):
    page_size: int
    num_pages: int
    max_requests: int
    max_length: int
    policy: str
    evict_by: str
    apart: bool  # tables that are copies, as for a KV cache on a GPU

    @classmethod
    def draw(cls, random: Random, page: int, apart: bool) -> Configuration:
        longest = LENGTHS[page] + random.randint(0, page)
        pages = longest // page * random.choice((1, 4, 10, 40)) // 2  # from half a request to twenty
        return cls(
            page,
            pages + random.randint(1, 9),
            random.choice((2, 5, 9, 16)),
            longest,
            random.choice(("lru", "lru", "lfu", "priority", "slru")),
            random.choice(("page", "node")),
            apart and random.random() < 0.3,
        )


class Program:
    """One cache, its model, and calls that `random` draws. counts: calls by name, and what they took.

    After a commit or an end, an index on a GPU is looked at in three of ten cases only, so that commits stay pending.
    """

    def __init__(
        self, random: Random, configuration: Configuration, device: str, kv: str, counts: Counter[str]
    ) -> None:
        self.random, self.counts, self.device = random, counts, device
        self.page = page = configuration.page_size
        slots = configuration.num_pages * page
        options = {"policy": configuration.policy, "evict_by": configuration.evict_by}
        sizes = (slots + random.randint(0, page - 1), page, configuration.max_requests, configuration.max_length)
        with patch.object(home, "apart", lambda kv: True) if configuration.apart else nullcontext():
            self.cache = PrefixCache(*sizes, kv, device, **options)
        self.configuration = configuration
        self.start_model()
        self.known: deque[list[int]] = deque([[]], maxlen=12)
        self.queue: RequestQueue | None = None
        self.waiting: dict[int, tuple[list[int], Any]] = {}
        self.done: list[str] = []
        self.odd = random.choice((0.0, 0.1, 0.5)) / page  # how often a token is not what it is in other requests
        self.with_slots = False
        self.half = random.randint(configuration.max_requests // 2, configuration.max_requests)

    def start_model(self) -> None:
        c = self.configuration
        self.model = Model(c.num_pages, c.page_size, c.max_requests, c.max_length, c.evict_by == "page")
        self.evicted = 0

    def run(self, calls: int) -> None:
        """Make so many calls, then end all requests."""
        for number in range(1, calls + 1):
            self.call(self.choose())
            if number % CALLS_A_CHECK == 0:
                self.check()
        self.done.append("the end")
        self.check()
        self.finish_these(self.model.running, everything=True)
        self.check()
        expect(self.cache.counts()[-2:], (0, 0), "slots that are protected or held at the end")

    def call(self, name: str) -> None:
        self.done.append(name)
        self.counts["calls"] += 1
        self.counts[name] += 1
        getattr(self, name)()

    def choose(self) -> str:
        running = len(self.model.running)
        if running == 0 or self.random.random() < (0.35 if running < self.half else 0.05):
            return self.random.choice(("begin", "begin", "begin", "begin_family", "probe", "queued"))
        (name,) = self.random.choices(
            ("step", "commit", "extend", "fork", "finish", "abort", "probe", "misuse", "reset"),
            (40, 20, 10, 3, 10, 3, 3, 1, 0.1),
        )
        return name

    # What is drawn

    def token(self, at: int) -> int:
        return self.random.randint(0, 4) if self.random.random() < self.odd else at * 7 % 5

    def prompt(self) -> list[int]:
        random, most = self.random, self.configuration.max_length
        stem = random.choice(self.known)
        if random.random() < 0.6:
            stem = stem[: random.randint(0, len(stem))]
        count = random.randint(1, random.choice((2, 9, 2 * self.page + 9)))
        tokens = [*stem, random.randint(0, 4), *(self.token(len(stem) + at) for at in range(1, count))]
        tokens = tokens[: most if random.random() < 0.99 else most + 5]
        self.known.append(tokens[:most])
        return tokens

    def family(self) -> list[list[int]]:
        """Return prompts with a new prefix in common; some share more of one another."""
        random, most = self.random, self.configuration.max_length
        prompts = [(self.prompt()[:most] + random.choices(range(5, 7), k=random.randint(1, 2 * self.page)))[:most]]
        while len(prompts) < random.randint(2, 5):
            stem = random.choice(prompts)
            cut = random.choice((len(stem), len(stem) - 1, random.randint(0, len(stem))))
            prompts.append((stem[:cut] + random.choices(range(5, 7), k=random.randint(1, 6)))[:most])
        return prompts

    def some(self) -> list[Record]:
        running = self.model.running
        return self.random.sample(running, self.random.randint(min(1, len(running)), len(running)))

    def requests(self, records: Sequence[Record]) -> Any:
        """Return requests as a caller may pass them: as a batch, or as views."""
        running = self.cache.running
        at = {serial: at for at, serial in enumerate(running.serials.tolist())}
        batch = running[[at[record.serial] for record in records]]
        return batch if self.random.random() < 0.6 else list(batch)

    def as_sequences(self, tokens: list[list[int]]) -> Any:
        """Return sequences as a caller may pass them."""
        kind = self.random.randint(0, 4 if all(tokens) and tokens else 2)
        if kind == 0:
            return tokens
        if kind == 1:
            return [np.array(one, self.random.choice((np.int32, np.int64))) for one in tokens]
        if kind == 2 and tokens:
            device = self.cache.tree.device if self.random.random() < 0.5 else torch.device("cpu")
            values = torch.tensor([token for one in tokens for token in one], dtype=torch.int32, device=device)
            return Ragged(values, torch.tensor(np.cumsum([0, *map(len, tokens)]), dtype=torch.int64, device=device))
        return [torch.tensor(one) if at % 2 else tuple(one) for at, one in enumerate(tokens)]

    # Calls

    def begin(self) -> None:
        random = self.random
        prompts = [self.prompt() for _ in range(random.choice((0, 1, 1, 1, 2, 3, 5)))]
        names: Any = random.choice(NAMES) if random.random() < 0.5 else random.choices(NAMES, k=len(prompts))
        share, chunk = False, None
        if random.random() < 0.3:
            chunk = random.randint(1, 2 * self.page)
        elif random.random() < 0.4:
            share = True
        self.begin_these(prompts, names, share, chunk)

    def begin_family(self) -> None:
        prompts = self.family()
        name = self.random.choice(NAMES)
        self.begin_these(prompts, [name if self.random.random() < 0.9 else None for _ in prompts], True, None)

    def begin_these(self, tokens: list[list[int]], names: Any, share: bool, chunk: int | None) -> None:
        prompts = self.prompts(tokens, names)
        priority = self.random.choice((0, self.random.randint(0, 2), [self.random.randint(0, 2) for _ in tokens]))
        requests = self.cache.begin(self.as_sequences(tokens), names, priority, share, chunk)
        self.adopt(requests, prompts, share, chunk)
        self.look()

    def prompts(self, tokens: list[list[int]], names: Any) -> list[Prompt]:
        spread = names if isinstance(names, list) else [names] * len(tokens)
        return [self.model.prompt(one, name) for one, name in zip(tokens, spread, strict=True)]

    def adopt(self, requests: Requests, prompts: list[Prompt], share: bool, chunk: int | None) -> None:
        rows, serials = requests.rows.tolist(), requests.serials.tolist()
        numbers = zip(rows, serials, requests.cached_lengths.tolist(), requests.committed.tolist(), strict=True)
        found = [Found(*one, 0 if one[1] else requests[at].missing) for at, one in enumerate(numbers)]
        started = self.model.begin(prompts, found, share, chunk)
        self.counts["prompts"] += len(prompts)
        self.counts["refused"] += len(prompts) - len(started)
        self.counts["borrowed"] += sum(record.lender is not None for record in started)

    def queued(self) -> None:
        """Add prompts to a queue, and begin those of a plan: all of them start."""
        random = self.random
        if self.queue is None:
            self.queue = self.cache.queue(keep=random.random() < 0.5)
        tokens, name = (
            [self.prompt()[: self.configuration.max_length] for _ in range(random.randint(1, 3))],
            random.choice(NAMES),
        )
        for id, one in zip(self.queue.add(tokens, name).tolist(), tokens, strict=True):
            self.waiting[id] = one, name
        share = random.random() < 0.3
        budget = random.choice((None, 20 * self.page))
        requests, ids = self.queue.begin(
            random.choice(ORDERS), token_budget=budget, skip=random.random() < 0.5, share=share
        )
        begun = [self.waiting.pop(id) for id in ids.tolist()]
        self.adopt(requests, self.prompts([one for one, _ in begun], [name for _, name in begun]), share, None)
        if len(self.waiting) > 8:
            self.queue.remove([*self.waiting])
            self.waiting.clear()
        self.look()

    def probe(self) -> None:
        tokens = [self.prompt() for _ in range(self.random.randint(0, 3))]
        names = self.random.choices(NAMES, k=len(tokens))
        found = self.cache.probe(self.as_sequences(tokens), names)
        model, page = self.model, self.page
        for at, prompt in enumerate(self.prompts(tokens, names)):
            cached, locked = model.cached(prompt.key), len([chain for chain in prompt.key if chain in model.locks])
            needed = model.pages(len(prompt.tokens)) - cached
            fits = needed <= model.available - (cached - locked) and model.free_rows > 0
            wanted = cached * page, needed * page, fits and len(prompt.tokens) <= model.max_length
            expect((found.cached_lengths[at], found.needed_slots[at], found.fits[at]), wanted, "what a probe finds")
        self.look()

    def added(self, records: Sequence[Record], most: int) -> list[list[int]]:
        """Return new tokens for requests, up to `most` each, as many as can be known."""
        room = self.configuration.max_length + 1
        found = []
        for record in records:
            count = min(self.random.randint(0, most), max(0, room - len(record.tokens)))
            found.append([self.token(len(record.tokens) + at) for at in range(count)])
        return found

    def ends(self, records: Sequence[Record]) -> list[int]:
        """Return how many tokens of each are computed: up to the end of its last page."""
        found = []
        for record in records:
            slots = min(self.model.pages(record.length) * self.page, self.configuration.max_length)
            most = min(len(record.tokens), slots)
            found.append(most if self.random.random() < 0.5 else self.random.randint(0, most))
        return found

    def commit(self) -> None:
        records = self.some()
        added = self.added(records, 2) if self.random.random() < 0.5 else None
        requests = self.requests(records)
        for record, tokens in zip(records, added or (), strict=False):
            self.model.append(record, tokens)
        ends = self.ends(records) if self.random.random() < 0.7 else None
        up_to = ends[0] if ends and len(set(ends)) == 1 else ends
        changed = self.cache.commit(requests, up_to, added and self.as_sequences(added))
        self.committed(records, ends or self.all_of(records), changed)
        self.look_later()

    def all_of(self, records: Sequence[Record]) -> list[int]:
        return [min(len(record.tokens), record.length) for record in records]

    def committed(self, records: Sequence[Record], ends: Sequence[int], changed: Requests | None) -> None:
        """Commit in the model. changed: the requests that the cache says have other slots now."""
        expected = {record.serial for record in self.model.commit(records, ends)}
        if changed is None:
            return
        told = set(changed.serials.tolist())
        if self.device == "cpu":
            expect(told, expected, "requests whose slots were replaced")
        else:
            assert told >= expected, f"slots of {expected - told} were replaced, but a commit does not tell"

    def step(self) -> None:
        """Decode requests, most of which have all slots that they need."""
        random, most = self.random, self.configuration.max_length
        records = [record for record in self.some() if len(record.tokens) <= most]
        n: Any = random.choice((1, 1, 1, 0, 3, [random.randint(0, 2) for _ in records]))
        more = n if isinstance(n, list) else [n] * len(records)
        fits = [record.length + count <= most for record, count in zip(records, more, strict=True)]
        records = [record for record, fit in zip(records, fits, strict=True) if fit]
        more = [count for count, fit in zip(more, fits, strict=True) if fit]
        requests = self.requests(records)
        if random.random() < 0.8:
            flat = [self.token(len(record.tokens)) for record in records]
            tokens: Any = random.choice((flat, np.array(flat, np.int64), torch.tensor(flat, dtype=torch.int32)))
            added = [[token] for token in flat]
        else:
            added = [one or [1] for one in self.added(records, 3)]
            tokens = self.as_sequences(added)
        short, changed = self.cache.step(requests, tokens, more if isinstance(n, list) else n)
        for record, new in zip(records, added, strict=True):
            self.model.append(record, new)
        ends = [min(len(record.tokens) - 1, record.length) for record in records]
        self.committed(records, ends, changed)
        self.extended(records, more, short)
        self.counts["steps of a request"] += len(records)
        self.look()

    def extend(self) -> None:
        most = self.configuration.max_length
        n = self.random.choice((0, 1, 1, 2, self.page))
        records = [record for record in self.some() if record.length + n <= most]
        more: Any = [self.random.randint(0, n) for _ in records] if self.random.random() < 0.3 else n
        short = self.cache.extend(self.requests(records), more)
        self.extended(records, more if isinstance(more, list) else [more] * len(records), short)
        self.look()

    def extended(self, records: Sequence[Record], more: Sequence[int], short: Sequence[Any]) -> None:
        wanted = {record.serial: missing for record, missing in self.model.extend(records, more).items()}
        expect({request.serial: request.missing for request in short}, wanted, "requests that got no slots")
        self.counts["short"] += len(wanted)

    def fork(self) -> None:
        record, n = self.random.choice(self.model.running), self.random.randint(1, 3)
        forks, copies = self.cache.fork(self.requests([record])[0], n)
        self.committed([record], self.all_of([record]), None)
        started = self.model.fork(record, [*zip(forks.rows.tolist(), forks.serials.tolist(), strict=True)])
        self.counts["forks"] += len(started)
        self.look()
        begin = record.committed // self.page
        pairs = [list(pair) for one in started for pair in zip(record.pages[begin:], one.pages[begin:], strict=True)]
        expect(copies.tolist(), pairs, "pages to copy for a fork")

    def finish(self) -> None:
        self.finish_these(self.to_end())

    def to_end(self) -> list[Record]:
        return self.some() if self.random.random() < 0.2 else self.some()[:2]

    def finish_these(self, records: Sequence[Record], everything: bool = False) -> None:
        records = [*records]
        requests = self.requests(records)
        added = self.added(records, 2)
        for record, tokens in zip(records, added, strict=True):
            self.model.append(record, tokens)
            self.known.append(record.tokens[: self.configuration.max_length])
        ends = None if everything or self.random.random() < 0.6 else self.ends(records)
        self.cache.finish(requests, ends, added, touch=self.random.random() < 0.3)
        self.committed(records, ends or self.all_of(records), None)
        self.model.release(records)
        self.look_after_end()

    def abort(self) -> None:
        records = self.to_end()
        self.cache.abort(self.requests(records), touch=self.random.random() < 0.3)
        self.model.release(records)
        self.look_after_end()

    def reset(self) -> None:
        self.cache.reset()
        self.start_model()
        self.look()

    def misuse(self) -> None:
        """Make calls that are refused, and change nothing."""
        record = self.random.choice(self.model.running)
        request = self.requests([record])[0]
        most = self.configuration.max_length
        with pytest.raises(QueryError, match="is there twice"):
            self.cache.commit([request, request])
        with pytest.raises(QueryError, match="more are asked for"):
            self.cache.extend([request], most + 1 - record.length)
        with pytest.raises(QueryError, match="tokens computed"):
            self.cache.finish([request], most + 1)
        with pytest.raises(QueryError, match=r"is outside \[0, "):
            self.cache.begin([[1, 2], [3, -1]])
        with pytest.raises(QueryError, match="the prompt is empty"):
            self.cache.probe([[1], []])
        self.look()

    # Looks

    def table(self) -> np.ndarray:
        found: np.ndarray = self.cache.page_table.cpu().numpy()
        return found

    def look_later(self) -> None:
        if self.device == "cpu" or self.random.random() < 0.3:
            self.look()

    def look_after_end(self) -> None:
        """Look at once if requests lend: an heir has to be found."""
        if any(record.lender for record in self.model.running):
            self.look()
        else:
            self.look_later()

    def look(self) -> None:
        """Compare all slots by state, all counters, and the numbers and pages of each request."""
        cache, model = self.cache, self.model
        counts = cache.counts()
        expect(counts.free + counts.evictable + counts.protected + counts.held, counts.slots, "slots in all")
        if counts.evicted_tokens != self.evicted:
            self.counts["evicted pages"] += (counts.evicted_tokens - self.evicted) // self.page
            self.evicted = counts.evicted_tokens
            model.drop_evicted(self.cached_pages())
        expect(model.short, 0, "pages that had to be evicted, but were not")
        table = self.table()
        model.learn(table)
        expect(counts, model.counts(), "counts")
        running = cache.running
        self.update_loans(running)
        records = model.running
        for name, wanted in (
            ("serials", [record.serial for record in records]),
            ("rows", [record.row for record in records]),
            ("num_tokens", [len(record.tokens) for record in records]),
            ("lengths", [record.length for record in records]),
            ("committed", [record.committed for record in records]),
            ("cached_lengths", [record.cached for record in records]),
        ):
            expect(getattr(running, name).tolist(), wanted, f"{name} of the running requests")
        for record in records:
            expect(table[record.row, : len(record.pages)].tolist(), record.pages, f"pages of row {record.row}")
        self.counts["looks"] += 1

    def cached_pages(self) -> set[int]:
        """Return the pages that are in the tree."""
        content = self.cache.tree.content()
        live = content.live()
        begins, lengths = content.column("start")[live].tolist(), content.column("length")[live].tolist()
        slots = [
            content.slots[begin : begin + length : self.page] for begin, length in zip(begins, lengths, strict=True)
        ]
        return set((np.concatenate(slots) // self.page).tolist()) if slots else set()

    def update_loans(self, running: Requests) -> None:
        """Read who borrows from whom, and assert that both have the same tokens and pages."""
        by_serial = {record.serial: record for record in self.model.running}
        for at, record in enumerate(self.model.running):
            if not record.shares:
                continue
            view = running[at]
            lender = view.lender
            record.lender, record.borrowed = lender and by_serial[lender.serial], view.borrowed
            pages = record.borrowed // self.page
            if record.lender is not None:
                self.counts["loans"] += 1
                expect(record.pages[:pages], record.lender.pages[:pages], "pages of a request that borrows")
                expect(record.chains[:pages], record.lender.chains[:pages], "tokens that are borrowed")
            elif record.borrowed:
                raise AssertionError(f"{record.borrowed} tokens are borrowed from nobody")
            # Of what a lender that ended did not commit, its heir has to compute all that nobody else lends.
            record.cached = min(record.cached, max(record.borrowed, record.committed))

    def check(self) -> None:
        """Run the cache's own checks, and compare tokens and slots with what requests say of them."""
        self.look()
        self.cache.check()
        for record, request in zip(self.model.running, self.cache.running, strict=True):
            expect(request.tokens.tolist(), record.tokens, f"tokens of row {record.row}")
            slots = [page * self.page + at for page in record.pages for at in range(self.page)]
            expect(request.slots.tolist(), slots[: record.length], f"slots of row {record.row}")
        if self.with_slots:
            for record in self.model.running:
                slots = [page * self.page + at for page in record.pages for at in range(self.page)]
                expect(
                    self.cache.table[record.row, : len(slots)].tolist(), slots, f"row {record.row} of the slot table"
                )
        self.with_slots = self.with_slots or self.random.random() < 0.3
        self.counts["checks"] += 1
