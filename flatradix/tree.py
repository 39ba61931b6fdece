"""RadixTree: the tree of a prefix cache, one class for all devices. Its docstrings define every operation.

An index does the work: `host/index.py` or `device/index.py`.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable
from typing import IO, Any, NoReturn, TypeVar, overload

import torch

from flatradix import backend
from flatradix.dropping import NOT_GIVEN
from flatradix.index import Index
from flatradix.inputs import devices
from flatradix.inputs.options import OnEvict, read_options
from flatradix.inputs.policy import Policy, Score
from flatradix.inputs.ragged import Ragged
from flatradix.inspect.content import Content, saved_of
from flatradix.layout.numbers import CLOCK, LAST_CALL
from flatradix.results import EvictIntoResult, EvictResult, InsertResult, MatchResult

T = TypeVar("T")

# Bound to each tree from its index: one more Python call would be a visible part of the time of a short match.
_HOT = ("match", "match_array", "path_slots", "lock", "unlock", "insert", "evict", "changes")


def _uses(content: Content) -> tuple[int, int]:
    """Return numbers that are different after each call that uses a tree in host memory, whose arrays these are."""
    return content.number(CLOCK), content.number(LAST_CALL)


class RadixTree:
    """A radix tree over token ids. It holds a KV slot for each cached token.

    Every operation takes a batch and means the same as single calls in batch order. A batch of one stays cheap: on the
    CPU, a call with a short key takes 1 us from Python to Python. One thread at a time: a call while another thread is
    in one raises RuntimeError (docs/guarantees.md). A lock of the caller's own around each call is enough.

    max_tokens: the number of tokens that can be cached; None lets the tree grow, see below. The tree commits two pools
        for 1.25 times as many tokens at once: 10 bytes for each of max_tokens (15 with bigrams), twice that on a GPU.
        Nodes take up to 160 bytes for each page, committed only as nodes use them. On a GPU they take 250 bytes for
        each page, committed at once.
    page_size: tokens in a page. Keys are cut down to whole pages, and all lengths are multiples of `page_size`.
    device: where the index lives: "cpu", "cuda", "cuda:1" or "auto". The variable FLATRADIX_DEVICE overrides "auto".
    policy: what `evict` frees first: "lru", "lfu", "slru", "fifo", "mru", "filo" or "priority", as SGLang defines them;
        `flatradix.slru(protected_threshold=...)`; or a function from `flatradix.Nodes` to a tensor of scores. The
        node with the lowest score goes first; of equal scores, the least recently used node. On the CPU, "mru" and a
        function score every node at each eviction; the other policies cost O(log n) a node. The function sees the
        nodes alone: a call of the tree in it raises RuntimeError.
    slot_device: where the slots are. None keeps the slots beside the index. An index on the CPU keeps them in a pool on
        this device. An index on a GPU keeps them beside itself and returns them on this device.
    bigram: keys for EAGLE. Unit i is the pair (t[i], t[i + 1]), so n tokens are n - 1 units. All lengths count units.
        An insert still takes one slot a token and ignores the last slot.
    slot_dtype: the dtype of stored and returned slots. torch.int32 holds slots up to 2**31 - 1 in 4 bytes each,
        torch.int64 holds any slot in 8 bytes.
    evict_by: "node" or "page": what an eviction frees of its last node. By node it is the whole node, as in SGLang. By
        page it is only as many pages from the end of the node as are still needed, which keeps more in a tight pool.
    on_evict: a function that is called with (namespace, tokens, slots) for each victim of an eviction, in order, before
        `evict` returns the slots: see `evict`.
    pin_budget: the most tokens that soft pins may spare at a time, each counted once however many pins it has; None is
        no limit. See `want`.
    check_slots: whether an insert checks slots that lie on a slot device. The check waits for that device. With False,
        an index on the CPU never waits for a GPU; use False only if these slots are known to be good. Slots elsewhere
        are always checked.

    On a GPU, match, lock, unlock, split, insert, write_slots and evict with `out` enqueue their kernels on torch's
    current stream and return. Their results are tensors on the device. Some errors in a query are found only by the
    kernels. A call with such an error has no effect, and its lengths and handles are -1. The next operation that waits
    for the device raises the error: `raise_pending`, the sizes, `slots`, `evict`, `check`, `digest`, `save`, `to`, and
    `length`, `handle` and `prefix_length` of a result. `capture` runs such calls as a CUDA graph.

    A tree without `max_tokens` begins with space for 4096 tokens. An insert that needs more moves the tree to arrays at
    least twice as large: O(cached tokens), so O(1) for each token that was ever inserted. Meanwhile the old and the new
    arrays take memory. Handles, locks and waiting queues stay, and every call has the results that it has in a tree
    that was large enough from the beginning. The tree never shrinks. CapacityError comes only at the largest size that
    there can be: 1.7e9 tokens, 8.5e8 on a GPU, and 2.6e8 pages. On a GPU, the host counts all tokens of inserts as new
    until it waits for the device, which it does before the tree grows. So the tree may grow before it must. Once a CUDA
    graph holds calls of the tree, it cannot grow: an insert that may not fit raises RuntimeError.

    A call that raises has changed nothing, even if a signal handler or a lack of memory interrupted it: the next call
    undoes what the interrupted call did. Times of use, hit counts, priorities and splits of edges are not undone. The
    slots that an interrupted eviction freed are returned by the next eviction. An interrupted reset is not undone. A
    call from a signal handler within another call raises RuntimeError.

    Raises ValueError for arguments out of range, DeviceUnavailableError for a device that cannot be used.
    """

    def __init_subclass__(cls) -> None:
        raise TypeError("RadixTree is not made to be subclassed: wrap it")

    def __init__(
        self,
        max_tokens: int | None = None,
        page_size: int = 1,
        device: str | torch.device = "auto",
        policy: Policy = "lru",
        slot_device: str | torch.device | None = None,
        *,
        bigram: bool = False,
        slot_dtype: torch.dtype = torch.int32,
        check_slots: bool = True,
        evict_by: str = "node",
        on_evict: OnEvict | None = None,
        pin_budget: int | None = None,
    ) -> None:
        options = read_options(
            max_tokens, page_size, policy, slot_device, bigram, slot_dtype, check_slots, evict_by, on_evict, pin_budget
        )
        self._take(backend.open_index(options, device))

    @classmethod
    def over(cls, index: Index) -> RadixTree:
        """Return the tree of an index, for other parts of this library."""
        self = cls.__new__(cls)
        self._take(index)
        return self

    def _take(self, index: Index) -> None:
        self._index, options = index, index.options
        self.max_tokens = None if options.grows else options.max_tokens
        self.page_size = options.page_size
        self.policy = options.policy
        self.bigram = options.bigram
        self.evict_by = options.evict_by
        self.slot_dtype = options.slot_dtype
        self.slot_device = options.slot_device
        self.device = self._index.device
        for name in _HOT:
            bound = getattr(self._index, name)
            bound.__func__.__doc__ = getattr(RadixTree, name).__doc__  # for help(tree.match)
            setattr(self, name, bound)

    @property
    def index(self) -> Index:
        """The index that does the work, for other parts of this library."""
        return self._index

    def match(
        self,
        q: Any,
        namespace: Any = None,
        touch: bool = True,
        lock: bool = False,
        start: Any = None,
        split: bool = False,
    ) -> MatchResult:
        """Find the longest cached prefix of each query.

        q: a Ragged, a list of integer sequences (lists, `array`, numpy, tensors), or one flat sequence. An empty list
            is one empty sequence; an empty Ragged is a batch of none. int32 and int64 buffers are read in place. A tree
            on a GPU reads tensors on the device, and pinned tensors, in stream order after the call has returned. So
            leave a pinned tensor unchanged until `raise_pending`.
        namespace: None, a str, bytes or an integer of 64 bits for all queries, or a list with one for each query. Names
            of different types differ: 1 is not "1".
        touch: whether each path becomes the most recently used. Without `touch`, `lock` and `split`, a call leaves no
            trace.
        lock: also lock each path when it is found, as `lock` does.
        start: places to continue from: the result of a match or insert. q then holds only the tokens after these
            places, and only these tokens are compared. Lengths still count from the root, and a touch still reaches the
            whole path. A start of length 0 is the root and knows no namespace: pass `namespace` every time. With
            bigrams, the first token of q is the last token of its start.
        split: also split an edge where a match ends, as `split` does.

        O(length of the match) a query; 0.12 ns a token on a long edge. Without `lock` and `split`, the shape of the
        tree does not change. A key is checked only as far as it is read: up to and including the first page that is
        not cached.

        Raises QueryError (a bad token or query), StaleHandleError (a start that is gone). Then nothing has changed.
        """
        return self._index.match(q, namespace, touch, lock, start, split)

    def match_array(
        self, tokens: array[int], limit: int | None = None, namespace: Any = None, split: bool = False
    ) -> MatchResult:
        """Match the first `limit` tokens (None: all) of one `array` of int64 ("q"). A tree on the CPU does not copy it.

        For look-ups that must cost as little as possible. Raises the errors of `match`, and ValueError for an array of
        another type.
        """
        return self._index.match_array(tokens, limit, namespace, split)

    def slots(self, places: Any) -> Ragged:
        """Return the KV slots of each place: a Ragged of slot_dtype on the slot device, one value a unit of length.

        places: a result of match or insert, or any object with .handles and .lengths. O(slots). Raises QueryError,
        StaleHandleError.
        """
        return self._index.slots(places)

    def tokens(self, places: Any) -> Ragged:
        """Return the tokens of each place: a Ragged of int32 beside the index; of bigrams, the first token of each.

        places: as for `slots`. O(tokens). Raises as `slots`.
        """
        return self._index.tokens(places)

    def path_slots(self, place: Any) -> torch.Tensor:
        """Return the KV slots of a single place: [length] of slot_dtype on the slot device. Raises as `slots`."""
        return self._index.path_slots(place)

    def write_slots(self, places: Any, table: torch.Tensor, rows: Any) -> None:
        """Write the KV slots of each place into a row of `table`, such as an engine's table of its running requests.

        places: as for `slots`. table: int32 or int64 [N, width] on the slot device; the elements of a row are
            contiguous. `table[rows[i], :length]` is written, the rest stays. rows: int32 or int64 [B] (or a list), all
            different.

        On a GPU: one launch, no synchronisation. A tree on the CPU waits if `rows` lies on a GPU. O(slots). Raises
        QueryError (a row outside the table, a place longer than a row), ValueError (an int32 table for int64 slots),
        StaleHandleError. Then nothing is written.
        """
        self._index.write_slots(places, table, rows)

    def lock(self, places: Any) -> None:
        """Add one lock to each path, from its place up to the root. Locked nodes are not evicted.

        places: as for `slots`. If a place lies inside an edge, the edge is split there, and the handle of the locked
        part is written to `places.handles`. Unlock with the same object. On a GPU, leave the tensors of `places`
        unchanged until the next call: if this call is interrupted, they tell what to undo. O(nodes on the paths).
        Raises QueryError (also for more than 2**30 locks of a node), StaleHandleError. Then nothing is
        locked.
        """
        self._index.lock(places)

    def unlock(self, places: Any) -> None:
        """Remove one lock from each path, from its place up to the root. O(nodes on the paths).

        Raises QueryError (no lock ends at a place), StaleHandleError. Then nothing is unlocked.
        """
        self._index.unlock(places)

    def split(self, places: Any) -> None:
        """Split the edge at each place, as `lock` does, but lock nothing.

        A later eviction can then free what is below a place and keep what is above. places: as for `lock`; handles are
        renewed. Raises as `lock`.
        """
        self._index.split(places)

    def rematch(self, q: Any, places: Any, namespace: Any = None) -> MatchResult:
        """Find the longest cached prefix of keys that were matched before, from where they ended then.

        q, namespace: the whole keys, as for `match`. places: the results of an earlier match or rematch of these very
        keys, with `handles` and `lengths`. Tokens up to a place are not compared again. If a place is gone, or
        was dropped, its key is matched from the root. Touches nothing: the result is that of `match(q, namespace,
        touch=False)`.

        O(nodes above the place of each key + tokens behind it). Raises QueryError.
        """
        return self._index.rematch(q, places, namespace)

    def alive(self, places: Any) -> torch.Tensor:
        """Return whether each place is still in the tree, and was not dropped: bool [B] on the tree's device.

        places: as for `slots`.
        """
        return self._index.alive(places)

    def want(self, places: Any, until: Any = None) -> None:
        """Add a soft pin to each path, from its place up to the root: `evict` spares wanted nodes as long as it can.

        For prefixes that will be used again, such as those of an agent's sessions or of prompt templates. An eviction
        first frees nodes that nobody wants, however recently they were used. It frees wanted nodes, in the order of the
        policy, only when nothing else is left.

        places: as for `lock`. Edges are split at places, and handles renewed, in the same way. A want ends with
        `unwant`, or when its place is evicted; the nodes above then lose it too. With `evict_by="page"` a place is also
        evicted where its node loses its last pages: what is left of the node is then not wanted any more. A want is not
        saved or copied by `to`, with or without an end, and does not count in the digest.

        until: when the wants end, at the latest: a number, or one a place, in any unit (ticks, seconds of a clock) of
            which `expire` is then told the time. None is no such end. Kept as float64, until `expire` or an `unwant`
            finds them over. On a GPU, a call with `until` waits for the device.

        With `pin_budget`, a call after which more tokens would be wanted is refused. Each token on a wanted path
        counts once, so pins that share a prefix, or renew one another, pay for it once; what ends gives its tokens
        back at once. What a WaitingQueue keeps does not count. Such a call costs O(nodes of the tree), and on a GPU it
        waits for the device.

        O(nodes on the paths), with `until` also O(wants with an end). Raises QueryError, StaleHandleError, ValueError
        (a bad `until`), CapacityError (the budget; the message says by how much). Then nothing is wanted.
        """
        self._index.want(places, until)

    def unwant(self, places: Any, until: Any = None) -> None:
        """Remove one want from each path. Stale places are skipped: their wants ended when they were evicted.

        until: for wants with an end, what `want` was given, so that of several wants at a place the right one goes.
            Without it, a want without an end goes; if there is none, the want that ends first.

        O(nodes on the paths). While there are wants with an end, also O(wants with an end), and a call on a GPU waits
        for the device and copies the nodes. Raises QueryError (no want ends at a place, or none with this `until`).
        Then nothing has changed.
        """
        self._index.unwant(places, until)

    def expire(self, now: Any) -> int:
        """Remove the wants whose `until` is at most `now`, and return how many that were.

        Wants that ended earlier, with `unwant` or because their place was evicted, are not counted. The tree has no
        clock: a want goes on until this is called, so call it often, at least before evictions that should know.

        O(wants with an end + nodes on the paths of those that are removed). On a GPU, waits for the device if there
        are wants with an end. Raises ValueError for what is no number.
        """
        return self._index.expire(now)

    def insert(
        self,
        q: Any,
        slots: Any,
        namespace: Any = None,
        priority: Any = 0,
        start: Any = None,
        inserted_lengths: Any = 0,
    ) -> InsertResult:
        """Cache each key with its slots. Tokens that are cached already keep their slots.

        q, namespace, start: as for `match`. slots: one slot for each token of q, as a Ragged, a list of integer
        sequences, or one flat sequence. priority: an int (None is 0), or one a query; each node of the path keeps the
        greatest. inserted_lengths: an int, or one a query: the length that the same request inserted before. No hit is
        counted on nodes that end within this length.

        If several queries of the batch share new tokens, the slots of the first of these queries are stored. O(length
        of the key), counted from `start`; 131072 new tokens take about 0.1 ms.

        Raises QueryError, StaleHandleError, CapacityError (the batch as a whole does not fit). Then nothing has
        changed.
        """
        return self._index.insert(q, slots, namespace, priority, start, inserted_lengths)

    @overload
    def evict(self, num_tokens: Any) -> EvictResult: ...

    @overload
    def evict(self, num_tokens: Any, out: torch.Tensor) -> EvictIntoResult: ...

    def evict(self, num_tokens: Any, out: torch.Tensor | None = None) -> EvictResult | EvictIntoResult:
        """Free whole nodes, in the order of the policy, until `num_tokens` tokens are freed or the rest is locked.

        With `evict_by="page"` the last of these nodes loses only as many pages from its end as are still needed, if it
        has more. It stays a node with its tick, priority and hit count, and its handle stays good. Places beyond its
        new end are stale.

        out: a contiguous tensor [M] of slot_dtype on the slot device. The freed slots are written to its beginning, the
        rest stays, and the result is an `EvictIntoResult`, whose numbers are tensors. If the slots do not fit, nothing
        is evicted; they are at most `num_tokens` and those of the longest node, or by page, `num_tokens` in whole
        pages. On a GPU such a call does not wait and may be part of a CUDA graph, but with `on_evict` it waits; on the
        CPU, it is rehearsed on a copy of the nodes, O(max_tokens / page_size), unless M is larger than may be needed.
        num_tokens: with `out`, a tree on a GPU also takes an int64 tensor of one element there, which its kernel reads.
        Leave both unchanged until the next call: if this call is interrupted, the slots are read from `out`.

        Nodes that are wanted go last: first those that a `WaitingQueue` with `keep=True` wants, then those of `want`.

        Only nodes without children and locks are freed; a parent can follow once its last child is freed. No more nodes
        are freed than needed. Returns the freed slots in the order of eviction.

        On the CPU: O(log n) a node; with mru or a function, O(n log n) in all. On a GPU: one or a few passes over all
        rows, and two sorts of all rows with policies other than lru; the call waits for the device.

        `on_evict` of the tree is called for each victim, in this order, when the index no longer holds any of them and
        before the slots are returned: with the namespace; with the key as an int32 array of numpy [N], from the root to
        the end of what was freed (N + 1 tokens for N units with bigrams); and with the freed slots, the last of the
        key, a part of the slots that `evict` returns: do not write to them. What it calls on this tree raises
        RuntimeError. If the function raises an Exception, the other victims are told nevertheless, then `evict` raises
        the first one. The eviction stands: the next eviction, `evict(0)` too, returns its slots. If anything else
        interrupts the call, the next eviction also tells the victims that were not told, and the one that was under way
        again. A reset tells nothing. Costs what the paths of the victims have in tokens; on a GPU, a copy of the nodes.

        Raises ValueError for a negative number, and for an `out` that is too small or of the wrong kind. Raises
        MemoryError or torch.OutOfMemoryError if there is no memory for the returned slots, which can exceed
        `num_tokens` by the longest node, or by a page. Then nothing has changed.
        """
        return self._index.evict(num_tokens, out)

    def drop(self, places: Any = None, namespace: Any = NOT_GIVEN) -> EvictResult:
        """Drop prefixes, or a namespace: from now on no look-up finds them. What no lock protects is freed at once.

        For an adapter that is loaded anew, or a tenant that is deleted. Give one of both arguments.

        places: as for `slots`, each of length 1 or more. The node on whose edge a place lies is dropped as a whole,
            with all nodes below; call `split` first to keep what is above a place.
        namespace: one name, None for keys without a namespace. Everything in it is dropped.

        Dropped nodes under a lock stay until they are unlocked. Their handles remain good for `unlock`, `slots`,
        `write_slots` and the like, and for `start=`: who holds a place goes on from it, and what is inserted there is
        dropped, too. A look-up from the root finds none of it, and an insert of the same key makes new nodes beside.
        Once unlocked, what was dropped goes before all else in evictions, with any policy; the next `drop` frees all of
        it. Wants of dropped nodes end; `want` and `unwant` skip dropped places; `alive` says False for them.

        Returns the slots that were freed, in the order in which an eviction would free them; `on_evict` is called as
        for `evict`. If the call is interrupted, the next eviction or drop returns its slots, as for `evict`.

        O(nodes x log of the depth). On a GPU, the call waits for the device and plans on the host, with a copy of the
        nodes; a CUDA graph cannot hold it. As long as dropped nodes are left there, evictions by lru cost what other
        policies cost. Raises ValueError unless one of both arguments is given, QueryError (a place of length 0, or of a
        length that is not there), StaleHandleError. Then nothing has changed.
        """
        return self._index.drop(places, namespace)

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
        """Bytes of the tree's tensors, including memory that has not been touched yet."""
        return self._index.nbytes

    def changes(self) -> int:
        """Return a number that is different after each call that locked, unlocked, inserted, evicted, dropped or reset.

        A call that was interrupted and undone does not count. For a caller that was interrupted itself, inside a call:
        the number tells whether that call took effect.
        """
        return self._index.changes()

    @property
    def last_result(self) -> MatchResult | InsertResult | EvictResult | EvictIntoResult | None:
        """The result of the last `insert`, `evict` or `match` with `lock=True`.

        For a caller that was interrupted before it received the result. `changes` tells whether there is a new result.
        """
        return self._index.last_result

    def compact(self) -> None:
        """Move all edges to the front of the pools, without gaps. `insert` does so when it must. O(cached tokens)."""
        self._index.compact()

    def content(self, slots: bool = True) -> Content:
        """Return the tree as arrays in host memory, for tools. Do not write to them.

        slots: whether the slots are wanted; without them `Content.slots` is empty. What lies on a GPU is copied whole.
        """
        return self._index.content(slots)

    def check(self) -> None:
        """Verify every invariant, and that no path has a slot twice: no insert looks for slots that it brings twice.

        Raises AssertionError for the first that does not hold. O(n log n) for n cached tokens, slow.
        """
        from flatradix.inspect.check import check  # not wanted by most

        self._index.look_at(check)

    def digest(self) -> str:
        """Return 32 hex digits over the logical tree: paths, namespaces, slots, locks, ticks, priorities, hit counts.

        Trees that went through the same calls have equal digests, on any device. Row numbers and positions in the pools
        do not count. O(cached tokens).
        """
        return self._index.digest()

    def capture(self, function: Callable[[], T]) -> Callable[[], T]:
        """Return a function `step`: each `step()` runs `function()` once, on a GPU as a CUDA graph.

        For a step of an engine in which the same calls come again and again, with the same shapes, on the same tensors:
        the GPU then runs all of their kernels without Python between. `function` takes nothing and calls torch and this
        tree: match, lock, unlock, insert, write_slots, and evict with `out`. Its inputs are tensors on the device,
        which the caller fills before each step; no namespaces. The first two steps run `function` as it is, to compile
        what it needs. The third captures it. From then on its Python does not run, and each step returns the result of
        the capture, in whose tensors the numbers are new. Steps enqueue their work on torch's current stream and
        return; errors come with the next call that waits.

        On the CPU, and with interpreted kernels, each step runs `function`. On a GPU, an insert needs a tree with
        `max_tokens`, and an eviction one without `on_evict` and without a WaitingQueue that keeps. The third step
        raises RuntimeError for what a graph cannot hold, and has then run nothing.
        """
        return self._index.capture(function)

    def reset(self) -> None:
        """Drop everything, including locked nodes. All handles but the root's become stale. The clock goes on."""
        self._index.reset()

    def to(self, device: str | torch.device) -> RadixTree:
        """Return a copy of the tree on another device, or the tree itself if it is there already.

        Handles stay valid in the copy, and digests are equal. What either tree gives a handle to from then on is stale
        in the other. The copy has the same slot_device. Waits for the device. O(cached tokens). Raises
        DeviceUnavailableError.
        """
        target = devices.preferred(device)
        same_kind = isinstance(self._index, backend.index_class(target, paged=False))
        if same_kind and (target == self.device or devices.interpreted()):
            return self
        copy = RadixTree(
            self.max_tokens, self.page_size, target, self.policy, self.slot_device, bigram=self.bigram,
            slot_dtype=self.slot_dtype, check_slots=self._index.options.check_slots, evict_by=self.evict_by,
            on_evict=self._index.options.on_evict, pin_budget=self._index.options.pin_budget,
        )  # fmt: skip
        self._index.raise_pending()
        copy._index.restore(self._index.look_at(saved_of, compacted=True))
        return copy

    def __reduce__(self) -> NoReturn:
        raise TypeError("a RadixTree is neither pickled nor copied: use save() and RadixTree.load()")

    def save(self, path: str | os.PathLike[str] | IO[bytes]) -> None:
        """Write the tree to a file or an open binary file. A policy function is not saved. O(cached tokens).

        A file is replaced as a whole, when the new one is on disk: a reader finds the old file or the new one, also
        after a call that raised and after a crash, and several processes may save to one path. A new file can be read
        by its owner alone (mode 0600), as it holds the tokens of prompts; a file that is replaced keeps its mode. A
        symbolic link stays a link. A process that is killed may leave a file `.NAME.*.part` behind. In an open file,
        the tree stands from the present position on.

        Raises OSError for a path that cannot be written, RuntimeError if a signal handler or another thread used the
        tree meanwhile.
        """
        from flatradix.inspect import snapshot

        self._index.raise_pending()
        content, before = self._index.look_at(lambda content: (content, _uses(content)), compacted=True)
        with snapshot.writing(path, content):
            if _uses(content) != before:
                raise RuntimeError(
                    "the tree was changed while it was saved, as by a signal handler or another thread: save it again"
                )

    @staticmethod
    def load(
        path: str | os.PathLike[str] | IO[bytes],
        device: str | torch.device = "auto",
        slot_device: str | torch.device | None = None,
        policy: Score | None = None,
        on_evict: OnEvict | None = None,
        most_tokens: int | None = None,
        pin_budget: int | None = None,
    ) -> RadixTree:
        """Return the tree of a file that `save` wrote.

        A handle that the saved tree had given out before the save is valid in the loaded tree until its node is
        evicted there. A handle that the saved tree, or another tree loaded from the file, gives to a node that is new
        after the save is stale in the loaded tree, and the other way round.

        policy: the policy function, if the saved tree had one. on_evict, pin_budget: as for a new tree. most_tokens:
        refuse a tree that takes memory for more tokens; None refuses only a tree that this machine has no memory for.
        The memory follows from `max_tokens` of the saved tree, so a small file may ask for much: give it for files of
        strangers.

        Every value is verified before it is used, so a file of a stranger is safe to load, though it may hold any
        tokens and slots. O(cached tokens + n log n of the nodes). Raises ValueError, with the file and the reason, for
        a file that is damaged, of another version of flatradix, or not written by `save`.
        """
        from flatradix.inspect import snapshot

        settings, saved = snapshot.read(path, policy, most_tokens)
        tree = RadixTree(device=device, slot_device=slot_device, on_evict=on_evict, pin_budget=pin_budget, **settings)
        tree._index.restore(saved)
        return tree

    def raise_pending(self) -> None:
        """Wait for all calls so far, and raise the error of the first refused call that was not reported yet, if any.

        On the CPU there is nothing to wait for: every call raises its own errors.
        """
        self._index.raise_pending()

    def __repr__(self) -> str:
        most = "" if self.max_tokens is None else f" of {self.max_tokens}"
        return (
            f"RadixTree({self.total_tokens}{most} tokens in {self.num_nodes} nodes, "
            f"{self.protected_tokens} locked, page_size={self.page_size}, {self.device})"
        )
