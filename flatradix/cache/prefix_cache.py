"""PrefixCache: KV slots and the life of requests over a RadixTree, for an engine without its own slot allocator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch

from flatradix import backend
from flatradix.cache import home, recover
from flatradix.cache.begin import begin_prompts
from flatradix.cache.columns import Columns
from flatradix.cache.commit import commit_tokens, extend_requests, store_added
from flatradix.cache.counts import Counts
from flatradix.cache.fork import fork_request
from flatradix.cache.input import check_tokens, read_call, read_chunk, read_prompts
from flatradix.cache.recover import UnderWay
from flatradix.cache.requests import Request, Requests
from flatradix.cache.state import State
from flatradix.errors import QueryError
from flatradix.gate import CUT_SHORT, FREE, add_gate, public_call, take_over
from flatradix.inputs import devices, namespaces
from flatradix.inputs.arguments import positive
from flatradix.inputs.options import OnEvict, read_options
from flatradix.inputs.policy import Policy
from flatradix.kernels import cpu
from flatradix.layout import running
from flatradix.layout.growth import most_tokens
from flatradix.layout.handles import ROW_MASK
from flatradix.tree import RadixTree

if TYPE_CHECKING:
    from flatradix.cache.waiting import RequestQueue


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


F = TypeVar("F", bound=Callable[..., Any])


def _repaired(method: F) -> F:
    """Wrap a public method: repair the cache before the method if needed, and after the method if it raises.

    Until the method records its operation in `_open`, it only reads.
    """

    @wraps(method)
    def call(self: PrefixCache, *arguments: Any, **keywords: Any) -> Any:
        me = get_ident()
        self.busy = me if not self.busy else take_over(self, me, self._repair)
        try:
            self._open = recover.READING
            result = method(self, *arguments, **keywords)
            self._open = None
            self.busy = FREE
            return result
        except BaseException:
            try:
                if self.busy == me:
                    with suppress(Exception):  # then the next call tries again
                        self._repair()
                        self.busy = FREE
            finally:
                if self.busy == me:
                    self.busy = CUT_SHORT
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
    on_evict: a function that is called with (namespace, tokens, slots) for each victim of an eviction, before its slots
        are given to a request, as for RadixTree. The slots are on the device of the index. A call of the cache in it
        raises RuntimeError. If it raises, so does the call that evicted, and the cache is repaired as described below.
    pin_budget: the most tokens that soft pins may spare, as for RadixTree. Pins are made in the tree of the cache:
        `cache.tree.want(cache.tree.match(prompt, touch=False), until=...)`.

    All work on a GPU goes to torch's current stream. If a forward pass runs on another stream, wait for it before a
    `commit`, `finish` or `abort` of a request that it reads.

    After a call that raises, every slot is exactly one of free, cached or held, and every lock belongs to a request.
    This holds even if a signal handler or a lack of memory interrupted the call: the cache is then repaired, at once or
    in the next call, in O(slots). An interrupted `begin` has begun nothing, or all if it was cut short as it returned:
    compare `running`. Requests of any other interrupted call are all as before the call, or all as after it:
    `num_tokens`, `committed` and `state` tell which. A call from a signal handler within another call raises
    RuntimeError.

    One thread at a time: a call while another thread is in one raises RuntimeError. Raises ValueError for arguments out
    of range, DeviceUnavailableError.
    """

    busy: int  # see `flatradix.gate`

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
        on_evict: OnEvict | None = None,
        pin_budget: int | None = None,
    ) -> None:
        page_size, num_slots = positive("page_size", page_size), positive("num_slots", num_slots)
        max_requests, max_length = positive("max_requests", max_requests), positive("max_length", max_length)
        most = most_tokens(page_size)
        if not page_size <= num_slots <= most:
            raise ValueError(f"num_slots must be from one page ({page_size}) to {most}, not {num_slots}")
        self.page_size = page_size
        self.max_length = max_length
        kv = devices.memory_on("kv_device", kv_device)
        slots = num_slots // page_size * page_size
        index = devices.preferred(device)
        options = read_options(
            slots, page_size, policy, None, False, torch.int32, False, evict_by, on_evict, pin_budget
        )
        self.tree = RadixTree.over(backend.open_index(options, index, paged=True))
        columns = Columns(max_requests, page_size, max_length)
        with torch.inference_mode(False):  # else the tensors would be inference tensors forever
            pages = home.make_pages(self.tree, slots, columns, kv)
        self._state = State(self.tree, pages, columns)
        self._open: UnderWay | None = None  # the call that has begun and not ended
        add_gate(self)

    @property
    def kv_device(self) -> torch.device:
        return self._state.pages.kv_device

    @property
    def page_table(self) -> torch.Tensor:
        """int32 [max_requests, max_length in pages] on kv_device: the KV pages of each running request, in its row."""
        return self._state.pages.page_table

    @property
    def table(self) -> torch.Tensor:
        """int32 [max_requests, max_length in whole pages] on kv_device: the KV slots of each running request.

        Made when it is first asked for, and kept up from then on: an engine that wants pages alone pays nothing for it.
        """
        return self._state.pages.slot_table()

    @property
    def running(self) -> Requests:
        """The running requests, the oldest first."""
        rows = self._state.columns.rows
        return self._state.batch(rows[np.argsort(self._state.columns.serial[rows])])

    # Interrupted calls

    def _repair(self) -> None:
        """Repair the cache after an interrupted call. May itself be interrupted."""
        cut = self._open
        if cut is not None and cut is not recover.READING:
            recover.repair(self._state, cut)
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
        namespaces, priority: as for `RadixTree.insert`, one for all, or a list with one for each prompt.
        share: let new tokens that several of these prompts share have the same slots, those of the first of these
            prompts. Only for engines that compute all of these prompts in one forward pass, each as a whole, and that
            in each layer write all KV before they read any: see docs/engine.md. Without `share`, each request has slots
            of its own for all that is not cached.
        chunk: allocate slots for at most this many tokens that are not cached, for a first chunk of the prefill;
            `extend` allocates more. None allocates for the whole prompt. Not together with `share`.

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
        found = read_prompts(prompts, namespaces, priority, self._state.pages.prompt_device)
        chunk = read_chunk(chunk, share)
        self._open = UnderWay(recover.BEGIN, serial=self._state.columns.counts[running.NEXT_SERIAL])
        self._state.pages.give_back_duplicates()
        self.tree.raise_pending()
        try:
            return begin_prompts(self._state, found, chunk, share)
        except QueryError:
            self._open = recover.READING  # a bad token has changed nothing: no repair is needed
            raise

    # Look without taking

    @property
    def free_slots(self) -> int:
        """Slots that are free without an eviction. O(1). Duplicates of pending commits are not counted yet."""
        return self._state.pages.free_slots

    @property
    def available_slots(self) -> int:
        """Slots that are free, or held by tokens that can be evicted. O(1). Waits for an index on a GPU."""
        return self._state.pages.free_slots + self.tree.evictable_tokens

    @_repaired
    def probe(self, prompts: Any, namespaces: Any = None) -> Probe:
        """Return what a `begin` of these prompts would find now. Takes nothing, and leaves the order of eviction.

        prompts, namespaces: as for `begin`. cached_lengths of the result: tokens that need not be computed.
        needed_slots: slots for the rest, in whole pages. fits: whether a `begin` of the prompt alone would start it.

        O(prompt tokens). Raises QueryError and ValueError.
        """
        found = read_prompts(prompts, namespaces, 0, None)
        check_tokens(found)
        self._open = UnderWay(recover.OTHER)
        self._state.pages.give_back_duplicates()
        if len(found) == 0:
            return Probe(found.counts, found.counts, found.counts > 0)
        places = self.tree.match(self._state.pages.keys(found), found.names, touch=False)
        cached = np.array(places.lengths.tolist(), np.int64)
        needed = self._state.in_pages(found.counts) - cached
        paths, protected = self.tree.index.paths(), np.empty_like(cached)
        rows = places.handles.cpu().numpy() & ROW_MASK
        cpu.newly_protected(*paths[:4], rows, cached, protected)
        fits = (needed <= self._state.pages.free_slots + paths.evictable - protected) & (
            found.counts <= self.max_length
        )
        return Probe(cached, needed, fits & (len(self._state.columns.free_rows) > 0))

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
        self._state.pages.give_back_duplicates()
        return self._state.pages.free_slots, len(self._state.columns.free_rows)

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
        call = read_call(self._state, "extend", requests, n=n)
        self._open = recover.begun(recover.EXTEND, call)
        return extend_requests(self._state, call.rows, call.more)

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
        call = read_call(self._state, "commit", requests, tokens, up_to=up_to)
        store_added(self._state, call)
        self._open = recover.begun(recover.COMMIT, call)
        return commit_tokens(self._state, call.rows, call.known, call.ends)

    # Decode

    @_repaired
    def step(self, requests: Sequence[Request], tokens: Any, n: int | Sequence[int] = 1) -> Step:
        """Do what a decode step needs, in one call: append tokens, commit whole pages, and give slots for `n` more.

        `tokens` are what each request has generated since. The KV of all tokens before the last of these must be
        computed; that of the last is not, even if there is a slot for it. So with drafts, pass those that were accepted
        and the one behind. A step means `commit(requests, up_to, tokens)` up to that token, then `extend(requests, n)`.

        tokens: as for `commit`, usually [B]. n: as for `extend`.

        Returns the requests that got no slots, and those whose slots were replaced. O(requests + new whole pages).
        Raises QueryError and ValueError with nothing changed.
        """
        if tokens is None:
            raise ValueError(
                "step: tokens is None; give what each request has generated since, at least one token each"
            )
        call = read_call(self._state, "step", requests, tokens, n, behind=1)
        store_added(self._state, call)
        self._open = recover.begun(recover.STEP, call)
        changed = commit_tokens(self._state, call.rows, call.known, call.ends)
        return Step(extend_requests(self._state, call.rows, call.more), changed)

    # Fork

    @_repaired
    def fork(self, request: Request, n: int) -> tuple[Requests, torch.Tensor]:
        """Start `n` requests that continue a running one, as for samples or beams. Its KV must be computed.

        All that is known of `request` and has slots is committed. The new requests share its whole pages, and have
        pages of their own for the rest: the KV of a last page that is not full must be copied.

        Returns the requests, and the pages to copy in each layer before the next forward pass: int64 [K, 2], from and
        to, on the device of the KV cache. If they do not fit, all of them are refused.
        """
        n = positive("fork: n", n)
        call = read_call(self._state, "fork", [request])
        self._open = UnderWay(recover.BEGIN, call.rows, serial=self._state.columns.counts[running.NEXT_SERIAL])
        commit_tokens(self._state, call.rows, call.known, call.ends)
        return fork_request(self._state, int(call.rows[0]), n)

    # End

    @_repaired
    def finish(self, requests: Sequence[Request], up_to: Any = None, tokens: Any = None, touch: bool = False) -> None:
        """Commit, with `up_to` and `tokens` as for `commit`, and end the requests. Cached tokens become evictable.

        If a prefill did not complete, pass `up_to`, or call `abort`: committed KV is served to other requests.
        touch: make what the requests have cached the most recently used, in their order. Without it, the last commit of
        a request with new pages decides.

        Slots after the last whole page become free. Raises QueryError and ValueError with nothing changed.
        """
        call = read_call(self._state, "finish", requests, tokens, up_to=up_to)
        store_added(self._state, call)
        self._open = recover.begun(recover.END, call)
        commit_tokens(self._state, call.rows, call.known, call.ends)
        self._state.release(call.rows, touch)

    @_repaired
    def abort(self, requests: Sequence[Request], touch: bool = False) -> None:
        """End requests, and free their uncommitted slots. Committed tokens become evictable. touch: as for `finish`.

        Slots that other requests share through `begin(share=True)` pass to one of these. It has to compute them, if the
        forward pass has not: its `cached_length` falls, so read the `cached_length` of those requests again.

        Raises QueryError with nothing changed.
        """
        call = read_call(self._state, "abort", requests)
        self._open = recover.begun(recover.END, call)
        self._state.release(call.rows, touch)

    # The whole cache

    @_repaired
    def drop(self, namespace: Any) -> int:
        """Drop what is cached in one namespace, as `RadixTree.drop` does. Return how many slots became free.

        namespace: one name; None is that of prompts without one. Requests that run there go on. What they hold of it is
        served to no other request, and goes before all else once they have ended. A request that holds nothing of it
        yet commits as before: abort such requests first if their KV is not to be served.

        O(slots). With an index on a GPU it waits for the device. Raises QueryError with nothing changed.
        """
        namespaces.check(namespace)
        self._open = UnderWay(recover.OTHER)
        self._state.pages.give_back_duplicates()
        return self._state.drop(namespace)

    @_repaired
    def counts(self) -> Counts:
        """Return the counters since the start, and all slots by state: free + evictable + protected + held = slots.

        With an index on a GPU it waits for the device.
        """
        self._open = UnderWay(recover.OTHER)
        self._state.pages.give_back_duplicates()
        return self._state.count()

    @_repaired
    def check(self) -> None:
        """Verify that each slot is exactly one of free, cached or held, and that table rows agree with the tree. Slow.

        Raises AssertionError for the first check that fails.
        """
        from flatradix.cache import check  # not wanted by most

        self._open = UnderWay(recover.OTHER)
        self._state.pages.give_back_duplicates()
        self._open = recover.READING  # a failed check must not start a repair
        columns, pages, page = self._state.columns, self._state.pages, self.page_size
        rows = np.flatnonzero(columns.serial)
        places, content = pages.places(rows, columns.committed[rows]), self.tree.content()
        begins, ends = self._state.owned_from(rows) // page, self._state.in_pages(columns.length[rows]) // page
        held = [own[begin:end] for own, begin, end in zip(pages.on_host(rows), begins, ends, strict=True)]
        check.check_slots(self._state.count(), content, pages, held)
        check.check_holders(content, columns.committed[rows], places)
        check.check_tables(pages, columns, rows, self.tree.slots(places).to_list(), columns.free_rows)
        check.check_loans(self._state.loans, pages, columns, {row: self._state.tokens_of(row) for row in rows.tolist()})

    @_repaired
    def reset(self) -> None:
        """Abort all requests, and drop everything that is cached. All counters restart at 0."""
        self._open = UnderWay(recover.RESET)
        self.tree.reset()
        self._state.reset()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PrefixCache is neither pickled nor copied: its slots are those of one KV cache")

    def __repr__(self) -> str:
        return (
            f"PrefixCache({self._state.pages.free_slots} of {self._state.pages.num_pages * self.page_size} slots free, "
            f"{int((self._state.columns.serial > 0).sum())} requests running, page_size={self.page_size}, "
            f"index on {self.tree.device}, KV on {self.kv_device})"
        )
