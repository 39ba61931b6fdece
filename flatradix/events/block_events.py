"""BlockEvents: tells routers which blocks of tokens are cached."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from flatradix.events.blocks import Block, Hash, HashFunction, RootFunction, chain_hash, root_hash
from flatradix.events.edges import FIELDS, NO_NODES, Edges, Nodes, changed_rows, difference
from flatradix.gate import CUT_SHORT, FREE, add_gate, public_call, take_gate
from flatradix.inputs.arguments import positive
from flatradix.inspect.content import Content
from flatradix.layout import numbers
from flatradix.tree import RadixTree

if TYPE_CHECKING:
    from flatradix.cache.prefix_cache import PrefixCache

Event = Callable[[], object]


class _Change(NamedTuple):
    """What one look found. Applied in steps that may be repeated.

    rows, nodes: the rows that changed, int64 [N], and the nodes on them now. hashes: of such rows, None where there is
    no node any more. counts: how many cached blocks have a hash, where the number changed. pending: what is to be told
    after that. seen: how many events the tree had written.
    """

    rows: np.ndarray
    nodes: Nodes
    hashes: dict[int, list[Hash] | None]
    counts: dict[Hash, int]
    pending: tuple[Event, ...]
    seen: int


def _pairs(rows: np.ndarray, starts: np.ndarray, mask: np.ndarray) -> Iterable[tuple[int, int]]:
    return zip(rows[mask].tolist(), starts[mask].tolist(), strict=True)


class BlockEvents:
    """Tells two functions which blocks of tokens a tree has cached, and which it has evicted, since the last `update`.

    For a router that sends a request to the server with the longest cached prefix. Block k of a key is its tokens from
    k * block_size to (k + 1) * block_size. It is cached if all of its tokens and all before it are, on however many
    nodes they lie; so it comes with its last token, and goes with its last token.

    tree: a RadixTree or a PrefixCache, on any device. It is only read, and does not know of its BlockEvents: without an
        `update` nothing costs anything, and a tree may have several.
    block_size: units (tokens; pairs with bigrams) in a block: a multiple of the page size. None is the page size.
    on_stored: called with a list of `Block`: blocks that are cached now and were not told, parents before children.
    on_removed: called with a list of hashes that were told before and name no cached block any more, children first.
    hash: returns the hash of a block, an int, bytes or a str: hash(parent, tokens), where `parent` is the hash of the
        block before, and for a first block `root(namespace)`. tokens: as in `Block`. It must depend on nothing else,
        and cannot call the tree. The default is a chain of 64 bits, `flatradix.events.blocks.chain_hash`.
    root: returns the parent of the first blocks of a namespace. The default gives each namespace blocks of its own.

    If different blocks have equal hashes, as where `root` ignores namespaces, the hash is told once, and removed when
    no cached block has it.

    Raises ValueError for arguments out of range.
    """

    busy: int  # see `flatradix.gate`

    def __init__(
        self,
        tree: RadixTree | PrefixCache,
        block_size: int | None = None,
        *,
        on_stored: Callable[[list[Block]], object],
        on_removed: Callable[[list[Hash]], object],
        hash: HashFunction = chain_hash,
        root: RootFunction = root_hash,
    ) -> None:
        self._tree: RadixTree = tree if isinstance(tree, RadixTree) else tree.tree
        page = self._tree.page_size
        self.block_size = page if block_size is None else positive("block_size", block_size)
        if self.block_size % page:
            raise ValueError(f"block_size {self.block_size} is no multiple of the page size {page}")
        self._on_stored, self._on_removed = on_stored, on_removed
        self._hash, self._root = hash, root
        self._nodes = NO_NODES  # on all rows, as they were told
        self._seen = -1  # events of the tree that are told; -1 before the first update
        self._hashes: dict[int, list[Hash]] = {}  # of the blocks that end on the edge of each row
        self._counts: dict[Hash, int] = {}
        self._pending: tuple[Event, ...] = ()
        self._change: _Change | None = None  # a change that is being applied
        add_gate(self)

    def __len__(self) -> int:
        """Return how many hashes were cached at the last `update` or `dump`."""
        return len(self._counts)

    @public_call
    def update(self) -> None:
        """Call `on_removed`, then `on_stored`, for what changed since the last time; neither where nothing changed.

        Call it once a step, behind the inserts and evictions of the step. A block that came and went in between is not
        told. The first update tells all that is cached. The functions are called behind the call that reads the tree,
        so they may use the tree.

        If a function raises, so does `update`: the next `update` first calls this function again with the same list.
        After any other interruption the next call tells what was not told, and again the list that was under way.

        O(changes of the tree's nodes), and O(blocks) Python work for nodes that are new or gone. The first time, after
        a reset, after a drop that leaves locked nodes, and after more than 32,768 changes, O(nodes of the tree) numpy
        work is added, as on a GPU always. There it also waits for the device, copies the nodes and tokens, and raises
        errors of earlier calls. Raises RuntimeError within another call of the tree, such as its `on_evict`.
        """
        me = get_ident()
        self.busy = me if not self.busy else take_gate(self, me)
        try:
            self._apply()
            self._tree.index.look_at(self._look, slots=False, only=FIELDS)
            self._apply()
            self._tell()
            self.busy = FREE
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    @public_call
    def dump(self) -> list[Block]:
        """Return all cached blocks, parents before children, each hash once, for a router that joins late.

        Does an `update` first, so all routers that follow know the same blocks. O(cached tokens).
        """
        me = get_ident()
        self.busy = me if not self.busy else take_gate(self, me)
        try:
            self._apply()
            blocks = self._tree.index.look_at(self._look_at_all, slots=False, only=FIELDS)
            self._apply()
            self._tell()
            self.busy = FREE
            return blocks
        except BaseException:
            if self.busy == me:
                self.busy = CUT_SHORT
            raise

    def _look(self, content: Content) -> tuple[Edges, Mapping[int, list[Hash]]]:
        """Find what has changed, and note it as `_change`. Return the edges and the hashes on them as they are now."""
        edges = Edges(content, self.block_size, self._hash, self._root)
        among = None if self._seen < 0 else changed_rows(content, self._seen)
        rows, old, new = difference(self._nodes, edges.rows, among)
        same = old.generations == new.generations
        found: dict[int, Any] = {}
        gone: list[tuple[int, Hash]] = []  # with the number of the block on its key
        for row, start in _pairs(rows, old.starts, same & (new.generations >= 0)):
            lost = self._divide(row, start, edges, found)
            gone += enumerate(lost, edges.range(row)[1] // self.block_size)
        for row, start in _pairs(rows, old.starts, ~same & (old.generations >= 0)):
            gone += enumerate(self._hashes[row], start // self.block_size)
            found.setdefault(row, None)
        gone.sort(key=lambda numbered: -numbered[0])
        hashes: Mapping[int, list[Hash]] = ChainMap(found, self._hashes)
        fresh = rows[~same & (new.generations >= 0)].tolist()
        came: list[Block] = []
        for row in edges.by_end(row for row in fresh if found.get(row) is None):
            blocks = edges.blocks(row, hashes)
            found[row] = [block.hash for block in blocks]
            came += blocks
        counts, pending = self._counted([own for _, own in gone], came)
        self._change = _Change(rows, new, found, counts, pending, content.number(numbers.EVENTS))
        return edges, hashes

    def _divide(self, row: int, old_start: int, edges: Edges, found: dict[int, Any]) -> list[Hash]:
        """Divide the hashes of an edge that was split or cut among its row and the rows above, which got its parts.

        Return the hashes that its end lost.
        """
        own = self._hashes[row]
        found[row] = edges.part(own, old_start, row)
        above = edges.above(row)
        while above > 0 and edges.range(above)[0] >= old_start:
            found[above] = edges.part(own, old_start, above)
            above = edges.above(above)
        return own[edges.range(row)[1] // self.block_size - old_start // self.block_size :]

    def _counted(self, gone: list[Hash], came: list[Block]) -> tuple[dict[Hash, int], tuple[Event, ...]]:
        """Return `counts` and `pending` of a change: the hashes of what went, and the blocks that came."""
        difference = Counter(block.hash for block in came)
        difference.subtract(gone)
        known = self._counts
        counts = {own: known.get(own, 0) + more for own, more in difference.items() if more}
        stored: dict[Hash, Block] = {}
        for block in came:
            if counts.get(block.hash) and block.hash not in known:
                stored.setdefault(block.hash, block)
        removed = [own for own in dict.fromkeys(gone) if counts.get(own) == 0]
        pending = list(self._pending)
        if removed:
            pending.append(partial(self._on_removed, removed))
        if stored:
            pending.append(partial(self._on_stored, list(stored.values())))
        return counts, tuple(pending)

    def _look_at_all(self, content: Content) -> list[Block]:
        edges, hashes = self._look(content)
        found: dict[Hash, Block] = {}
        for row in edges.by_end(edges.live()):
            for block in edges.blocks(row, hashes, hashes[row]):
                found.setdefault(block.hash, block)
        return list(found.values())

    def _apply(self) -> None:
        """Apply the change that was found last, if any. May be called again after an interruption."""
        change = self._change
        if change is None:
            return
        self._nodes = self._nodes.replaced(change.rows, change.nodes)
        self._seen = change.seen
        for row, own in change.hashes.items():
            if own is None:
                self._hashes.pop(row, None)
            else:
                self._hashes[row] = own
        for name, count in change.counts.items():
            if count:
                self._counts[name] = count
            else:
                self._counts.pop(name, None)
        self._pending = change.pending
        self._change = None

    def _tell(self) -> None:
        while self._pending:
            self._pending[0]()
            self._pending = self._pending[1:]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a BlockEvents is neither pickled nor copied: it follows one tree")
