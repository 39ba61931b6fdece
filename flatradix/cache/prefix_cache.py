"""PrefixCache: KV slots and the life of requests over a RadixTree, for an engine without its own slot allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from flatradix.cache import home, recover, share
from flatradix.cache.columns import Columns
from flatradix.cache.counts import Counts
from flatradix.cache.input import (
    Prompts,
    computed_ends,
    numbers_of,
    read_growth,
    read_prompts,
    read_tokens,
    refuse_long,
    refuse_token,
    rows_of,
)
from flatradix.cache.recover import UnderWay
from flatradix.cache.requests import Request, Requests
from flatradix.cache.share import Loan, Loans, Sharing
from flatradix.errors import QueryError
from flatradix.index import public_call, refuse_reentry
from flatradix.inputs import devices
from flatradix.inputs.arguments import per_query
from flatradix.inputs.policy import Policy
from flatradix.inputs.sequences import Batch
from flatradix.kernels import cpu
from flatradix.layout import running
from flatradix.layout.handles import ROW_MASK
from flatradix.layout.numbers import MAX_UNITS
from flatradix.results import Places
from flatradix.tree import RadixTree

if TYPE_CHECKING:
    from flatradix.cache.waiting import RequestQueue


class _Grant(NamedTuple):
    """What prompts get that begin, int64 [B]: rows, slots for `lengths` tokens, and pages from `begins` to `ends`.

    Of the tokens before `begins`, `cached` are cached; the others are borrowed as `loans` say.
    """

    rows: np.ndarray
    cached: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray
    loans: dict[int, Loan]


class Step(NamedTuple):
    """What `step` returns. short: requests that got no slot. changed: those whose slots were replaced.

    With an index on a GPU, the host does not know which were: `changed` has all that may be.
    """

    short: list[Request]
    changed: Requests


class Probe(NamedTuple):
    """What a `begin` would find now. cached_lengths, needed_slots: int64 [B]. fits: bool [B], each prompt alone."""

    cached_lengths: np.ndarray
    needed_slots: np.ndarray
    fits: np.ndarray


class _Lack(NamedTuple):
    """Why prompts do not fit: slots that are needed, and slots that can be had."""

    needed: int
    left: int


_ALL: Any = slice(None)
F = TypeVar("F", bound=Callable[..., Any])


def _repaired(method: F) -> F:
    """Wrap a public method: repair the cache before the method if needed, and after the method if it raises.

    Until the method records its operation in `_open`, it only reads.
    """

    @wraps(method)
    def call(self: PrefixCache, *arguments: Any, **keywords: Any) -> Any:
        if self._open is not None:
            self._recover()
        self._open = recover.READING
        try:
            result = method(self, *arguments, **keywords)
            self._open = None
            return result
        except BaseException:
            if self._open is not None:
                with suppress(Exception):  # then the next call tries again
                    self._recover()
            raise

    return public_call(call)  # type: ignore[return-value]


class PrefixCache:
    """The KV slots of an engine, and the tokens that they hold.

    The calls of an engine: `begin`, `extend`, `commit`, `finish` and `abort`; `step` is a commit and an extend of
    requests that decode. Each takes a batch of requests: what `begin` returned or a part of it, `running`, or any
    sequence of `Request`. A batch costs a fixed number of calls of compiled code, however large it is.

    The engine owns the KV memory: in each layer, space for the keys and values of `num_slots` tokens. The cache decides
    which slot each token has.

    num_slots: KV slots, cut down to whole pages. page_size: slots in a page; requests share whole pages only. An engine
    may have larger or smaller pages of its own.
    max_requests: the most requests that run at once. max_length: the most tokens of a request, prompt and output.
    kv_device: the device of the KV cache, and so of the tables.
    device: the device of the index. "cpu", the default, serves a KV cache on a GPU without waiting for the GPU.
    policy: what is evicted first, as for RadixTree.
    evict_by: "page" or "node", as for RadixTree. By page, no more pages are evicted than are needed.

    columns: the state of the running requests; not to be changed.

    All work on a GPU goes to torch's current stream. If a forward pass runs on another stream, wait for it before a
    `commit`, `finish` or `abort` of a request that it reads.

    After a call that raises, every slot is exactly one of free, cached or held, and every lock belongs to a request.
    This holds even if a signal handler or a lack of memory interrupted the call: the cache is then repaired, at once or
    in the next call, in O(slots). An interrupted `begin` has begun nothing. Requests of any other interrupted call are
    all as before the call, or all as after it: `num_tokens`, `committed` and `state` tell which. A call from a signal
    handler within another call raises RuntimeError.

    Not thread-safe. Raises ValueError for arguments out of range, DeviceUnavailableError.
    """

    def __init__(
        self,
        num_slots: int,
        page_size: int = 1,
        max_requests: int = 256,
        max_length: int = 8192,
        kv_device: str | torch.device = "cpu",
        device: str | torch.device = "cpu",
        policy: str | Policy = "lru",
        evict_by: str = "page",
    ) -> None:
        for name, value in (("page_size", page_size), ("max_requests", max_requests), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not page_size <= num_slots <= MAX_UNITS:
            raise ValueError(f"num_slots must be from one page ({page_size}) to {MAX_UNITS}, not {num_slots}")
        self.page_size = page_size
        self.max_length = max_length
        self.max_requests = max_requests
        kv = torch.empty(0, device=kv_device).device  # with its index
        slots = num_slots // page_size * page_size
        index = devices.preferred(device)
        self.tree = RadixTree(slots, page_size, index, policy, check_slots=False, evict_by=evict_by)
        with torch.inference_mode(False):  # else the tensors would be inference tensors forever
            self._pages = home.make_pages(self.tree, slots, max_requests, self._in_pages(max_length), kv)
        self._open: UnderWay | None = None  # the call that has begun and not ended
        self._serial = 1  # of the next request
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        self.columns = Columns(self.max_requests)
        self._views: dict[int, Request] = {}  # of running requests, by row
        self._free_rows = list(range(self.max_requests - 1, -1, -1))
        self._loans: Loans = {}
        self._begun = self._refused = self._prompt = self._cached = self._evicted = self._shared = 0
        self._duplicates_before = self._pages.duplicates

    def _in_pages(self, tokens: Any) -> Any:
        """Round numbers of tokens up to whole pages."""
        return -(-tokens // self.page_size) * self.page_size

    @property
    def kv_device(self) -> torch.device:
        return self._pages.kv_device

    @property
    def page_table(self) -> torch.Tensor:
        """int32 [max_requests, max_length in pages] on kv_device: the KV pages of each running request, in its row."""
        return self._pages.page_table

    @property
    def table(self) -> torch.Tensor:
        """int32 [max_requests, max_length in whole pages] on kv_device: the KV slots of each running request.

        Made when it is first asked for, and kept up from then on: an engine that wants pages alone pays nothing for it.
        """
        return self._pages.slot_table()

    @property
    def running(self) -> Requests:
        """The running requests, the oldest first."""
        rows = np.flatnonzero(self.columns.serial)
        rows = rows[np.argsort(self.columns.serial[rows])]
        return self._batch(rows)

    def _batch(self, rows: np.ndarray) -> Requests:
        return Requests(self, rows, self.columns.serial[rows])

    # For views

    def view(self, row: int, serial: int) -> Request:
        """Return the view of a request: always the same object while it runs."""
        view = self._views.get(row)
        if view is not None and view.serial == serial:
            return view
        if self.columns.serial[row] != serial:
            return Request(self, -1, serial, None, 0)
        view = Request(self, row, serial, self.columns.names[row], int(self.columns.priority[row]))
        self._views[row] = view
        return view

    def _end_views(self) -> None:
        """Let the views of requests that have ended keep their numbers, before their rows are used again."""
        serial = self.columns.serial
        for row in [row for row, view in self._views.items() if serial[row] != view.serial]:
            self._views[row].end()
            del self._views[row]

    def tokens_of(self, row: int) -> np.ndarray:
        """Return the known tokens of a row, int32: those that were cached from the tree, the others from the row."""
        rows, columns = np.array([row]), self.columns
        kept, known = columns.kept[rows], columns.num_tokens[rows]
        cached = self.tree.tokens(self._pages.places(rows, columns.committed[rows]))
        return np.concatenate(
            [cached.values[: int(kept[0])].cpu().numpy(), self._pages.own_tokens(row, int(kept[0]), int(known[0]))]
        )

    def pages_of(self, row: int, length: int) -> torch.Tensor:
        return self._pages.page_table[row, : -(-length // self.page_size)]

    def slots_of(self, row: int, length: int) -> torch.Tensor:
        return self._pages.slots_of_row(row)[:length]

    def loan_of(self, request: Request) -> tuple[Request | None, int]:
        """Return what `Request.lender` and `Request.borrowed` say."""
        loan = self._loans.get(request.row)
        if loan is None:
            return None, 0
        serial = int(self.columns.serial[loan.lender])
        return self.view(loan.lender, serial) if serial else None, loan.borrowed

    # Interrupted calls

    def _recover(self) -> None:
        """Repair the cache after an interrupted call. Raises RuntimeError if that call is still under way."""
        refuse_reentry(self)
        cut = self._open
        assert cut is not None
        if cut is recover.READING:
            self._open = None
            return
        columns, pages = self.columns, self._pages
        rows = recover.end_begun(cut, columns)
        self._end_views()
        places, committed = recover.find_committed(self.tree, pages, columns, rows, self._loans)
        ends = np.zeros_like(columns.committed)
        ends[rows] = committed
        recover.forget_tokens(cut, columns, ends)
        recover.lock_exactly(self.tree, places)
        pages.set_places(rows, places)
        pages.write_cached(places, rows)
        columns.committed[rows] = committed
        columns.length[rows] = np.maximum(columns.length[rows], committed)
        self._settle_loans()
        self._inherit(share.end_others(self._loans, set(rows.tolist())))
        self._free_rows = [row for row in range(self.max_requests - 1, -1, -1) if columns.serial[row] == 0]
        pages.set_free(recover.free_pages(self.tree, pages, columns, rows))
        pages.copy_rows(rows, columns.length[rows])
        self._open = None

    # Begin

    @_repaired
    def begin(
        self,
        prompts: Any,
        namespaces: Any = None,
        priority: Any = 0,
        share: bool = False,
        chunk: int | None = None,
    ) -> Requests:
        """Start requests: find the cached part of each prompt, lock it, and allocate slots for the rest.

        prompts: a list of token sequences (lists, `array`, numpy, tensors), or a Ragged, none of them empty.
        namespaces, priority: one for all, or a list with one for each prompt.
        share: let new tokens that several of these prompts share have the same slots, those of the first of these
            prompts. Only for engines that compute all of these prompts in one forward pass, each as a whole, and that
            in each layer write all KV before they read any: see docs/engine.md. Without `share`, each request has slots
            of its own for all that is not cached.
        chunk: allocate slots for at most this many tokens that are not cached, for a first chunk of the prefill;
            `extend` allocates more. None allocates for the whole prompt.

        At least the last token of each prompt is left to compute, because its logits are needed.

        Returns a batch of B requests. Of each, the first `cached_length` tokens need not be computed, and `length`
        tokens have slots. A request is refused if it does not fit even after all evictable tokens are evicted, or if
        the prompt is longer than `max_length`. A refused request holds nothing: `refusal` says why, `missing` how many
        slots were lacking. Pass its prompt again when other requests have ended. Requests are served in order; a
        smaller request after a refused request can start.

        With `share`, what a prompt shares with an earlier one of the call, in whole pages and without the last token of
        either, is part of its `cached_length`. After an `abort` or `finish` of one of these requests, read the
        `cached_length` of the others again: it falls where another request has to compute what the ended one lent.

        Evicts as needed. O(prompt tokens); with `share`, O(log B) comparisons of prompts in addition for each of B.
        With an index on a GPU it waits for the device. Raises QueryError and ValueError with nothing changed. If a
        policy function raises or a device has no memory left, the new requests hold nothing.
        """
        found = read_prompts(prompts, namespaces, priority, self.tree.device)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {chunk}")
        self._open = UnderWay(recover.BEGIN, serial=self._serial)
        self._give_back_duplicates()
        self.tree.raise_pending()
        sharing = Sharing(self.page_size) if share else None
        rows = np.full(len(found), -1)
        refused = self._refuse_long(found)
        fitting = np.array([query for query in range(len(found)) if query not in refused]) if refused else _ALL
        # One by one if they do not fit together: the cached part of a refused request must stay evictable for others.
        groups = [fitting] if len(found) > len(refused) else []
        while groups:
            group = groups.pop(0)
            some = found if group is _ALL else found.some(group)
            given = self._start(some, chunk, sharing)
            if not isinstance(given, _Lack):
                rows[group] = given
            elif len(some) > 1:
                groups = [np.array([query]) for query in np.arange(len(found))[group]]
            else:
                refused[int(np.arange(len(found))[group][0])] = self._refuse(some, given)
        self._refused += len(refused)
        return Requests(self, rows, np.where(rows >= 0, self.columns.serial[rows], 0), refused)

    def _refuse_long(self, prompts: Prompts) -> dict[int, Request]:
        """Return a refused request for each prompt that is too long."""
        long = np.flatnonzero(prompts.counts > self.max_length).tolist()
        return {query: self._refuse(prompts.some(np.array([query])), _Lack(0, 0)) for query in long}

    def _refuse(self, prompt: Prompts, lack: _Lack) -> Request:
        """Return the request of a single prompt that is refused."""
        count = int(prompt.counts[0])
        missing = max(lack.needed - lack.left, 0)
        if count > self.max_length:
            text = f"{count} tokens are more than max_length {self.max_length}: cut the prompt"
        elif missing:
            text = f"{lack.needed} slots are needed and {lack.left} can be had: {missing} too few"
        else:
            text = f"all {self.max_requests} requests that max_requests allows are running"
        return Request.refused(self, count, (prompt.name(0), int(prompt.priorities[0])), text, missing)

    def _start(self, prompts: Prompts, chunk: int | None, sharing: Sharing | None) -> np.ndarray | _Lack:
        """Start prompts if all of them fit, and return their rows, int64 [B]. Otherwise they hold nothing.

        sharing: the prompts of this call that have started.
        """
        free = len(self._free_rows) - len(prompts)
        if free < 0 and len(prompts) > 1:
            return _Lack(0, 0)
        rows = np.array(self._free_rows[free:] if free >= 0 else [0], np.int64)
        # The match does not touch: a prompt that is refused again and again would keep its cached part from being
        # evicted. The first commit touches.
        place, cached = self._pages.find_cached(self.tree, prompts, lock=True)
        begins, loans = cached, {}
        if sharing is not None:
            loans = _loans_of(sharing, prompts, rows, cached)
            begins = cached.copy()
            for query, row in enumerate(rows.tolist()):
                begins[query] = loans[row].borrowed if row in loans else begins[query]
        lengths = prompts.counts if chunk is None else np.minimum(prompts.counts, begins + chunk)
        grant = _Grant(rows, cached, begins, lengths, self._in_pages(lengths), loans)
        needed = int((grant.ends - begins).sum())
        left = self._pages.free_slots
        if needed > left:
            left += self.tree.evictable_tokens
        if needed <= left and free >= 0:
            try:
                self._admit(prompts, place, grant)
            except QueryError:
                self.tree.unlock(place)
                raise
            return rows
        self.tree.unlock(place)
        if sharing is not None:
            for query, row in enumerate(rows.tolist()):
                sharing.take_back(row, prompts.name(query))
        return _Lack(needed, left)

    def _admit(self, prompts: Prompts, place: Places, grant: _Grant) -> None:
        """Give rows, tokens and pages to prompts that fit. Raises QueryError for a bad token; then nothing is given."""
        pages, columns = self._pages, self.columns
        rows, cached, begins, lengths, ends, loans = grant
        pages.store_prompts(rows, prompts, cached)
        self._make_space(int((ends - begins).sum()))
        pages.write_cached(place, rows)
        pages.take(rows, begins, ends)
        for (lender, begin, end), borrowers in share.copies(
            loans, dict(zip(rows.tolist(), cached.tolist(), strict=True))
        ).items():
            pages.copy(lender, np.array(borrowers), begin, end)
        pages.set_places(rows, place)
        columns.num_tokens[rows], columns.length[rows], columns.kept[rows] = prompts.counts, lengths, cached
        columns.cached[rows], columns.committed[rows] = begins, cached
        columns.counted[rows] = columns.missing[rows] = 0
        columns.priority[rows] = prompts.priorities
        columns.set_names(rows, prompts.names)
        del self._free_rows[len(self._free_rows) - len(rows) :]
        self._serial += len(rows)
        columns.serial[rows] = np.arange(self._serial - len(rows), self._serial)
        if loans:
            self._loans = {**self._loans, **loans}
        self._begun += len(rows)
        self._prompt += int(prompts.counts.sum())
        self._cached += int(cached.sum())
        self._shared += int((begins - cached).sum())

    def _make_space(self, slots: int) -> None:
        """Evict until so many slots are free. Enough must be free or evictable."""
        short = slots - self._pages.free_slots
        if short > 0:
            evicted = self.tree.evict(short)
            self._pages.give_evicted(evicted)
            self._evicted += evicted.num_tokens

    # Look without taking

    @property
    def free_slots(self) -> int:
        """Slots that are free without an eviction. O(1). Duplicates of pending commits are not counted yet."""
        return self._pages.free_slots

    @property
    def available_slots(self) -> int:
        """Slots that are free, or held by tokens that can be evicted. O(1). Waits for an index on a GPU."""
        return self._pages.free_slots + self.tree.evictable_tokens

    @_repaired
    def probe(self, prompts: Any, namespaces: Any = None) -> Probe:
        """Return what a `begin` of these prompts would find now. Takes nothing, and leaves the order of eviction.

        prompts, namespaces: as for `begin`. cached_lengths of the result: tokens that need not be computed.
        needed_slots: slots for the rest, in whole pages. fits: whether a `begin` of the prompt alone would start it.

        O(prompt tokens). Raises QueryError and ValueError.
        """
        found = read_prompts(prompts, namespaces, 0, self.tree.device)
        self._open = UnderWay(recover.OTHER)
        self._give_back_duplicates()
        if len(found) == 0:
            return Probe(found.counts, found.counts, found.counts > 0)
        places, cached = self._pages.find_cached(self.tree, found, lock=False)
        needed = self._in_pages(found.counts) - cached
        paths, protected = self.tree.index.paths(), np.empty_like(cached)
        rows = places.handles.cpu().numpy() & ROW_MASK
        cpu.newly_protected(*paths[:4], rows, cached, protected)
        fits = (needed <= self._pages.free_slots + paths.evictable - protected) & (found.counts <= self.max_length)
        return Probe(cached, needed, fits & bool(self._free_rows))

    # Waiting prompts

    def queue(self, keep: bool = True) -> RequestQueue:
        """Return a queue for the prompts that wait for this cache: it orders them, and begins those that fit.

        keep: let evictions spare what waiting prompts would find cached, as for `WaitingQueue`. The queue keeps as long
        as it lives. Raises ValueError if another queue keeps already.
        """
        from flatradix.cache.waiting import RequestQueue  # not wanted by most

        return RequestQueue(self, keep)

    @_repaired
    def free_space(self) -> tuple[int, int]:
        """Return how many slots are free without an eviction, and how many more requests can run.

        Waits for an index on a GPU if commits are pending.
        """
        self._open = UnderWay(recover.OTHER)
        self._give_back_duplicates()
        return self._pages.free_slots, len(self._free_rows)

    # Extend

    @_repaired
    def extend(self, requests: Sequence[Request], n: int | Sequence[int] = 1) -> list[Request]:
        """Give each running request slots for `n` more tokens, as for decoding. n: one number, or a list with one each.

        Returns the requests that did not fit, in order. `missing` of each says how many slots were lacking; nothing
        else has changed for these requests. Abort or finish some request, and try again. All other requests have grown,
        including `length` and `slots`.

        Evicts as needed. O(requests). It waits for the device only if the index is on a GPU and too few slots are free.
        Raises QueryError (a request that is not running, or would be longer than max_length) with nothing changed.
        """
        rows = rows_of(self, "extend", requests)
        more = read_growth(self.columns, rows, n, self.max_length)
        self._open = recover.begun(recover.EXTEND, self.columns, rows)
        return self._extend(rows, more)

    def _extend(self, rows: np.ndarray, more: np.ndarray) -> list[Request]:
        if self._pages.grow(self.columns, rows, more):
            return []
        lengths = self.columns.length[rows]
        begins, ends = self._in_pages(lengths), self._in_pages(lengths + more)
        needed = ends - begins
        left = self._pages.free_slots
        if needed.sum() > left:
            self._give_back_duplicates()
            left = self._pages.free_slots + self.tree.evictable_tokens
        missing = np.zeros(len(rows), np.int64)
        if needed.sum() > left:
            for query, slots in enumerate(needed.tolist()):
                missing[query] = max(slots - left, 0)
                left -= slots if slots <= left else 0
        fits = missing == 0
        grow = fits & (needed > 0)
        if grow.any():
            self._make_space(int(needed[grow].sum()))
            self._pages.take(rows[grow], begins[grow], ends[grow])
        self.columns.missing[rows] = missing
        self.columns.length[rows] = lengths + np.where(fits, more, 0)
        return [] if fits.all() else list(self._batch(rows[~fits]))

    # Commit

    @_repaired
    def commit(self, requests: Sequence[Request], up_to: Any = None, tokens: Any = None) -> Requests:
        """Declare the KV of requests as computed, so that others can reuse it: after a chunk of a prefill, or any time.

        up_to: how many tokens of each request are computed: one number, or a list. None means all tokens that are known
            and have slots. Pass `up_to` if fewer are computed: in the middle of a prefill, or if tokens are only
            proposed. It may go up to the end of a request's last page.
        tokens: the tokens that each request has generated since, if any: a list of sequences, a Ragged, [B, n], or [B]
            with one for each. They are known from now on.

        Only whole pages go to the tree. If another request has committed the same tokens meanwhile, its slots replace
        the slots of this request, which become free. Returns the requests whose slots were replaced: read their `slots`
        again. With an index on a GPU, the host does not know: those that committed a page. What requests share through
        `begin(share=True)` is committed for all of them, so others than `requests` may be among them.

        The commit continues from the place that the request holds: O(new tokens + nodes on the path). With an index on
        a GPU it does not wait for the device, except when more than 64 commits are pending since the last call that
        waited. Raises QueryError and ValueError with nothing changed.
        """
        rows = rows_of(self, "commit", requests)
        added, known = self._read_added("commit", rows, tokens)
        ends = computed_ends("commit", self.columns, rows, known, up_to, self.page_size)
        self._store_added(rows, added)
        self._open = recover.begun(recover.COMMIT, self.columns, rows)
        return self._commit(rows, known, ends)

    def _read_added(self, operation: str, rows: np.ndarray, tokens: Any) -> tuple[Batch, np.ndarray]:
        """Return the new tokens of each request, and how many it will have in all, int64 [B]."""
        added = read_tokens(operation, rows, tokens)
        known: np.ndarray = self.columns.num_tokens[rows] + added.counts
        refuse_long(operation, known, self._in_pages(self.max_length))
        return added, known

    def _store_added(self, rows: np.ndarray, added: Batch) -> None:
        """Write new tokens behind those that are known, where nobody reads yet. Raises QueryError for a bad token."""
        if added.owner is not None:
            begins = self.columns.num_tokens[rows]
            query, position = self._pages.store_tokens(rows, begins, added, np.zeros_like(rows))
            if query >= 0:
                refuse_token(added, query, position)

    def _commit(self, rows: np.ndarray, known: np.ndarray, ends: np.ndarray) -> Requests:
        """Let requests know `known` tokens, and insert the whole pages of the first `ends` that are not in the tree."""
        columns = self.columns
        if self._loans:
            rows, known, ends = self._with_families(rows, known, ends)
        chosen = np.empty((3, len(rows)), np.int64)
        count = cpu.begin_commit(columns.data, rows, known, ends, self.page_size, chosen)
        if count == 0:
            return self._batch(rows[:0])
        rows, begins, ends = chosen[:, :count]
        changed = self._insert(rows, begins, ends)
        return self._batch(rows if changed is None else rows[changed])

    def _with_families(
        self, rows: np.ndarray, known: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Add the requests that share what is committed. Every lender stands before its borrowers."""
        given = dict(zip(rows.tolist(), zip(known.tolist(), ends.tolist(), strict=True), strict=True))
        columns, page = self.columns, self.page_size
        whole = share.together(self._loans, {row: end // page * page for row, (_, end) in given.items()})
        found = {row: end for row, end in whole.items() if row in given or end > columns.committed[row]}
        all_rows = np.array(list(found), np.int64)
        knows = [given[row][0] if row in given else int(columns.num_tokens[row]) for row in found]
        all_ends = [max(end, given[row][1] if row in given else 0) for row, end in found.items()]
        return all_rows, np.array(knows, np.int64), np.array(all_ends, np.int64)

    def _insert(self, rows: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray | None:
        """Insert tokens of some rows; return which rows have other pages now, bool [B], or None if nobody knows yet."""
        pages, columns, owned = self._pages, self.columns, self._owned_from(rows)
        found = pages.insert(self.tree, columns, rows, begins, ends)
        columns.committed[rows] = ends
        columns.counted[rows] = ends
        if self._loans:
            self._settle_loans()
        pages.unlock(self.tree, found.before)
        return pages.replace(found, rows, begins, owned)

    def _owned_from(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens before which each request's slots are not its own: cached or borrowed, int64 [B]."""
        owned: np.ndarray = self.columns.committed[rows]
        for query, row in enumerate(rows.tolist()) if self._loans else ():
            if row in self._loans:
                owned[query] = max(owned[query], self._loans[row].borrowed)
        return owned

    def _settle_loans(self) -> None:
        """End the loans of requests that have committed what they borrow."""
        rows = np.flatnonzero(self.columns.serial).tolist()
        self._loans = share.unsettled(self._loans, {row: int(self.columns.committed[row]) for row in rows})

    def _give_back_duplicates(self) -> None:
        """Free the slots that pending commits brought for tokens cached already. Waits for an index on a GPU."""
        self._pages.give_back_duplicates()

    # Decode

    @_repaired
    def step(self, requests: Sequence[Request], tokens: Any, n: int | Sequence[int] = 1) -> Step:
        """Do what a decode step needs, in one call: append tokens, commit whole pages, and give slots for `n` more.

        The KV of all slots that a request has must be computed: then `tokens` are what it has generated from them. It
        means `commit(requests, tokens=tokens)`, then `extend(requests, n)`.

        tokens: as for `commit`, usually [B]. n: as for `extend`.

        Returns the requests that got no slots, and those whose slots were replaced. O(requests + new whole pages).
        Raises QueryError and ValueError with nothing changed.
        """
        rows, added, more = self._read_step(requests, tokens, n)
        known = self.columns.num_tokens[rows] + added.counts
        ends = np.minimum(known, self.columns.length[rows])
        self._store_added(rows, added)
        self._open = recover.begun(recover.STEP, self.columns, rows)
        changed = self._commit(rows, known, ends)
        return Step(self._extend(rows, more), changed)

    def _read_step(self, requests: Sequence[Request], tokens: Any, n: Any) -> tuple[np.ndarray, Batch, np.ndarray]:
        """Return rows, new tokens and how many slots more, int64 [B], checked."""
        rows, serials = numbers_of(self, "step", requests)
        added = read_tokens("step", rows, tokens)
        more = per_query(n, len(rows), "n")
        most = self._in_pages(self.max_length)
        reason, _ = cpu.check_requests(self.columns.data, rows, serials, added.counts, most, more, self.max_length)
        if reason:  # find it again, and say it
            rows_of(self, "step", requests)
            refuse_long("step", self.columns.num_tokens[rows] + added.counts, most)
            read_growth(self.columns, rows, n, self.max_length)
        return rows, added, more

    # Fork

    @_repaired
    def fork(self, request: Request, n: int) -> tuple[Requests, torch.Tensor]:
        """Start `n` requests that continue a running one, as for samples or beams. Its KV must be computed.

        All that is known of `request` and has slots is committed. The new requests share its whole pages, and have
        pages of their own for the rest: the KV of a last page that is not full must be copied.

        Returns the requests, and the pages to copy in each layer before the next forward pass: int64 [K, 2], from and
        to, on the device of the KV cache. If they do not fit, all of them are refused.
        """
        rows = rows_of(self, "fork", [request])
        if n < 1:
            raise ValueError(f"fork: n must be at least 1, not {n}")
        self._open = UnderWay(recover.BEGIN, rows, serial=self._serial)
        known = self.columns.num_tokens[rows]
        self._commit(rows, known, np.minimum(known, self.columns.length[rows]))
        return self._fork(int(rows[0]), n)

    def _fork(self, row: int, n: int) -> tuple[Requests, torch.Tensor]:
        columns, pages = self.columns, self._pages
        self._give_back_duplicates()
        begin, length = int(columns.committed[row]), int(columns.length[row])
        needed = n * (self._in_pages(length) - begin)
        left = self.available_slots
        none = np.full(n, -1)
        if needed > left or n > len(self._free_rows):
            names = columns.names[row], int(columns.priority[row])
            text = f"{needed} slots are needed and {left} can be had" if needed > left else "max_requests are running"
            self._refused += n
            refused = {at: Request.refused(self, length, names, text, max(needed - left, 0)) for at in range(n)}
            return Requests(self, none, np.zeros(n, np.int64), refused), torch.empty(
                0, 2, dtype=torch.int64, device=self.kv_device
            )
        rows = np.array(self._free_rows[-n:], np.int64)
        place = pages.places(np.full(n, row), np.full(n, begin))
        self.tree.lock(place)
        self._make_space(needed)
        begins, ends = np.full(n, begin), np.full(n, self._in_pages(length))
        pages.copy(row, rows, 0, begin)
        pages.take(rows, begins, ends)
        pages.copy_tokens(row, rows)
        pages.set_places(rows, place)
        columns.data[running.SERIAL + 1 :, rows] = columns.data[running.SERIAL + 1 :, row, None]
        columns.names[rows] = columns.names[row]
        columns.cached[rows] = begin
        del self._free_rows[-n:]
        self._serial += n
        columns.serial[rows] = np.arange(self._serial - n, self._serial)
        self._begun += n
        table, parts = pages.page_table, slice(begin // self.page_size, self._in_pages(length) // self.page_size)
        new = torch.stack([table[int(one), parts] for one in rows])
        old = table[row, parts].expand_as(new)
        return self._batch(rows), torch.stack([old.reshape(-1), new.reshape(-1)], 1).to(torch.int64)

    # End

    @_repaired
    def finish(self, requests: Sequence[Request], up_to: Any = None, tokens: Any = None, touch: bool = False) -> None:
        """Commit, with `up_to` and `tokens` as for `commit`, and end the requests. Cached tokens become evictable.

        If a prefill did not complete, pass `up_to`, or call `abort`: committed KV is served to other requests.
        touch: make what the requests have cached the most recently used, in their order. Without it, the last commit of
        a request with new pages decides.

        Slots after the last whole page become free. Raises QueryError and ValueError with nothing changed.
        """
        rows = rows_of(self, "finish", requests)
        added, known = self._read_added("finish", rows, tokens)
        ends = computed_ends("finish", self.columns, rows, known, up_to, self.page_size)
        self._store_added(rows, added)
        self._open = recover.begun(recover.END, self.columns, rows)
        self._commit(rows, known, ends)
        self._release(rows, touch)

    @_repaired
    def abort(self, requests: Sequence[Request], touch: bool = False) -> None:
        """End requests, and free their uncommitted slots. Committed tokens become evictable. touch: as for `finish`.

        Slots that other requests share through `begin(share=True)` pass to one of these. It has to compute them, if the
        forward pass has not: its `cached_length` falls, so read the `cached_length` of those requests again.

        Raises QueryError with nothing changed.
        """
        rows = rows_of(self, "abort", requests)
        self._open = recover.begun(recover.END, self.columns, rows)
        self._release(rows, touch)

    def _release(self, rows: np.ndarray, touch: bool) -> None:
        if len(rows) == 0:
            return
        columns, pages = self.columns, self._pages
        ending = share.end(self._loans, rows.tolist()) if self._loans else None
        begins = columns.committed[rows]
        if ending is not None:
            begins = np.maximum(begins, ending.begins)
        ends = np.maximum(self._in_pages(columns.length[rows]), begins)
        if touch:
            place = pages.places(rows, columns.committed[rows])
            self.tree.match(pages.tokens(rows, begins, begins), columns.names_of(rows), start=place)
        pages.unlock(self.tree, pages.held(rows, columns.committed[rows]))
        columns.serial[rows] = 0
        self._end_views()
        self._free_rows.extend(rows.tolist())
        if ending is not None:
            self._inherit(ending)
        pages.give(rows, begins, ends)

    def _inherit(self, ending: share.Ending) -> None:
        """Let heirs compute what a lender that has ended would have, and replace the loans."""
        columns = self.columns
        for row in ending.heirs:
            loan = ending.loans.get(row)
            left = loan.borrowed if loan else int(columns.committed[row])
            columns.cached[row] = min(int(columns.cached[row]), left)
        self._loans = ending.loans  # last: before, a repair does all of this again

    # The whole cache

    @_repaired
    def counts(self) -> Counts:
        """Return the counters since the start, and all slots by state: free + evictable + protected + held = slots.

        With an index on a GPU it waits for the device.
        """
        self._open = UnderWay(recover.OTHER)
        self._give_back_duplicates()
        return self._count()

    def _count(self) -> Counts:
        rows = np.flatnonzero(self.columns.serial)
        return Counts(
            requests=self._begun,
            refused=self._refused,
            running=len(rows),
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            evicted_tokens=self._evicted,
            duplicate_tokens=self._pages.duplicates - self._duplicates_before,
            shared_tokens=self._shared,
            slots=self._pages.num_pages * self.page_size,
            free=self._pages.free_slots,
            evictable=self.tree.evictable_tokens,
            protected=self.tree.protected_tokens,
            held=int((self._in_pages(self.columns.length[rows]) - self._owned_from(rows)).sum()),
        )

    @_repaired
    def check(self) -> None:
        """Verify that each slot is exactly one of free, cached or held, and that table rows agree with the tree. Slow.

        Raises AssertionError for the first check that fails.
        """
        from flatradix.cache import check  # not wanted by most

        self._open = UnderWay(recover.OTHER)
        self._give_back_duplicates()
        self._open = recover.READING  # a failed check must not start a repair
        columns, pages, page = self.columns, self._pages, self.page_size
        rows = np.flatnonzero(columns.serial)
        places, content = pages.places(rows, columns.committed[rows]), self.tree.content()
        begins, ends = self._owned_from(rows) // page, self._in_pages(columns.length[rows]) // page
        held = [own[begin:end] for own, begin, end in zip(pages.on_host(rows), begins, ends, strict=True)]
        check.check_slots(self._count(), content, pages, held)
        check.check_holders(content, columns.committed[rows], places)
        check.check_tables(pages, columns, rows, self.tree.slots(places).to_list(), self._free_rows)
        check.check_loans(self._loans, pages, columns, {row: self.tokens_of(row) for row in rows.tolist()})

    @_repaired
    def reset(self) -> None:
        """Abort all requests, and drop everything that is cached. All counters restart at 0."""
        self._open = UnderWay(recover.RESET)
        self.tree.reset()
        self.columns.serial[:] = 0
        self._end_views()
        self._pages.reset()
        self._begin_afresh()

    def __repr__(self) -> str:
        return (
            f"PrefixCache({self._pages.free_slots} of {self._pages.num_pages * self.page_size} slots free, "
            f"{int((self.columns.serial > 0).sum())} requests running, page_size={self.page_size}, "
            f"index on {self.tree.device}, KV on {self.kv_device})"
        )


def _loans_of(sharing: Sharing, prompts: Prompts, rows: np.ndarray, cached: np.ndarray) -> dict[int, Loan]:
    """Return what prompts borrow from those before them, by row."""
    found = {}
    for query, (row, length) in enumerate(zip(rows.tolist(), cached.tolist(), strict=True)):
        loan = sharing.start(row, prompts.array(query)[:-1], prompts.name(query), length)
        if loan is not None:
            found[row] = loan
    return found
