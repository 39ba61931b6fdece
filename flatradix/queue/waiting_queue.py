"""WaitingQueue: all prompts that wait beside a tree, their order, what they share, and whom to admit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from math import isfinite
from threading import get_ident
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from flatradix.errors import QueryError
from flatradix.gate import CUT_SHORT, FREE, public_call
from flatradix.host.index import HostIndex
from flatradix.inputs import namespaces
from flatradix.inputs.arguments import per_query, to_int64
from flatradix.inputs.ragged import read_batch
from flatradix.inputs.sequences import Buffer, read_host_key
from flatradix.kernels import cpu
from flatradix.layout import waiting
from flatradix.layout.numbers import MAX_TOKEN, MAX_UNITS
from flatradix.queue import orders
from flatradix.queue.orders import Columns, OrderFunction
from flatradix.queue.watch import HostWatch, Watch
from flatradix.tree import RadixTree

_NO_LIMIT = 2**60
_PATIENCE, _EVERY = 300.0, 4


class Plan(NamedTuple):
    """Whom to admit together. ids: int64 [K], in turn. cached_lengths: int32 [K]. new_tokens: of all together."""

    ids: torch.Tensor
    cached_lengths: torch.Tensor
    new_tokens: int


class WaitingQueue:
    """The prompts that wait for a tree: how much of each is cached, what they share, who goes first, whom to admit.

    tree: the RadixTree of the prefix cache.
    keep: let `tree.evict` spare what waiting prompts would match. It takes such nodes only when nothing else is left:
        those that only the last prompts in the order of the last `order` call want first. Nothing is locked by this.
        A tree takes one queue with `keep`.
    compute_last: leave the last token of each prompt to compute, because its logits are needed: lengths are then those
        of a match of the prompt without that token.

    A prompt is copied when it is added, and its cached length is kept right from then on: a look costs what the tree's
    changes concern, never the prompts' tokens again. Results are CPU tensors, one value for each waiting prompt, the
    oldest first, as `ids` tells. No call of a queue changes what the tree holds.

    One thread at a time, for the queue and its tree together: a call while another thread is in one of either raises
    RuntimeError. Raises ValueError if another queue keeps in this tree already.
    """

    def __init__(self, tree: RadixTree, keep: bool = False, *, compute_last: bool = False) -> None:
        if not isinstance(tree, RadixTree):
            raise ValueError(f"a waiting queue stands beside a RadixTree, not beside a {type(tree).__name__}")
        self.tree = tree
        self.gate = tree.index  # the calls of a queue count as calls of the index: both have one gate
        self._keep = keep
        self._watch = _watch_of(tree, keep, compute_last)
        self._known: np.ndarray | None = None  # entries by age, until the next add or remove

    @public_call
    def close(self) -> None:
        """Keep nothing from now on, as if the queue were deleted: another queue can then keep in this tree."""
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            self._watch.close()
            self._keep = False
            index.busy = FREE
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    @property
    def keep(self) -> bool:
        """Whether evictions spare what waiting prompts would match."""
        return self._keep

    # The prompts

    @property
    def _prompts(self) -> Any:
        return self._watch.prompts

    @public_call
    def add(self, prompts: Any, namespace: Any = None, priority: Any = 0, arrival: Any = None) -> torch.Tensor:
        """Add prompts, in order; return their ids: int64 [B], rising, never used again.

        prompts: as the queries of `RadixTree.match`. namespace: one for all, or a list with one each, as for `match`.
        priority: an int (None is 0), or one a prompt; higher goes first in every order. arrival: when each prompt came:
        a number, or one a prompt, of any clock whose time is later passed to `order` as `now`; None is
        `time.monotonic()` now.

        O(tokens). Raises QueryError (a token out of range), ValueError. Then nothing was added.
        """
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            priority = 0 if priority is None else priority
            key = read_host_key(prompts, "tokens") if isinstance(priority, int) else None
            alone = not isinstance(namespace, list | tuple) and (arrival is None or type(arrival) is float)
            if key is not None and alone:
                one = self._add_one(key, namespace, priority, arrival)
                index.busy = FREE
                return one
            keys = read_batch(prompts, "tokens")
            names = namespaces.spread(namespace, len(keys))
            priorities = per_query(priority, len(keys), "priority")
            arrivals = _arrivals(arrival, len(keys))
            spaces = self._prompts.spaces_of(names)
            self._known = None
            found = self._prompts.add(keys, spaces, priorities, arrivals)
            if isinstance(found, int):
                _refuse_token((int(keys.addresses[found]), int(keys.counts[found]), keys.wide, keys.owner), found)
            index.busy = FREE
            return torch.from_numpy(found)
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    def _add_one(self, key: Buffer, namespace: Any, priority: int, arrival: float | None) -> torch.Tensor:
        namespaces.check(namespace)
        when = time.monotonic() if arrival is None else arrival
        if not isfinite(when):
            raise ValueError("arrival must be a finite number")
        priority = to_int64(priority, "priority")
        space = self._prompts.spaces.get(namespaces.key_of(namespace))
        if space is None:
            space = int(self._prompts.spaces_of([namespace])[0])
        self._known = None
        number = self._prompts.add_one(key, space, priority, when)
        if number < 0:
            _refuse_token(key, 0)
        return torch.from_numpy(np.array([number]))  # torch.tensor takes four times as long

    @public_call
    def remove(self, ids: Any) -> None:
        """Remove prompts that wait: an id, or several (a sequence, an array, a tensor).

        O(nodes on their paths). Raises QueryError (an id that does not wait, or is given twice). Then all stay.
        """
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            self._known = None
            if not (type(ids) is int and 0 <= ids < _NO_LIMIT and self._watch.remove_one(ids)):
                numbers = _read_ids(ids)
                self._find(numbers, "remove")
                _refuse_twice(numbers, "remove")
                self._watch.remove(numbers)
            index.busy = FREE
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    def _find(self, numbers: np.ndarray, operation: str) -> np.ndarray:
        entries, missing = self._prompts.find(numbers)
        if missing >= 0:
            raise QueryError(
                f"{operation}: query {missing}: no prompt with id {numbers[missing]} waits; it has left, or was never "
                "added (`ids` lists those that wait)",
                missing,
            )
        found: np.ndarray = entries
        return found

    @public_call
    def prompt(self, id: int) -> torch.Tensor:
        """Return a copy of the tokens of a waiting prompt: int32 [length]. Raises QueryError."""
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            entries = self._find(_read_ids(id), "prompt")
            if len(entries) != 1:
                raise ValueError(f"prompt takes one id, not {len(entries)}")
            entry = int(entries[0])
            tokens = torch.from_numpy(self._prompts.tokens(entry))
            index.busy = FREE
            return tokens
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    def __len__(self) -> int:
        return len(self._prompts)

    @public_call
    def __contains__(self, id: object) -> bool:
        if not isinstance(id, int | np.integer) or not 0 <= id < _NO_LIMIT:
            return False
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            missing = self._prompts.find(np.array([id], np.int64))[1]
            index.busy = FREE
            return bool(missing < 0)
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of the queue's arrays, including memory that has not been touched yet."""
        total: int = self._prompts.nbytes
        return total

    # Columns

    def _entries(self) -> np.ndarray:
        known = self._known
        if known is None:
            known = self._known = self._prompts.entries()
        return known

    def _column(self, name: str) -> torch.Tensor:
        return torch.from_numpy(getattr(self._prompts.arrays, name)[self._entries()])

    @public_call
    def ids(self) -> torch.Tensor:
        """Return the ids of all waiting prompts, the oldest first: int64 [N]."""
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            found = self._column("id")
            index.busy = FREE
            return found
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    @public_call
    def lengths(self) -> torch.Tensor:
        """Return the tokens of each waiting prompt: int32 [N]."""
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            found = self._column("tokens")
            index.busy = FREE
            return found
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    @public_call
    def cached_lengths(self) -> torch.Tensor:
        """Return what `tree.match(prompt, namespace, touch=False)` would say of each waiting prompt now: int32 [N].

        On the CPU: O(what the tree's changes since the last look concern + N).
        """
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            self._watch.look()
            found = self._column("length")
            index.busy = FREE
            return found
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    @public_call
    def shared_lengths(self) -> torch.Tensor:
        """Return how many tokens of each prompt are not cached, and are known from an older waiting prompt: int32 [N].

        Counted from the cached length on, in whole pages, within a namespace, by tokens. O(N + nodes of the prompts).
        """
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            self._watch.look()
            found = self._shared()
            index.busy = FREE
            return found
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    def _shared(self) -> torch.Tensor:
        self._prompts.tidy()
        arrays, entries = self._prompts.arrays, self._entries()
        return torch.from_numpy(np.maximum(arrays.shared[entries] - arrays.length[entries], 0))

    # Order

    @public_call
    def order(
        self,
        policy: str | OrderFunction = "fcfs",
        *,
        now: float | None = None,
        patience: float = _PATIENCE,
        every: int = _EVERY,
        defer_shared: bool = False,
    ) -> torch.Tensor:
        """Return the ids of all waiting prompts in the order in which they should be served: int64 [N].

        policy: one of these; ties go to the older prompt.
            "fcfs": by age. "lpm": the longest cached prefix first. "dfs-weight": depth first through the tree, the
            branches with the most waiting prompts first, as SGLang does. "hrrn": the longest wait for each token to
            compute first. "shortest-prefill": the fewest tokens to compute first. "aged": cached share of the prompt +
            waited / patience. "k-lpm": as lpm, but every `every`-th turn goes to the oldest prompt that is left.
            A function from `Columns` to a tensor of scores, [N]: the lowest goes first.
        now: the time on the clock of `arrival`; None is `time.monotonic()`. patience: in units of that clock.
        defer_shared: prompts that share tokens with an older one that computes them come behind all others, so that
            they find them cached.

        A prompt with a higher priority goes before all with a lower one. Starvation, with equal priorities and without
        `defer_shared`: with fcfs, only prompts that are older, with aged, only those that came at most `patience` later
        can go first; with k-lpm, a prompt with n older ones has its turn after at most (n + 1) * every turns of one
        call: serve at least `every` before the next call. The other orders have no bound.

        The order is also that by which `keep` gives up nodes. Raises ValueError.
        """
        _check_order(policy, now, patience, every)
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            if policy == "lpm" and not defer_shared:
                self._watch.look()
                ids = np.empty(len(self), np.int64)
                if cpu.order_by_longest.call(self._prompts.address, self.tree.page_size, ids):
                    self._watch.order_changed()
                    index.busy = FREE
                    return torch.from_numpy(ids)
            positions = self._order(policy, now, patience, every, defer_shared)
            entries = self._entries()[positions]
            cpu.set_order(self._prompts.address, entries)
            self._watch.order_changed()
            found = torch.from_numpy(self._prompts.arrays.id[entries])
            index.busy = FREE
            return found
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    def _order(
        self, policy: str | OrderFunction, now: float | None, patience: float, every: int, defer_shared: bool
    ) -> np.ndarray:
        self._watch.look()
        entries = self._entries()
        columns = self._columns(entries, now, callable(policy) or defer_shared)
        if policy == "fcfs":
            positions = np.arange(len(entries))
        elif policy == "dfs-weight":
            positions = orders.depth_first(self.gate.read_paths().parents, self._prompts.arrays.row[entries])
        else:
            scores = orders.scores_of(policy, columns, patience)
            positions = orders.by_scores(scores, len(entries))
        if policy == "k-lpm":
            positions = orders.with_oldest(orders.in_classes(positions, columns, False), columns, every)
        return orders.in_classes(positions, columns, defer_shared)

    def _columns(self, entries: np.ndarray, now: float | None, shared: bool) -> Columns:
        cached, length, priority, arrival = (
            torch.from_numpy(column)
            for column in self._prompts.columns(entries, "length", "tokens", "priority", "arrival")
        )
        waited = np.maximum((time.monotonic() if now is None else now) - arrival.numpy(), 0.0)
        return Columns(
            cached, length, self._shared() if shared else cached, torch.from_numpy(waited), priority, arrival
        )

    @public_call
    def turns(self) -> torch.Tensor:
        """Return the ids in the order of the last `order` call, those added since at the end: int64 [N].

        With `keep`, an eviction gives up prompts from the end of this order on.
        """
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            found = torch.from_numpy(self._prompts.arrays.id[self._prompts.in_order()])
            index.busy = FREE
            return found
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    # Plan

    @public_call
    def plan(
        self,
        order: str | OrderFunction | torch.Tensor | Sequence[int] = "fcfs",
        *,
        token_budget: int | None = None,
        max_requests: int | None = None,
        free_tokens: int | None = None,
        reserve: int = 0,
        skip: bool = False,
        whole_pages: bool = False,
        share: bool = False,
    ) -> Plan:
        """Return whom to admit together, without a change: exactly what matching, locking and counting would find.

        order: a policy of `order`, or ids in the order in which they are considered.
        token_budget: the most tokens to compute in all. max_requests: the most requests.
        free_tokens: slots that are free beside the tree's evictable tokens; None is what the tree may still hold.
            A negative number reserves evictable tokens. A tree without `max_tokens` may hold all: give a number.
        reserve: slots that each request needs besides its prompt, as for its first output.
        skip: go on behind a request that does not fit; otherwise it ends the plan.
        whole_pages: count the slots of each request in whole pages, as an allocator of pages does.
        share: count the new tokens that requests of the plan share, in whole pages, once, with the first of these
            requests, as `PrefixCache.begin(share=True)` allocates slots.

        A request fits if the slots for its tokens that are not cached are free or evictable, where its cached part, and
        those of the requests before it, are not evictable any more. What several protect counts once.

        O(requests considered x nodes on a path). Beside a tree on a GPU, four of its columns are copied to the host
        first. Raises QueryError, ValueError.
        """
        budget, most = read_limit(token_budget, "token_budget"), read_limit(max_requests, "max_requests")
        reserve = read_limit(reserve, "reserve")
        index = self.gate
        me = get_ident()
        index.busy = me if not index.busy else index.recover(me)
        try:
            self._watch.look()
            if isinstance(order, str) or callable(order):
                _check_order(order, None, _PATIENCE, _EVERY)
                entries = self._entries()[self._order(order, None, _PATIENCE, _EVERY, False)]
            else:
                numbers = _read_ids(order)
                entries = self._find(numbers, "plan")
                _refuse_twice(numbers, "plan")
            ids, rows, cached, leaves = self._prompts.columns(entries, "id", "row", "length", "leaf")
            tokens = self._prompts.arrays.tokens[entries].astype(np.int64)
            paths = self.gate.read_paths()
            free = (self.tree.max_tokens or MAX_UNITS) - paths.evictable - paths.protected
            if free_tokens is not None:
                free = read_limit(free_tokens, "free_tokens", -_NO_LIMIT)
            if whole_pages:
                page = self.tree.page_size
                tokens, reserve = -(-(tokens + reserve) // page) * page, 0
            chosen = np.empty(len(entries), np.int64)
            count, total = cpu.plan(
                *paths[:4], rows, cached, tokens, free + paths.evictable, budget, most, reserve, skip,
                np.zeros(len(paths.parents), np.int32), chosen, bool(share), leaves, *self._prompts.paths(),
            )  # fmt: skip
            index.busy = FREE
            chosen = chosen[:count]
            return Plan(torch.from_numpy(ids[chosen]), torch.from_numpy(cached[chosen]), int(total))
        except BaseException:
            if index.busy == me:
                index.busy = CUT_SHORT
            raise

    def __repr__(self) -> str:
        tokens = int(self._prompts.arrays.counts[waiting.LIVE_TOKENS])
        return f"WaitingQueue({len(self)} prompts of {tokens} tokens, keep={self.keep}, on {self.tree.device})"


def _watch_of(tree: RadixTree, keep: bool, compute_last: bool) -> Watch:
    index = tree.index
    if isinstance(index, HostIndex):
        return HostWatch(index, keep, int(compute_last))
    from flatradix.queue.device_watch import DeviceWatch  # imports Triton

    return DeviceWatch(index, keep, int(compute_last))  # type: ignore[arg-type]


def _check_order(policy: object, now: object, patience: object, every: object) -> None:
    """Raise ValueError for a bad argument of an order."""
    if not (callable(policy) or (isinstance(policy, str) and policy in orders.NAMES)):
        raise ValueError(f"order {policy!r} is unknown: one of {', '.join(orders.NAMES)}, or a function of columns")
    if now is not None and not (isinstance(now, int | float) and isfinite(now)):
        raise ValueError(f"now must be a finite number, not {now!r}")
    if not (isinstance(patience, int | float) and patience > 0):
        raise ValueError(f"patience must be above 0, not {patience!r}")
    if not (isinstance(every, int) and 1 <= every <= _NO_LIMIT):
        raise ValueError(f"every must be at least 1, an integer, not {every!r}")


def read_limit(value: Any, name: str, least: int = 0) -> int:
    """Return a limit of a plan; None is no limit. Raises ValueError unless it is an integer of at least `least`."""
    if value is None:
        return _NO_LIMIT
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    return min(int(value), _NO_LIMIT)


def _arrivals(arrival: Any, count: int) -> np.ndarray:
    if arrival is None:
        arrival = time.monotonic()
    try:
        values = np.asarray(arrival, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"arrival must be a number, or one a prompt, not {arrival!r}") from None
    if values.shape not in ((), (count,)):
        raise ValueError(f"arrival has shape {values.shape} for {count} prompts; give one number, or one a prompt")
    if not np.isfinite(values).all():
        raise ValueError("arrival must be finite numbers")
    return np.array(np.broadcast_to(values, count))  # a copy: kernels are compiled for arrays that can be written


def _read_ids(ids: Any) -> np.ndarray:
    """Return ids as int64 [B]."""
    if isinstance(ids, torch.Tensor):
        values = ids.numpy(force=True)
    elif isinstance(ids, Iterable) and not isinstance(ids, np.ndarray):
        each = list(ids)
        whole = all(isinstance(id, int | np.integer) and -(2**63) <= id < 2**63 for id in each)
        values = np.array(each) if whole else np.empty(1, np.object_)
    else:
        values = np.asarray(ids)
        if values.dtype.kind == "u" and values.size and values.max() >= 2**63:
            values = np.empty(1, np.object_)
    if values.size and values.dtype.kind not in "iu":
        raise ValueError("ids must be integers of 64 bits")
    return np.ascontiguousarray(values.reshape(-1), np.int64)


def _refuse_twice(numbers: np.ndarray, operation: str) -> None:
    """Raise QueryError for the first id that is there twice, if any."""
    if len(set(numbers.tolist())) == len(numbers):
        return
    seen: set[int] = set()
    for query, number in enumerate(numbers.tolist()):
        if number in seen:
            raise QueryError(f"{operation}: query {query}: id {number} is there twice; give each id once", query)
        seen.add(number)


def _refuse_token(key: Buffer, query: int) -> NoReturn:
    """Raise QueryError for the first token of a prompt that is out of range."""
    address, count, wide, _owner = key
    position = cpu.first_bad_token(address, wide, count)
    raise QueryError(
        f"add: query {query}: the token at position {position} is outside [0, {MAX_TOKEN}]; nothing was added", query
    )
