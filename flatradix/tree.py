"""RadixTree: the prefix cache's index. Validates, allocates outputs, calls one kernel package, names the results."""

from __future__ import annotations

import os
import secrets
from typing import IO, Any, NoReturn

import numpy as np
import torch

from flatradix import backend, meta, namespaces
from flatradix import policy as policies
from flatradix.arguments import (
    check_counts,
    check_sizes,
    check_slot_device,
    nothing_behind,
    per_query,
    starts,
    to_int64,
    token_count,
)
from flatradix.buffers import Batch, is_single, read_batch, read_one
from flatradix.kernels.scalar import GENERATION_BITS
from flatradix.layout import FREE_ROW, TreeState, allocate, pool_units
from flatradix.namespaces import Namespaces
from flatradix.policy import Policy
from flatradix.ragged import Ragged
from flatradix.refusals import BAD_SLOT, NO_CAPACITY, NO_ROOM, refuse, refuse_capacity
from flatradix.results import EvictResult, InsertResult, MatchResult, Places, places_of
from flatradix.slot_pool import DeviceSlots, HostSlots, Ranges, refuse_slot

_NO_SCORES = np.empty(0, np.int64)

_ERROR_QUERY, _ERROR_VALUE = meta.ERROR_QUERY, meta.ERROR_VALUE
_EVICTABLE, _PROTECTED, _NODES = meta.EVICTABLE, meta.PROTECTED, meta.NODES
_RELEASED, _ROWS = meta.RELEASED, meta.ROWS


