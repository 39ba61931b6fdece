"""RadixTree: the prefix cache's index, one class whatever the device. Says what every operation means.

Its index does the work: `host/index.py` or `device/index.py`.
"""

from __future__ import annotations

import os
from array import array
from typing import IO, Any, NoReturn

import torch

from flatradix import backend
from flatradix.inputs import devices
from flatradix.inputs.options import read_options
from flatradix.inputs.policy import Policy, Score
from flatradix.inputs.ragged import Ragged
from flatradix.inspect import snapshot
from flatradix.inspect.check import check
from flatradix.inspect.content import Content, saved_of
from flatradix.results import EvictResult, InsertResult, MatchResult

# Bound to each tree as its index has them: a call in between would be a part of a short match that one can see.
_HOT = ("match", "match_array", "path_slots", "lock", "unlock", "insert", "evict", "changes")


class RadixTree:
    """A radix tree over token ids that holds a KV slot for each cached token.

    Every operation takes a batch and means what a loop of single calls in batch order would mean. A batch of one stays
    cheap (on the CPU 1 us from Python to Python for a short key). Not thread-safe: one thread at a time.

    max_tokens: how many tokens can be cached. The pools for 1.25 times as many are committed at once, 10 bytes for each
        of max_tokens (bigrams: 15), on a GPU twice that; up to 160 bytes for each page only as nodes use them (on a
        GPU 250, at once).
    page_size: tokens a page. Keys are cut down to whole pages and all lengths are multiples of it.
    device: where the index lives: "cpu", "cuda", "cuda:1" or "auto" (the variable FLATRADIX_DEVICE speaks for "auto").
    policy: what `evict` frees first: "lru", "lfu", "slru", "fifo", "mru", "filo", "priority", with SGLang's meaning of
        each, `flatradix.slru(protected_threshold=...)`, or a function from `flatradix.Nodes` to a tensor of scores, of
        which the lowest goes first (equal scores: the least recent). On the CPU a function and "mru" score every node
        at each eviction; the others cost O(log n) a node.
    slot_device: None keeps the slots beside the index. With an index on the CPU, a device keeps them there, in a pool
        of their own; with one on a GPU, it is where slots are returned.
    bigram: keys of EAGLE: unit i is the pair (t[i], t[i + 1]), n tokens are n - 1 units. All lengths count units; an
        insert still takes one slot a token, and ignores the last.
    slot_dtype: torch.int32 takes slots up to 2**31 - 1 in 4 bytes each, torch.int64 any in 8. Slots are returned so.
    check_slots: whether an insert looks at slots that lie on a slot device, for which it waits for that device. False
        where they are known to be good: an index on the CPU then never waits for a GPU. Other slots are always checked.

    On a GPU, match, lock, unlock, split, insert and write_slots enqueue their kernels on torch's current stream and
    return; results are tensors on the device. What only the device can know is then found by the kernels: a call with a
    bad query has no effect, its places are -1, and the error is raised by the next operation that waits for the device:
    `raise_pending`, the sizes, `slots`, `evict`, `check`, `digest`, `save`, `to`, and `length` and the like of a
    result. A CUDA graph can hold match, lock and unlock, once a batch of that size has been run outside it.

    A call that raises has changed nothing, also where a signal handler or a lack of memory ended it: what it had done
    is taken back by the next call. There remain times of use, and edges that were cut; the slots of an eviction come
    with the next one; a reset stays done. A call from a signal handler, within another call, raises RuntimeError.

    Raises ValueError for arguments out of range, DeviceUnavailableError for a device that cannot be used.
    """

    def __init_subclass__(cls) -> None:
        raise TypeError("RadixTree is not made to be subclassed: wrap it")

    def __init__(
        self,
        max_tokens: int,
        page_size: int = 1,
        device: str | torch.device = "auto",
        policy: Policy = "lru",
        slot_device: str | torch.device | None = None,
        *,
        bigram: bool = False,
        slot_dtype: torch.dtype = torch.int32,
        check_slots: bool = True,
    ) -> None:
        options = read_options(max_tokens, page_size, policy, slot_device, bigram, slot_dtype, check_slots)
        self._index = backend.open_index(options, device)
        self.max_tokens = options.max_tokens
        self.page_size = options.page_size
        self.policy = options.policy
        self.bigram = options.bigram
        self.slot_dtype = options.slot_dtype
        self.slot_device = options.slot_device
        self.device = self._index.device
        for name in _HOT:
            setattr(self, name, getattr(self._index, name))

    def match(
        self,
        q: Any,
        namespace: Any = None,
        touch: bool = True,
        lock: bool = False,
        start: Any = None,
        split: bool = False,
    ) -> MatchResult:
        """The longest cached prefix of each query.

        q: a Ragged, a list of integer sequences (lists, `array`, numpy, tensors), or one flat sequence; an empty list
            is one empty sequence, a batch of none an empty Ragged. int32 and int64 buffers are read in place. With a
            tree on a GPU, tensors there and pinned ones are read after the call has returned: in the order of the
            stream, and for pinned ones until `raise_pending`.
        namespace: None, a str or bytes for all queries, or a list with one for each.
        touch: whether the path becomes the most recently used. Without it, the call leaves no trace.
        lock: also lock each path as soon as it is found, as `lock` would.
        start: places to continue from, the result of a match or insert: then q holds only what follows them, and only
            that is compared. Lengths and ticks are those of the whole key. An empty start is the root, and knows no
            namespace: pass `namespace` every time. (With bigrams the first token of q is the last one of its start.)
        split: also end an edge where a match ends, as `split` would.

        O(length of the match) a query; 0.12 ns a token where an edge is long. Without `lock` and `split` the tree's
        shape stays. A key is checked only as far as it is read, so up to and including the first page that is not
        cached.

        Raises QueryError (a bad token or query), StaleHandleError (a start that is gone); then nothing has changed.
        """
        return self._index.match(q, namespace, touch, lock, start, split)

    def match_array(
        self, tokens: array[int], limit: int | None = None, namespace: Any = None, split: bool = False
    ) -> MatchResult:
        """`match` of the first `limit` tokens (None: of all) of one `array` of int64 ("q"), which is not copied.

        For look-ups that must cost as little as can be. Raises as `match`, ValueError for another array.
        """
        return self._index.match_array(tokens, limit, namespace, split)

    def slots(self, places: Any) -> Ragged:
        """The KV slots of each match: a Ragged of slot_dtype on the slot device, one value a token of its length.

        places: a result of match or insert, or anything with .handles and .lengths. O(slots). Raises QueryError,
        StaleHandleError.
        """
        return self._index.slots(places)

    def path_slots(self, place: Any) -> torch.Tensor:
        """The KV slots of a single place, [length] of slot_dtype on the slot device. Otherwise as `slots`."""
        return self._index.path_slots(place)

    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None:
        """Write the KV slots of each match into a row of a table, as an engine keeps them for its running requests.

        places: as for `slots`. table: int32 or int64 [N, width] on the slot device, rows of contiguous elements;
            `table[rows[i], :length]` are written, the rest stays. rows: int32 or int64 [B] (or a list), all different.

        On a GPU one launch, no synchronisation; a tree on the CPU waits for rows that lie on a GPU. O(slots). Raises
        QueryError (a row outside the table, a place longer than a row), ValueError (int32 for slots of 64 bits),
        StaleHandleError; then nothing is written.
        """
        self._index.write_slots(places, table, rows)

    def lock(self, places: Any) -> None:
        """Protect each path, from its place to the root, from eviction, once more.

        places: as for `slots`. `places.handles` is written to where a place lies inside an edge: the edge is split
        there, and the new handle names the part that is locked. Unlock with the same object. O(nodes on the paths).
        Raises QueryError, StaleHandleError; then nothing is locked.
        """
        self._index.lock(places)

    def unlock(self, places: Any) -> None:
        """Take back one lock for each place. O(nodes on the paths).

        Raises QueryError where no lock ends at a place, StaleHandleError; then nothing is unlocked.
        """
        self._index.unlock(places)

    def split(self, places: Any) -> None:
        """End an edge at each place, as a lock would, and lock nothing: what is evicted later ends there.

        places: as for `lock`; handles are renewed. Raises as `lock`.
        """
        self._index.split(places)

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

        Raises QueryError, StaleHandleError, CapacityError (the batch as a whole does not fit); then nothing has
        changed.
        """
        return self._index.insert(q, slots, namespace, priority, start, inserted_lengths)

    def evict(self, num_tokens: int) -> EvictResult:
        """Free whole nodes, in the order of the policy, until `num_tokens` tokens are free or all is locked.

        Nodes without children and locks go first; a parent can go when its last child went. No more nodes are freed
        than needed. Returns the slots freed, in order. On the CPU O(log n) a node (O(n) in all with mru or a function);
        on a GPU a pass over all rows, with other policies than lru two sorts of them, and it waits for the device.
        Raises ValueError for a negative number, and MemoryError or torch.OutOfMemoryError where there is no memory for
        the slots (up to the longest node more than is wanted); then nothing has changed.
        """
        return self._index.evict(num_tokens)

    @property
    def evictable_tokens(self) -> int:
        """Cached tokens that no lock protects."""
        return self._index.evictable_tokens

    @property
    def protected_tokens(self) -> int:
        """Cached tokens under a lock."""
        return self._index.protected_tokens

    @property
    def total_tokens(self) -> int:
        """Cached tokens, evictable and protected."""
        return self._index.total_tokens

    @property
    def num_nodes(self) -> int:
        """Nodes that hold tokens."""
        return self._index.num_nodes

    @property
    def nbytes(self) -> int:
        """Bytes of the tree's tensors, those that nothing has touched yet included."""
        return self._index.nbytes

    def changes(self) -> int:
        """Another number after each call that has locked, unlocked, inserted, evicted or reset, and was not taken back.

        For a caller that is cut short itself, and wants to know whether a call that it was in has been done.
        """
        return self._index.changes()

    @property
    def last_result(self) -> MatchResult | InsertResult | EvictResult | None:
        """What the last `insert`, `evict` or `match` with `lock=True` returned.

        For a caller that was cut short before it had the result: `changes` tells whether there is one.
        """
        return self._index.last_result

    def compact(self) -> None:
        """Bring all edges to the front of the pools, without gaps; an insert does it when it must. O(cached tokens)."""
        self._index.compact()

    def content(self) -> Content:
        """The tree as arrays in host memory, to be read only: for tools. With a tree on a GPU a copy of all of it."""
        return self._index.content()

    def check(self) -> None:
        """Verify every invariant; raises AssertionError with the first that does not hold. O(cached tokens), slow."""
        check(self._index.content())

    def digest(self) -> str:
        """32 hex digits over the logical tree: paths, namespaces, slots, locks, ticks, priorities, hit counts.

        Equal for trees that went through the same calls, on any device; row numbers and places in the pools do not
        count. O(cached tokens).
        """
        return self._index.digest()

    def reset(self) -> None:
        """Drop everything, locked nodes too. Handles go stale, that of the root excepted; the clock goes on."""
        self._index.reset()

    def to(self, device: str | torch.device) -> RadixTree:
        """The tree on another device, a copy; itself if it is there. Handles stay good, digests are equal.

        Waits for the device. O(cached tokens). A slot_device goes along. Raises DeviceUnavailableError.
        """
        target = devices.preferred(device)
        if isinstance(self._index, backend.index_class(target)) and (target == self.device or devices.interpreted()):
            return self
        copy = RadixTree(
            self.max_tokens, self.page_size, target, self.policy, self.slot_device, bigram=self.bigram,
            slot_dtype=self.slot_dtype, check_slots=self._index.options.check_slots,
        )  # fmt: skip
        copy._index.restore(saved_of(self._compacted()))
        return copy

    def _compacted(self) -> Content:
        self._index.raise_pending()
        self._index.compact()
        return self._index.content()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RadixTree is neither pickled nor copied: use save() and RadixTree.load()")

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the tree to a file or an open binary file, all but a policy function. O(cached tokens)."""
        snapshot.write(path, self._compacted())

    @staticmethod
    def load(
        path: str | os.PathLike[str] | IO[bytes],
        device: str | torch.device = "auto",
        slot_device: str | torch.device | None = None,
        policy: Score | None = None,
    ) -> RadixTree:
        """The tree of a file that `save` wrote. The handles that the saved tree had given out are good in it.

        policy: the function of a tree that was saved with one. Files are trusted: load only your own.
        Raises ValueError for a file that is damaged or none.
        """
        settings, saved = snapshot.read(path, policy)
        with snapshot.damaged(path):
            tree = RadixTree(device=device, slot_device=slot_device, **settings)
            tree._index.restore(saved)
        return tree

    def raise_pending(self) -> None:
        """Wait for all calls so far and raise the error of the first that was refused since the last time, if any.

        On the CPU there is nothing to wait for: every error was raised by its own call.
        """
        self._index.raise_pending()

    def __repr__(self) -> str:
        return (
            f"RadixTree({self.total_tokens} of {self.max_tokens} tokens in {self.num_nodes} nodes, "
            f"{self.protected_tokens} locked, page_size={self.page_size}, {self.device})"
        )
