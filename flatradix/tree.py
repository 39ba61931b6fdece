"""RadixTree: the prefix cache's index, one class whatever the device. Says what every operation means.

`host_tree.HostTree` and `device_tree.DeviceTree`, one of which every tree is, carry the operations out: they read what
callers pass, call the one kernel package of their device, and name the results. What has only a docstring here is
theirs.
"""

from __future__ import annotations

import os
import secrets
from typing import IO, Any, NoReturn

import torch

from flatradix import backend
from flatradix import policy as policies
from flatradix.arguments import check_sizes, check_slot_device
from flatradix.errors import TooLargeForDeviceError
from flatradix.kernels.scalar import GENERATION_BITS
from flatradix.layout import TreeState
from flatradix.namespaces import Namespaces
from flatradix.policy import Policy
from flatradix.ragged import Ragged
from flatradix.results import EvictResult, InsertResult, MatchResult


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
        each, or a function from `flatradix.Nodes` to a tensor of scores, of which the lowest goes first (equal scores:
        the least recent). On the CPU a function and "mru" score every node at each eviction; the others cost O(log n) a
        node.
    slot_device: None keeps the slots beside the index. With an index on the CPU, a device keeps them there, in a pool
        of their own; with one on a GPU, it is where slots are returned.
    bigram: keys of EAGLE: unit i is the pair (t[i], t[i + 1]), n tokens are n - 1 units. All lengths count units; an
        insert still takes one slot a token, and ignores the last.
    slot_dtype: torch.int32 takes slots up to 2**31 - 1 in 4 bytes each, torch.int64 any in 8.

    On a GPU, match, lock, unlock, insert and write_slots enqueue their kernels on torch's current stream and return;
    results are tensors on the device. What only the device can know is then found by the kernels: a call with a bad
    query has no effect, its places are -1, and the error is raised by the next operation that waits for the device:
    `raise_pending`, the sizes, `slots`, `evict`, `check`, `digest`, `save`, `to`, and `length` and the like of a
    result. A CUDA graph can hold match, lock and unlock, once a batch of that size has been run outside it.

    Raises ValueError for arguments out of range, DeviceUnavailableError for a device that cannot be used.
    """

    check_slots = True
    """Whether an insert looks at slots that lie on a slot device, for which it waits for that device. Set it to False
    where they are known to be good; an index on the CPU then never waits for a GPU. Other slots are always checked."""

    def __init_subclass__(cls) -> None:
        if not cls.__module__.startswith("flatradix."):
            raise TypeError("RadixTree is not made to be subclassed: which class a tree has depends on its device")

    def __new__(cls, *arguments: Any, **keywords: Any) -> RadixTree:
        if cls is not RadixTree:
            return super().__new__(cls)
        device = keywords.get("device", arguments[2] if len(arguments) > 2 else "auto")
        return super().__new__(_class_for(backend.resolve(device)))

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
        self._policy_code, self._score = policies.resolve(policy)
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
        try:
            with torch.inference_mode(False):  # its tensors would belong to that mode for ever
                self._allocate(generation)
        except (torch.OutOfMemoryError, TooLargeForDeviceError) as error:
            if device != "auto" or not backend.is_free_to_choose():
                raise
            backend.logger.warning("device auto takes the CPU: %s", str(error).splitlines()[0])
            self._become_host_tree(generation)

    def _become_host_tree(self, generation: int) -> None:
        """What `device="auto"` does where the GPU has no room for the tree."""
        self.__class__ = _class_for(torch.device("cpu"))
        self.device = torch.device("cpu")
        self._kernels = backend.kernels_for(self.device)
        self._allocate(generation)

    def _allocate(self, generation: int) -> None:
        """Make the tensors of an empty tree."""

    _state: TreeState
    _namespaces: Namespaces
    _pool: torch.Tensor  # the slot pool, on whatever device it is

    def _compact(self) -> None:
        """Bring all edges to the front of the pools, without gaps. O(cached tokens)."""

    def _rebuild(self) -> None:
        """Make what is derived, after rows and pools were filled from a file or another tree."""

    def _first_unit(self) -> int:
        """Where the pools begin once they are compacted."""

    def match(
        self, q: Any, namespace: Any = None, touch: bool = True, lock: bool = False, start: Any = None
    ) -> MatchResult:
        """The longest cached prefix of each query.

        q: a Ragged, a list of integer sequences (lists, `array`, numpy, tensors), or one flat sequence. int32 and int64
            buffers are read in place. With a tree on a GPU, tensors there and pinned ones are read after the call has
            returned: in the order of the stream, and for pinned ones until `raise_pending`.
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

    def slots(self, places: Any) -> Ragged:
        """The KV slots of each match: a Ragged of int64 on the slot device, one value a token of the matched length.

        places: a result of match or insert, or anything with .handles and .lengths. O(slots). Raises ValueError,
        StaleHandleError.
        """

    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None:
        """Write the KV slots of each match into a row of a table, as an engine keeps them for its running requests.

        places: as for `slots`. table: int32 or int64 [N, width] on the slot device, rows of contiguous elements;
            `table[rows[i], :length]` are written, the rest stays. rows: int32 or int64 [B] (or a list), all different.

        On a GPU one launch, no synchronisation; a tree on the CPU waits for rows that lie on a GPU. O(slots). Raises
        ValueError (a row outside the table, a place longer than a row, int32 for slots of 64 bits), StaleHandleError;
        then nothing is written.
        """

    def lock(self, places: Any) -> None:
        """Protect each path, from its place to the root, from eviction, once more.

        places: as for `slots`. `places.handles` is written to where a place lies inside an edge: the edge is split
        there, and the new handle names the part that is locked. Unlock with the same object. O(nodes on the paths).
        Raises ValueError, StaleHandleError; then nothing is locked.
        """

    def unlock(self, places: Any) -> None:
        """Take back one lock for each place. O(nodes on the paths).

        Raises ValueError where no lock ends at a place, StaleHandleError; then nothing is unlocked.
        """

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

    def evict(self, num_tokens: int) -> EvictResult:
        """Free whole nodes, in the order of the policy, until `num_tokens` tokens are free or all is locked.

        Nodes without children and locks go first; a parent can go when its last child went. No more nodes are freed
        than needed. Returns the slots freed, in order. On the CPU O(log n) a node (O(n) in all with mru or a function);
        on a GPU a pass over all rows, with other policies than lru two sorts of them, and it waits for the device.
        Raises ValueError for a negative number, and torch.OutOfMemoryError where a device has no memory for the slots
        (up to the longest node more than is wanted); then nothing has changed.
        """

    @property
    def evictable_tokens(self) -> int:
        """Cached tokens that no lock protects."""

    @property
    def protected_tokens(self) -> int:
        """Cached tokens under a lock."""

    @property
    def total_tokens(self) -> int:
        """Cached tokens, evictable and protected."""
        return self.evictable_tokens + self.protected_tokens

    @property
    def num_nodes(self) -> int:
        """Nodes that hold tokens."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tree's tensors, those that nothing has touched yet included."""

    def check(self) -> None:
        """Verify every invariant; raises AssertionError with the first that does not hold. O(cached tokens), slow."""
        from flatradix.check import check

        check(self)

    def digest(self) -> str:
        """32 hex digits over the logical tree: paths, namespaces, slots, locks, ticks, priorities, hit counts.

        Equal for trees that went through the same calls, on any device; row numbers and places in the pools do not
        count. O(cached tokens).
        """

    def reset(self) -> None:
        """Drop everything, locked nodes too. Handles go stale, that of the root excepted; the clock goes on."""

    def to(self, device: str | torch.device) -> RadixTree:
        """The tree on another device, a copy; itself if it is there. Handles stay good, digests are equal.

        Waits for the device. O(cached tokens). A slot_device goes along. Raises DeviceUnavailableError.
        """
        target = backend.resolve(device)
        if isinstance(self, _class_for(target)) and (target == self.device or backend.interpreted()):
            return self
        from flatradix.snapshot import copy_to

        return copy_to(self, target)

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

    def raise_pending(self) -> None:
        """Wait for all calls so far and raise the error of the first that was refused since the last time, if any.

        On the CPU there is nothing to wait for: every error was raised by its own call.
        """

    def __repr__(self) -> str:
        return (
            f"RadixTree({self.total_tokens} of {self.max_tokens} tokens in {self.num_nodes} nodes, "
            f"{self.protected_tokens} locked, page_size={self.page_size}, {self.device})"
        )


def _class_for(device: torch.device) -> type[RadixTree]:
    if device.type == "cpu":
        from flatradix.host_tree import HostTree

        return HostTree
    from flatradix.device_tree import DeviceTree

    return DeviceTree