class RadixTree:
    """A radix tree over token ids that holds a KV slot for each cached token.

    Every operation takes a batch and means what a loop of single calls in batch order would mean. A batch of one stays
    cheap (1 us from Python to Python for a short key). Not thread-safe: one thread at a time.

    max_tokens: how many tokens can be cached. The pools for 1.25 times as many are committed at once, 10 bytes for each
        of max_tokens (bigrams: 15); up to 160 bytes for each page only as nodes use them.
    page_size: tokens a page. Keys are cut down to whole pages and all lengths are multiples of it.
    device: where the index lives: "cpu", "cuda", "cuda:1" or "auto" (the variable FLATRADIX_DEVICE speaks for "auto").
    policy: what `evict` frees first: "lru", "lfu", "slru", "fifo", "mru", "filo", "priority", with SGLang's meaning of
        each, or a function from `flatradix.Nodes` to a tensor of scores, of which the lowest goes first (equal scores:
        the least recent). A function and "mru" score every node at each eviction; the others cost O(log n) a node.
    slot_device: None keeps the slots beside the index. A device keeps them there, in a pool of their own.
    bigram: keys of EAGLE: unit i is the pair (t[i], t[i + 1]), n tokens are n - 1 units. All lengths count units; an
        insert still takes one slot a token, and ignores the last.
    slot_dtype: torch.int32 takes slots up to 2**31 - 1 in 4 bytes each, torch.int64 any in 8.

    Raises ValueError for arguments out of range, DeviceUnavailableError for a device that cannot be used.
    """

    def __init__(
        self,
        max_tokens: int,
        page_size: int = 1,
        device: str | torch.device = "auto",
        policy: str | Policy = "lru",
        slot_device: str | torch.device | None = None,
        *,
        bigram: bool = False,
        slot_dtype: torch.dtype = torch.int32,
    ) -> None:
        check_sizes(max_tokens, page_size, slot_dtype)
        code, self._score = policies.resolve(policy)
        self.max_tokens = int(max_tokens)
        self.page_size = int(page_size)
        self.policy = policy
        self.bigram = bool(bigram)
        self.slot_dtype = slot_dtype
        self.slot_device = check_slot_device(slot_device)
        self.device = backend.resolve(device)
        self._kernels = backend.kernels_for(self.device)
        # Random, so that a handle of one tree is stale in another, also in one that was saved by another process.
        generation = secrets.randbits(GENERATION_BITS)
        state = allocate(self.max_tokens, self.page_size, self.bigram, generation)
        state.meta[meta.POLICY] = code
        state.meta[meta.THRESHOLD] = policies.SLRU_THRESHOLD
        self._attach(state)

    def _attach(self, state: TreeState) -> None:
        """Take a state as this tree's own."""
        self._state = state
        self._table = self._kernels.address_table(state)
        arrays: list[Any] = [tensor.numpy() for tensor in state]
        host: Any = TreeState(*arrays)
        self._host = host
        self._ranges = np.empty((2, 64), np.int32)
        self._meta = memoryview(host.meta.data)
        self._namespaces = Namespaces(host.namespace_hash)
        units = pool_units(self.max_tokens, self.page_size)
        self._slots: HostSlots | DeviceSlots
        if self.slot_device is None:
            self._slots = HostSlots(units, self.slot_dtype, self._kernels)
        else:
            self._slots = DeviceSlots(units, self.slot_dtype, self.slot_device)

    def match(
        self, q: Any, namespace: Any = None, touch: bool = True, lock: bool = False, start: Any = None
    ) -> MatchResult:
        """The longest cached prefix of each query.

        q: a Ragged, a list of integer sequences (lists, `array`, numpy, tensors), or one flat sequence. int32 and int64
            buffers are read in place.
        namespace: None, a str or bytes for all queries, or a list with one for each.
        touch: whether the path becomes the most recently used. Without it, the call leaves no trace.
        lock: also lock each path as soon as it is found, as `lock` would.
        start: places to continue from, the result of a match or insert: then q holds only what follows them, and only
            that is compared. Lengths and ticks are those of the whole key. An empty start is the root, and knows no
            namespace: pass `namespace` every time. (With bigrams the first token of q is the last one of its start.)

        O(length of the match) a query; 0.12 ns a token where an edge is long. The tree's shape stays: an edge on which
        a match ends is split by a lock only. A key is checked only as far as it is read, so up to and including the
        first page that is not cached.

        Raises ValueError (a bad token or query), StaleHandleError (a start that is gone); then nothing has changed.
        """
        if start is None and is_single(q):
            key = read_one(q, "tokens")
            code = 0 if namespace is None else self._namespaces.find(namespaces.only(namespace))
            length, handle = self._kernels.match_one(self._table, key[0], key[2], key[1], code, bool(touch), bool(lock))
            if length < 0:
                self._refuse("match", length)
            return MatchResult.single(length, handle)
        return self._match_batch(
            read_batch(nothing_behind(start, q), "tokens"), namespace, bool(touch), bool(lock), start
        )

    def _match_batch(self, keys: Batch, namespace: Any, touch: bool, lock: bool, start: Any) -> MatchResult:
        names = namespaces.spread(namespace, len(keys))
        codes = np.array([self._namespaces.find(name) for name in names], np.int64)
        named = np.array([name is not None for name in names], np.bool_)
        start_lengths, start_handles = starts(start, len(keys))
        lengths = torch.empty(len(keys), dtype=torch.int32)
        handles = torch.empty(len(keys), dtype=torch.int64)
        reason = self._kernels.match(
            self._table, keys.addresses, keys.wide, keys.counts, codes, named, start_handles, start_lengths,
            touch, lock, lengths.numpy(), handles.numpy(),
        )  # fmt: skip
        if reason < 0:
            self._refuse("match", reason)
        return MatchResult(lengths, handles)

    def slots(self, places: Any) -> Ragged:
        """The KV slots of each match: a Ragged of int64 on the slot device, one value a token of the matched length.

        places: a result of match or insert, or anything with .handles and .lengths. O(slots). Raises ValueError,
        StaleHandleError.
        """
        if isinstance(places, Places) and places._handles is None:
            return self._slots_one(places._handle, places._length)
        lengths, handles = (tensor.contiguous().numpy() for tensor in places_of(places))
        nodes = self._kernels.count_path_nodes(self._table, handles, lengths)
        if nodes < 0:
            self._refuse("slots", nodes)
        starts, counts = self._room_for_ranges(nodes)
        self._kernels.path_ranges(self._table, handles, lengths, starts, counts)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = self._slots.gather(Ranges(starts, counts, int(offsets[-1])))
        return Ragged.trusted(values, torch.from_numpy(offsets).to(values.device))

    def _slots_one(self, handle: int, length: int) -> Ragged:
        nodes = self._kernels.path_ranges_one(self._table, handle, length, self._ranges[0], self._ranges[1])
        if nodes < 0:
            self._refuse("slots", nodes)
        if nodes > self._ranges.shape[1]:
            self._room_for_ranges(nodes)
            return self._slots_one(handle, length)
        values = self._slots.gather(Ranges(self._ranges[0, :nodes], self._ranges[1, :nodes], length))
        offsets = torch.from_numpy(np.array([0, length]))
        return Ragged.trusted(values, offsets if values.is_cpu else offsets.to(values.device))

    def _room_for_ranges(self, nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths of that many ranges, int32, to be filled; the arrays are used again by the next call."""
        if nodes > self._ranges.shape[1]:
            self._ranges = np.empty((2, 2 * nodes), np.int32)
        return self._ranges[0, :nodes], self._ranges[1, :nodes]

    def lock(self, places: Any) -> None:
        """Protect each path, from its place to the root, from eviction, once more.

        places: as for `slots`. `places.handles` is written to where a place lies inside an edge: the edge is split
        there, and the new handle names the part that is locked. Unlock with the same object. O(nodes on the paths).
        Raises ValueError, StaleHandleError; then nothing is locked.
        """
        if isinstance(places, Places) and places._handles is None:
            handle = self._kernels.lock_one(self._table, places._handle, places._length)
            if handle < 0:
                self._refuse("lock", handle)
            places._handle = handle
            return
        lengths, handles = places_of(places)
        if len(handles) > 1 and handles.stride(0) == 0:
            raise ValueError("lock: the handles share memory, and each may be renewed; pass handles.clone()")
        renewed = handles.contiguous()
        reason = self._kernels.lock(self._table, renewed.numpy(), lengths.numpy())
        if reason < 0:
            self._refuse("lock", reason)
        if renewed is not handles:
            handles.copy_(renewed)

    def unlock(self, places: Any) -> None:
        """Take back one lock for each place. O(nodes on the paths).

        Raises ValueError where no lock ends at a place, StaleHandleError; then nothing is unlocked.
        """
        if isinstance(places, Places) and places._handles is None:
            reason = self._kernels.unlock_one(self._table, places._handle, places._length)
        else:
            lengths, handles = places_of(places)
            reason = self._kernels.unlock(self._table, handles.contiguous().numpy(), lengths.numpy())
        if reason < 0:
            self._refuse("unlock", reason)

    def insert(
        self,
        q: Any,
        slots: Any,
        namespace: Any = None,
        priority: Any = 0,
        start: Any = None,
        inserted_lengths: Any = 0,
    ) -> InsertResult:
        """Cache each key with its slots; what is there already keeps the slots it has.

        q, namespace, start: as for `match`. slots: one slot for each token of q, as Ragged, list of integer sequences,
        or one flat sequence. priority: int, or one a query; a path keeps the greatest. inserted_lengths: int, or one a
        query: no hit is counted on nodes that end within it (what the same request inserted before).

        Where several queries of the batch share something new, the first of them owns it. O(length of the key), from
        `start` on; 131072 new tokens take about 0.1 ms.

        Raises ValueError, StaleHandleError, CapacityError (the batch as a whole does not fit); then nothing has
        changed.
        """
        if is_single(q) and isinstance(priority, int) and isinstance(inserted_lengths, int):
            priority = to_int64(priority, "priority")
            inserted_lengths = to_int64(inserted_lengths, "inserted_lengths")
            if start is None:
                return self._insert_one(q, slots, namespace, priority, meta.NO_HANDLE, 0, inserted_lengths)
            if isinstance(start, Places) and start._handles is None:
                place = (start._handle, start._length)
                return self._insert_one(q, slots, namespace, priority, *place, inserted_lengths)
        q, slots = nothing_behind(start, q), nothing_behind(start, slots)
        keys = read_batch(q, "tokens")
        priorities = per_query(priority, len(keys), "priority")
        inserted = per_query(inserted_lengths, len(keys), "inserted_lengths")
        return self._insert_batch(keys, slots, namespace, priorities, start, inserted)

    def _insert_one(
        self, q: Any, slots: Any, namespace: Any, priority: int, handle: int, start: int, inserted: int
    ) -> InsertResult:
        address, count, wide, _owner = read_one(q, "tokens")
        if isinstance(slots, Ragged) or (isinstance(slots, list | tuple) and len(slots) and not is_single(slots)):
            if len(slots) != 1:
                raise ValueError(f"insert: 1 queries, but slots for {len(slots)}")
            slots = slots[0]
        source = self._slots.read_one(slots)
        if source[1] != count:
            raise ValueError(f"insert: query 0 has {count} tokens, but {source[1]} slots; give one slot a token")
        if namespace is not None:
            namespace = namespaces.only(namespace)
        code = 0 if namespace is None else self._namespaces.find(namespace)
        fresh = code < 0 and start == 0 and count - self.bigram >= self.page_size
        if fresh:
            code = self._namespaces.give(namespace)
        pool, pool_wide, limit = self._slots.arguments
        arguments = (
            address, wide, count, code, namespace is not None, handle, start, priority, inserted,
            source[0], source[2], pool, pool_wide, limit,
        )  # fmt: skip
        try:
            prefix, length, end, place = self._kernels.insert_one(self._table, *arguments)
            if prefix == NO_ROOM:
                self._compact()
                prefix, length, end, place = self._kernels.insert_one(self._table, *arguments)
            if prefix == BAD_SLOT:
                self._refuse_slot(np.asarray(source[3]))
            if prefix < 0:
                self._refuse("insert", prefix)
        except BaseException:
            if fresh and not self._holds(code):
                self._namespaces.take_back(code)
            raise
        if isinstance(self._slots, DeviceSlots):
            self._slots.write_one(place, source, prefix - start, length - prefix)
        return InsertResult.single_insert(prefix, length, end)

    def _insert_batch(
        self, keys: Batch, slots: Any, namespace: Any, priorities: np.ndarray, start: Any, inserted: np.ndarray
    ) -> InsertResult:
        source: Any = self._slots.read(slots)
        check_counts(keys.counts, source.counts)
        names = namespaces.spread(namespace, len(keys))
        start_lengths, start_handles = starts(start, len(keys))
        codes, fresh = self._codes_to_insert(names, keys.counts, start_lengths)
        named = np.array([name is not None for name in names], np.bool_)
        prefixes = torch.empty(len(keys), dtype=torch.int32)
        lengths = torch.empty(len(keys), dtype=torch.int32)
        handles = torch.empty(len(keys), dtype=torch.int64)
        places = np.empty(len(keys), np.int64)
        arguments = (
            self._table, keys.addresses, keys.wide, keys.counts, codes, named, start_handles, start_lengths,
            priorities, inserted, source.addresses, source.wide, *self._slots.arguments,
            prefixes.numpy(), lengths.numpy(), handles.numpy(), places,
        )  # fmt: skip
        try:
            reason = self._kernels.insert(*arguments)
            if reason == NO_ROOM:
                self._compact()
                reason = self._kernels.insert(*arguments)
            if reason == BAD_SLOT:
                self._refuse_slot(np.asarray(slots if is_single(slots) else slots[self._meta[_ERROR_QUERY]]))
            if reason < 0:
                self._refuse("insert", reason)
        except BaseException:
            for code in fresh:
                if not self._holds(code):
                    self._namespaces.take_back(code)
            raise
        if isinstance(self._slots, DeviceSlots):
            new = (lengths - prefixes).numpy()
            self._slots.write(places, source, prefixes.numpy() - start_lengths, new)
        return InsertResult(prefixes, lengths, handles)

    def _codes_to_insert(
        self, names: Any, counts: np.ndarray, start_lengths: np.ndarray
    ) -> tuple[np.ndarray, list[int]]:
        """The namespace code of each query, and those given out for it: only to a key that will store something."""
        codes = np.zeros(len(names), np.int64)
        fresh: list[int] = []
        for query, name in enumerate(names):
            code = self._namespaces.find(name)
            stores = counts[query] - self.bigram >= self.page_size and start_lengths[query] == 0
            if code < 0 and stores:
                code = self._namespaces.give(name)
                fresh.append(code)
            codes[query] = code
        return codes, fresh

    def _holds(self, code: int) -> bool:
        """Whether a namespace has nodes. A batch that does not fit may have been given codes beyond the array."""
        children = self._host.namespace_children
        return code < len(children) and bool(children[code])

    def _compact(self) -> None:
        """Slide all edges to the front of the pools: O(cached tokens); happens when no free range is long enough."""
        if isinstance(self._slots, DeviceSlots):
            moves = [np.empty(self.num_nodes, np.int32) for _ in range(3)]
            self._kernels.plan_compaction(self._table, *moves)
            self._slots.move(*moves)
        self._kernels.compact(self._table, *self._slots.arguments[:2])

    def evict(self, num_tokens: int) -> EvictResult:
        """Free whole nodes, in the order of the policy, until `num_tokens` tokens are free or all is locked.

        Nodes without children and locks go first; a parent can go when its last child went. No more nodes are freed
        than needed. Returns the slots freed, in order. O(log n) a node (O(n) in all with mru or a function). Raises
        ValueError for a negative number.
        """
        wanted = token_count(num_tokens)
        scores = _NO_SCORES if self._score is None else self._scores(self._score)
        tokens, nodes = self._kernels.evict(self._table, wanted, scores)
        if self._meta[_RELEASED]:
            self._forget_namespaces()
        starts, counts = self._room_for_ranges(nodes)
        self._kernels.victim_ranges(self._table, starts, counts)
        slots = self._slots.gather(Ranges(starts, counts, tokens))
        return EvictResult(slots, tokens, nodes)

    def _scores(self, policy: Policy) -> np.ndarray:
        rows = self._meta[_ROWS]
        s = self._state
        columns = (s.tick, s.created, s.priority, s.hit_count, s.lock_ref, s.children, s.length, s.end)
        live = s.parent[:rows] != FREE_ROW
        live[0] = False
        return policies.scores_of(policy, policies.Nodes(*(column[:rows] for column in columns)), live)

    def _forget_namespaces(self) -> None:
        for code in self._host.released[: self._meta[_RELEASED]].tolist():
            self._namespaces.take_back(code)
        self._meta[_RELEASED] = 0

    @property
    def evictable_tokens(self) -> int:
        """Cached tokens that no lock protects."""
        return self._meta[_EVICTABLE]

    @property
    def protected_tokens(self) -> int:
        """Cached tokens under a lock."""
        return self._meta[_PROTECTED]

    @property
    def total_tokens(self) -> int:
        """Cached tokens, evictable and protected."""
        return self._meta[_EVICTABLE] + self._meta[_PROTECTED]

    @property
    def num_nodes(self) -> int:
        """Nodes that hold tokens."""
        return self._meta[_NODES]

    @property
    def nbytes(self) -> int:
        """Bytes of the tree's tensors, those that nothing has touched yet included."""
        return sum(t.nbytes for t in self._state) + self._slots.values.nbytes

    def check(self) -> None:
        """Verify every invariant; raises AssertionError with the first that does not hold. O(cached tokens), slow."""
        from flatradix.check import check

        check(self)

    def digest(self) -> str:
        """32 hex digits over the logical tree: paths, namespaces, slots, locks, ticks, priorities, hit counts.

        Equal for trees that went through the same calls, on any device; row numbers and places in the pools do not
        count. O(cached tokens).
        """
        slots = self._slots.values.cpu()
        pool = (slots.data_ptr(), slots.dtype == torch.int64)
        lanes = [self._kernels.digest(self._table, *pool, lane) for lane in (0, 1)]
        return "".join(f"{lane & (2**64 - 1):016x}" for lane in lanes)

    def reset(self) -> None:
        """Drop everything, locked nodes too. Handles go stale, that of the root excepted; the clock goes on."""
        self._kernels.reset(self._table)
        self._namespaces.clear()

    def to(self, device: str | torch.device) -> RadixTree:
        """The tree on another device; itself if it is there. Handles stay good, digests are equal."""
        backend.resolve(device)  # raises for every device but the one there is
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RadixTree is neither pickled nor copied: use save() and RadixTree.load()")

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the tree to a file or an open binary file, all but a policy function. O(cached tokens)."""
        from flatradix.snapshot import save

        save(self, path)

    @staticmethod
    def load(
        path: str | os.PathLike[str] | IO[bytes],
        device: str | torch.device = "auto",
        slot_device: str | torch.device | None = None,
        policy: Policy | None = None,
    ) -> RadixTree:
        """The tree of a file that `save` wrote. The handles that the saved tree had given out are good in it.

        policy: the function of a tree that was saved with one. Files are trusted: load only your own.
        Raises ValueError for a file that is damaged or none.
        """
        from flatradix.snapshot import load

        return load(path, device, slot_device, policy)

    def _refuse_slot(self, slots: np.ndarray) -> None:
        position = self._meta[_ERROR_VALUE]
        refuse_slot(int(slots[position]), self._meta[_ERROR_QUERY], position, self.slot_dtype)

    def _refuse(self, operation: str, reason: int) -> None:
        if reason == NO_CAPACITY:
            refuse_capacity(self._meta[_ERROR_VALUE], self.evictable_tokens, self.protected_tokens, self.max_tokens)
        refuse(operation, reason, self._meta[_ERROR_QUERY], self._meta[_ERROR_VALUE])

    def __repr__(self) -> str:
        return (
            f"RadixTree({self.total_tokens} of {self.max_tokens} tokens in {self.num_nodes} nodes, "
            f"{self.protected_tokens} locked, page_size={self.page_size}, {self.device})"
        )
