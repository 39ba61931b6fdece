"""PrefixCache: KV slots and the life of requests over a RadixTree, for an engine without its own slot allocator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from flatradix.cache import recover, share
from flatradix.cache.allocator import SlotAllocator
from flatradix.cache.counts import Counts
from flatradix.cache.input import check_running, computed_ends, read_growth, read_prompts, read_tokens
from flatradix.cache.places import DevicePlaces, HostPlaces, some_of
from flatradix.cache.records import Grant, Pending
from flatradix.cache.recover import UnderWay
from flatradix.cache.request import REFUSED, RUNNING, Request
from flatradix.cache.share import Loan, Loans, Sharing
from flatradix.index import public_call, refuse_reentry
from flatradix.inputs import devices
from flatradix.inputs.policy import Policy
from flatradix.inputs.upload import upload_numbers
from flatradix.layout.numbers import MAX_UNITS
from flatradix.results import InsertResult, Places
from flatradix.tree import RadixTree

if TYPE_CHECKING:
    from flatradix.cache.waiting import RequestQueue

# Up to this many slots a request, one indexed write serves all requests; beyond, each has a write. A guess, not tuned.
_FEW_SLOTS = 64
_MOST_PENDING = 64

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
    """The KV slots of an engine, and the tokens that they hold. Calls: `begin`, `extend`, `commit`, `finish`, `abort`.

    Every operation takes a list of requests and serves them in order. The engine owns the KV memory: in each layer,
    space for the keys and values of `num_slots` tokens. The cache decides which slot each token has.

    num_slots: KV slots, cut down to whole pages. page_size: slots in a page; requests share whole pages only.
    max_requests: the most requests that run at once. max_length: the most tokens of a request, prompt and output.
    kv_device: the device of the KV cache, and so of the free list and the table.
    device: the device of the index. "cpu", the default, serves a KV cache on a GPU without waiting for the GPU.
    policy: what is evicted first, as for RadixTree.
    evict_by: "page" or "node", as for RadixTree. By page, no more pages are evicted than are needed.

    table: int32 [max_requests, max_length in whole pages] on kv_device. Each running request has its slots in its own
        row, as paged attention takes them.

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
        kv = torch.empty(0, device=kv_device).device  # with its index
        index = devices.preferred(device)
        slots = num_slots // page_size * page_size
        where = _slot_device(index, kv)
        self.tree = RadixTree(slots, page_size, index, policy, where, check_slots=False, evict_by=evict_by)
        # Whether results of the tree are known only after a wait for its device.
        self._waits = index.type != "cpu"
        with torch.inference_mode(False):  # else the tensors would be inference tensors forever
            self.table = torch.zeros(max_requests, self._in_pages(max_length), dtype=torch.int32, device=kv)
            self._allocator = SlotAllocator(slots, page_size, kv)
            self._places = DevicePlaces(max_requests, self.tree.device) if self._waits else HostPlaces(max_requests)
        self._open: UnderWay | None = None  # the call that has begun and not ended
        self._begin_afresh()

    def _begin_afresh(self) -> None:
        self._running: dict[int, Request] = {}
        self._free_rows = list(range(len(self.table) - 1, -1, -1))
        self._pending: deque[Pending] = deque()
        self._loans: Loans = {}
        self._begun = self._refused = self._prompt = self._cached = self._evicted = self._duplicate = self._shared = 0

    def _in_pages(self, tokens: int) -> int:
        """Round a number of tokens up to whole pages."""
        return -(-tokens // self.page_size) * self.page_size

    @property
    def kv_device(self) -> torch.device:
        return self.table.device

    @property
    def running(self) -> list[Request]:
        """The running requests. For an engine that was interrupted before it received the requests of a `begin`."""
        return list(self._running.values())

    def loan_of(self, request: Request) -> tuple[Request | None, int]:
        """Return what `Request.lender` and `Request.borrowed` say."""
        loan = self._loans.get(request.row)
        return (None, 0) if loan is None else (self._running.get(loan.lender), loan.borrowed)

    # Interrupted calls

    def _recover(self) -> None:
        """Repair the cache after an interrupted call. Raises RuntimeError if that call is still under way."""
        refuse_reentry(self)
        cut = self._open
        assert cut is not None
        if cut is recover.READING:
            self._open = None
            return
        running = recover.requests_left(cut, self._running)
        places, committed = recover.find_committed(self.tree, self.table, running, self.page_size, self._loans)
        recover.forget_tokens(cut, {id(request): end for request, end in zip(running, committed, strict=True)})
        recover.lock_exactly(self.tree, places)
        rows = [request.row for request in running]
        if rows:
            self._places.set(rows, places)
            self.tree.write_slots(places, self.table, rows)
        for request, end in zip(running, committed, strict=True):
            request.committed = end
        self._running = {request.row: request for request in running}
        self._settle_loans()
        ending = share.end_others(self._loans, self._running)
        self._inherit(ending)
        self._pending = deque()
        self._free_rows = [row for row in range(len(self.table) - 1, -1, -1) if row not in self._running]
        held = [self._held_slots(request) for request in running]
        free = recover.free_pages(self.tree, held, self._allocator.num_pages, self.page_size)
        self._allocator.set_free(free)
        self._open = None

    # Begin

    @_repaired
    def begin(
        self, prompts: Sequence[Any], namespaces: Any = None, priority: Any = 0, share: bool = False
    ) -> list[Request]:
        """Start requests: find the cached part of each prompt, lock it, and allocate slots for the rest.

        prompts: a list of token sequences (lists, `array`, numpy, tensors), none of them empty.
        namespaces, priority: one for all, or a list with one for each prompt.
        share: let new tokens that several of these prompts share have the same slots, those of the first of these
            prompts. Only for engines that compute all of these prompts in one forward pass, each as a whole, and that
            in each layer write all KV before they read any: see docs/engine.md. Without `share`, each request has slots
            of its own for all that is not cached.

        At least the last token of each prompt is left to compute, because its logits are needed.

        Returns a Request for each prompt. The first `cached_length` tokens need not be computed. `slots` has the slot
        of each token. A request is refused if it does not fit even after all evictable tokens are evicted. A refused
        request holds nothing: `refusal` says why, `missing` how many slots were lacking. Pass its prompt again when
        other requests have ended. Requests are served in order; a smaller request after a refused request can start.

        With `share`, what a prompt shares with an earlier one of the call, in whole pages and without the last token of
        either, is part of its `cached_length`. After an `abort` or `finish` of one of these requests, read the
        `cached_length` of the others again: it falls where another request has to compute what the ended one lent.

        Evicts as needed. O(prompt tokens); with `share`, O(log B) comparisons of prompts in addition for each of B.
        With an index on a GPU it waits for the device. Raises QueryError and ValueError with nothing changed. If a
        policy function raises or a device has no memory left, the new requests hold nothing.
        """
        requests = read_prompts(self, self.table, self.max_length, prompts, namespaces, priority)
        self._open = UnderWay(recover.BEGIN, requests)
        self._give_back_duplicates()
        self.tree.raise_pending()
        # One by one if they do not fit together: the cached part of a refused request must stay evictable for others.
        sharing = Sharing(self.page_size) if share else None
        if requests and not self._start(requests, sharing) and len(requests) > 1:
            for request in requests:
                self._start([request], sharing)
        self._refused += sum(request.state == REFUSED for request in requests)
        return requests

    def _start(self, requests: list[Request], sharing: Sharing | None) -> bool:
        """Start requests if all of them fit, and return whether they do. Otherwise they hold nothing.

        A single request that does not fit is told why. sharing: the prompts of this call that have started.
        """
        free = len(self._free_rows) - len(requests)
        if free < 0 and len(requests) > 1:
            return False
        rows = self._free_rows[free:] if free >= 0 else [-1]
        names = [request.namespace for request in requests]
        keys: Any = [request.tokens[:-1] for request in requests]
        # A single key is cheaper than a batch of one. The match does not touch: a prompt that is refused again and
        # again would keep its cached part from being evicted. The first commit touches.
        match = self.tree.match(keys if len(keys) > 1 else keys[0], names, touch=False, lock=True)
        cached = [match.length] if len(keys) == 1 else match.lengths.tolist()
        begins, loans = cached, {}
        if sharing is not None:
            found = map(sharing.start, rows, keys, names, cached)
            loans = {row: loan for row, loan in zip(rows, found, strict=True) if loan is not None}
            begins = [loans[row].borrowed if row in loans else length for row, length in zip(rows, cached, strict=True)]
        needed = [self._in_pages(request.num_tokens) - begin for request, begin in zip(requests, begins, strict=True)]
        left = self._allocator.free_slots + self.tree.evictable_tokens
        if sum(needed) <= left and free >= 0:
            self._admit(requests, match, Grant(rows, cached, begins, needed, loans))
            return True
        self.tree.unlock(match)
        if sharing is not None:
            for row, name in zip(rows, names, strict=True):
                sharing.take_back(row, name)
        if len(requests) == 1:
            self._refuse(requests[0], needed[0], left)
        return False

    def _refuse(self, request: Request, needed: int, left: int) -> None:
        request.missing = max(needed - left, 0)
        if request.missing:
            request.refusal = f"{needed} slots are needed and {left} can be had: {request.missing} too few"
        else:
            request.refusal = f"all {len(self.table)} requests that max_requests allows are running"

    def _admit(self, requests: list[Request], match: Places, grant: Grant) -> None:
        """Give rows and slots to requests that fit."""
        rows, cached, begins, needed, loans = grant
        slots = self._take(sum(needed))
        if any(cached):
            self.tree.write_slots(match, self.table, rows)
        self._write(rows, begins, needed, slots)
        if loans:
            self._lend(loans, dict(zip(rows, cached, strict=True)))
        self._places.set(rows, match)
        del self._free_rows[len(self._free_rows) - len(requests) :]
        for request, row, length, begin in zip(requests, rows, cached, begins, strict=True):
            request.row, request.state, request.length = row, RUNNING, request.num_tokens
            request.cached_length, request.committed = begin, length
            self._running[row] = request
        self._begun += len(requests)
        self._prompt += sum(request.num_tokens for request in requests)
        self._cached += sum(cached)
        self._shared += sum(begins) - sum(cached)

    def _lend(self, loans: dict[int, Loan], cached: dict[int, int]) -> None:
        """Copy the slots that new requests borrow to their rows. cached: what each row has already."""
        for (lender, begin, end), rows in share.copies(loans, cached).items():
            index = upload_numbers(np.array(rows), self.kv_device)
            self.table[index, begin:end] = self.table[lender, begin:end]
        self._loans = {**self._loans, **loans}

    def _held_places(self, requests: Sequence[Request]) -> Places:
        return self._places.get([request.row for request in requests])

    def _held_slots(self, request: Request) -> torch.Tensor:
        """Return the slots that this request owns, in whole pages: a view of its row."""
        return self.table[request.row, self._owned_from(request) : self._in_pages(request.length)]

    def _owned_from(self, request: Request) -> int:
        """Return how many tokens of a request have slots that the tree or another request owns."""
        loan = self._loans.get(request.row)
        return request.committed if loan is None else loan.borrowed

    def _grow(self, requests: Sequence[Request], lengths: list[int]) -> None:
        """Give running requests slots up to new lengths. Enough slots must be free or evictable."""
        begins = [self._in_pages(request.length) for request in requests]
        counts = [self._in_pages(length) - begin for length, begin in zip(lengths, begins, strict=True)]
        if any(counts):
            self._write([request.row for request in requests], begins, counts, self._take(sum(counts)))
        for request, length in zip(requests, lengths, strict=True):
            request.length = length

    def _take(self, num_slots: int) -> torch.Tensor:
        """Allocate slots in whole pages, and return them as int64. Evicts tokens if too few slots are free."""
        short = num_slots - self._allocator.free_slots
        if short > 0:
            evicted = self.tree.evict(short)
            self._allocator.give(evicted.slots)
            self._evicted += evicted.num_tokens
        return self._allocator.take(num_slots // self.page_size)

    def _write(self, rows: list[int], begins: list[int], counts: list[int], slots: torch.Tensor) -> None:
        """Write slots to the table: the next `counts[i]` of `slots` to row `rows[i]`, from column `begins[i]` on."""
        if sum(counts) > _FEW_SLOTS * len(rows):
            for row, begin, part in zip(rows, begins, slots.split(counts), strict=True):
                self.table[row, begin : begin + len(part)] = part
            return
        many = np.array(counts)
        shifts = np.array(rows) * self.table.shape[1] + begins - (np.cumsum(many) - many)
        places = upload_numbers(np.repeat(shifts, many) + np.arange(len(slots)), self.kv_device)
        self.table.view(-1)[places] = slots.to(torch.int32)

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
        return self._allocator.free_slots, len(self._free_rows)

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
        check_running(self, "extend", requests)
        more = read_growth(requests, n, self.max_length)
        self._open = recover.begun(recover.EXTEND, requests)
        counts = [
            self._in_pages(request.length + count) - self._in_pages(request.length)
            for request, count in zip(requests, more, strict=True)
        ]
        left = self._allocator.free_slots
        if sum(counts) > left:
            self._give_back_duplicates()
            left = self._allocator.free_slots + self.tree.evictable_tokens
        fitting, short = [], []
        for request, needed, count in zip(requests, counts, more, strict=True):
            request.missing = max(needed - left, 0)
            if request.missing:
                short.append(request)
            else:
                left -= needed
                fitting.append((request, request.length + count))
        self._grow([request for request, _ in fitting], [length for _, length in fitting])
        return short

    # Commit

    @_repaired
    def commit(self, requests: Sequence[Request], up_to: Any = None, tokens: Sequence[Any] | None = None) -> None:
        """Declare the KV of requests as computed, so that others can reuse it: after a chunk of a prefill, or any time.

        up_to: how many tokens of each request are computed: one number, or a list. None means all tokens that are known
            and have slots. Pass `up_to` if fewer are computed: in the middle of a prefill, or if tokens are only
            proposed.
        tokens: a list with the tokens that each request has generated since, if any. They are known from now on.

        Only whole pages go to the tree. If another request has committed the same tokens meanwhile, its slots replace
        the slots of this request, which become free: read `slots` again. What running requests share with these through
        `begin(share=True)` is committed for them, too: their `committed` and `slots` may change. The commit continues
        from the place that the request holds: O(new tokens + nodes on the path). With an index on a GPU it does not
        wait for the device, except when more than 64 commits are pending since the last call that waited. Raises
        QueryError and ValueError with nothing changed.
        """
        check_running(self, "commit", requests)
        added = read_tokens("commit", requests, tokens)
        ends = computed_ends("commit", requests, added, up_to)
        self._open = recover.begun(recover.COMMIT, requests)
        self._commit(requests, added, ends)

    def _commit(self, requests: Sequence[Request], added: list[np.ndarray], ends: list[int]) -> None:
        for request, tokens in zip(requests, added, strict=True):
            request.append(tokens)
        growing = self._growing(requests, [end // self.page_size * self.page_size for end in ends])
        if not growing:
            return
        chosen = [request for request, _ in growing]
        rows, begins = [request.row for request in chosen], [request.committed for request in chosen]
        brought = [self.table[request.row, request.committed : end] for request, end in growing]
        if self._waits:  # the rows change before the host knows which of these slots are duplicates
            brought = [slots.clone() for slots in brought]
        lent = [min(self._owned_from(request), end) - request.committed for request, end in growing]
        before = self._places.get(rows)
        result = self._insert(growing, brought, before)
        self.tree.lock(result)
        self._places.set(rows, result)
        for request, end in growing:
            request.committed = request.counted = end
        if self._loans:
            self._settle_loans()
        self.tree.unlock(before)
        own = [slots[count:] for slots, count in zip(brought, lent, strict=True)]
        owned = [begin + count for begin, count in zip(begins, lent, strict=True)]
        if self._waits:
            self.tree.write_slots(result, self.table, rows)
            self._pending.append(Pending(result, owned, own))
            if len(self._pending) > _MOST_PENDING:
                self._give_back_duplicates()
        else:
            self._use_tree_slots(result, rows, begins, Pending(result, owned, own))

    def _growing(self, requests: Sequence[Request], ends: list[int]) -> list[tuple[Request, int]]:
        """Return the requests that a commit up to `ends` concerns, and their ends. Lenders are before borrowers."""
        pairs: Any = zip(requests, ends, strict=True)
        if self._loans:
            given = {request.row: end for request, end in pairs}
            found = share.together(self._loans, given)
            pairs = [(self._running[row], end) for row, end in found.items()]
            pairs = [(request, end) for request, end in pairs if request.row in given or end > request.committed]
        # The first commit of a request counts its hits, even if it adds nothing.
        return [
            (request, max(end, request.committed))
            for request, end in pairs
            if end > request.committed or (request.committed and not request.counted)
        ]

    def _settle_loans(self) -> None:
        """End the loans of requests that have committed what they borrow."""
        self._loans = share.unsettled(self._loans, {row: request.committed for row, request in self._running.items()})

    def _insert(self, growing: list[tuple[Request, int]], slots: list[torch.Tensor], before: Places) -> InsertResult:
        if len(growing) == 1:  # a single key is cheaper than a batch of one
            ((request, end),) = growing
            key = request.tokens[request.committed : end]
            return self.tree.insert(key, slots[0], request.namespace, request.priority, before, request.counted)
        return self.tree.insert(
            [request.tokens[request.committed : end] for request, end in growing],
            slots,
            [request.namespace for request, _ in growing],
            [request.priority for request, _ in growing],
            before,
            [request.counted for request, _ in growing],
        )

    def _use_tree_slots(self, result: InsertResult, rows: list[int], begins: list[int], own: Pending) -> None:
        """Where a token was cached before, write the tree's slot to the request's row and free the request's own."""
        prefixes = [result.prefix_length] if len(rows) == 1 else result.prefix_lengths.tolist()
        queries = [query for query, begin in enumerate(begins) if prefixes[query] > begin]
        if queries:
            duplicates = [slots.clone() for slots in own.duplicates(prefixes)]
            self.tree.write_slots(some_of(result, queries), self.table, [rows[query] for query in queries])
            self._give(duplicates)

    def _give(self, duplicates: list[torch.Tensor]) -> None:
        for slots in duplicates:
            self._allocator.give(slots)
            self._duplicate += len(slots)

    def _give_back_duplicates(self) -> None:
        """Free the slots that pending commits brought for tokens cached already. Waits for an index on a GPU."""
        while self._pending:
            pending = self._pending[0]
            prefixes = pending.result.prefix_lengths.tolist()
            self._pending.popleft()
            self._give(pending.duplicates(prefixes))

    # End

    @_repaired
    def finish(self, requests: Sequence[Request], up_to: Any = None, tokens: Sequence[Any] | None = None) -> None:
        """Commit, with `up_to` and `tokens` as for `commit`, and end the requests. Cached tokens become evictable.

        If a prefill did not complete, pass `up_to`, or call `abort`: committed KV is served to other requests.

        Slots after the last whole page become free. Raises QueryError and ValueError with nothing changed.
        """
        check_running(self, "finish", requests)
        added = read_tokens("finish", requests, tokens)
        ends = computed_ends("finish", requests, added, up_to)
        self._open = recover.begun(recover.END, requests)
        self._commit(requests, added, ends)
        self._release(requests)

    @_repaired
    def abort(self, requests: Sequence[Request]) -> None:
        """End requests, and free their uncommitted slots. Committed tokens become evictable.

        Slots that other requests share through `begin(share=True)` pass to one of these. It has to compute them, if the
        forward pass has not: its `cached_length` falls, so read the `cached_length` of those requests again.

        Raises QueryError with nothing changed.
        """
        check_running(self, "abort", requests)
        self._open = recover.begun(recover.END, requests)
        self._release(requests)

    def _release(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        ended = [request.row for request in requests]
        ending = share.end(self._loans, ended)
        slots = torch.cat(
            [
                self.table[request.row, max(request.committed, begin) : self._in_pages(request.length)]
                for request, begin in zip(requests, ending.begins, strict=True)
            ]
        )
        self.tree.unlock(self._held_places(requests))
        gone = set(ended)
        self._running = {row: request for row, request in self._running.items() if row not in gone}
        self._free_rows.extend(ended)
        self._inherit(ending)
        for request in requests:
            request.end()
        self._allocator.give(slots)

    def _inherit(self, ending: share.Ending) -> None:
        """Let heirs compute what a lender that has ended would have, and replace the loans."""
        for row in ending.heirs:
            request, loan = self._running[row], ending.loans.get(row)
            request.cached_length = min(request.cached_length, loan.borrowed if loan else request.committed)
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
        running = self._running.values()
        return Counts(
            requests=self._begun,
            refused=self._refused,
            running=len(running),
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            evicted_tokens=self._evicted,
            duplicate_tokens=self._duplicate,
            shared_tokens=self._shared,
            slots=self._allocator.num_pages * self.page_size,
            free=self._allocator.free_slots,
            evictable=self.tree.evictable_tokens,
            protected=self.tree.protected_tokens,
            held=sum(self._in_pages(request.length) - self._owned_from(request) for request in running),
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
        running = self.running
        places, content = self._held_places(running), self.tree.content()
        check.check_slots(self._count(), content, self._allocator.free_list(), [*map(self._held_slots, running)])
        check.check_holders(content, running, places)
        check.check_slot_table(self.table, running, self.tree.slots(places).to_list(), self._free_rows)
        check.check_loans(self._loans, self.table, self._running, self.page_size)

    @_repaired
    def reset(self) -> None:
        """Abort all requests, and drop everything that is cached. All counters restart at 0."""
        requests = list(self._running.values())
        self._open = UnderWay(recover.RESET, requests)
        self.tree.reset()
        self._allocator.reset()
        self._begin_afresh()
        for request in requests:
            request.end()

    def __repr__(self) -> str:
        return (
            f"PrefixCache({self._allocator.free_slots} of {self._allocator.num_pages * self.page_size} slots free, "
            f"{len(self._running)} requests running, page_size={self.page_size}, index on {self.tree.device}, "
            f"KV on {self.kv_device})"
        )


def _slot_device(index: torch.device, kv: torch.device) -> torch.device | None:
    """Return the tree's slot device, or None to keep slots beside the index. Raises ValueError for two devices."""
    if index.type == "cpu":
        return None if kv.type == "cpu" else kv
    if index != kv and not devices.interpreted():
        raise ValueError(f"with its index on {index} a PrefixCache needs the KV cache there, not on {kv}")
    return None
