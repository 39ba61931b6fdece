"""The oracle: what every operation of a tree means, in plain Python objects and loops.

The code is slow and obvious on purpose. A batch is validated first; then its queries run one at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from flatradix.errors import CapacityError, QueryError, StaleHandleError
from flatradix.inputs.policy import Slru

LARGEST = 2**31 - 1
LOWEST = -(2**63)  # the score of what was dropped

Namespace = str | bytes | None
Unit = Any  # a token, or a pair of tokens with bigrams
Page = tuple[Unit, ...]


@dataclass(eq=False)
class Node:
    units: list[Unit]
    slots: list[int]
    parent: Node | None = field(repr=False)
    namespace: Namespace
    tick: int
    created: int
    priority: int
    hit_count: int = 0
    lock_ref: int = 0
    own_locks: int = 0
    wants: int = 0
    own_wants: int = 0
    branches: dict[Page, Node] = field(default_factory=dict, repr=False)
    hidden: list[Node] = field(default_factory=list, repr=False)  # dropped children that no look-up finds
    alive: bool = True
    dropped: bool = False

    @property
    def length(self) -> int:
        return len(self.units)

    @property
    def children(self) -> int:
        return len(self.branches) + len(self.hidden)

    @property
    def end(self) -> int:
        return len(self.path())

    @property
    def can_go(self) -> bool:
        """Whether an eviction may free the node next."""
        return self.alive and self.children == 0 and self.lock_ref == 0

    def upwards(self) -> Iterator[Node]:
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent

    def path(self) -> list[Unit]:
        return [unit for node in reversed(list(self.upwards())) for unit in node.units]

    def path_slots(self) -> list[int]:
        return [slot for node in reversed(list(self.upwards())) for slot in node.slots]


class Place(NamedTuple):
    """The point that a handle and a length name. node: None is the root."""

    node: Node | None
    length: int

    @property
    def is_there(self) -> bool:
        """Whether no eviction has taken the place, with its node or with the last pages of its node."""
        return self.node is None or (self.node.alive and self.length <= self.node.end)


ROOT = Place(None, 0)


class Inserted(NamedTuple):
    prefix_length: int
    place: Place


class Evicted(NamedTuple):
    slots: list[int]
    num_tokens: int
    num_nodes: int


class Told(NamedTuple):
    """A victim. tokens: of its key, up to the end of what was freed. slots: those that were freed, the last ones."""

    namespace: Namespace
    tokens: list[int]
    slots: list[int]


class Key(NamedTuple):
    """A whole key. units: from the root on. place: the `start=` that it continues, where its walk begins."""

    namespace: Namespace
    units: list[Unit]
    place: Place

    @property
    def start(self) -> int:
        """How many units came from `start=`."""
        return self.place.length


class Keeper(Protocol):
    """A waiting queue for which evictions keep nodes."""

    def nodes_to_give_up(self) -> list[Node]:
        """Return the nodes on which matches of the waiting prompts end. The first of them is given up first."""


SCORES: dict[str, Callable[[Node], Any]] = {
    "lru": lambda node: 0,
    "lfu": lambda node: node.hit_count,
    "slru": lambda node: node.hit_count >= 2,
    "fifo": lambda node: node.created,
    "filo": lambda node: -node.created,
    "priority": lambda node: node.priority,
    "mru": lambda node: -node.tick,
}


def score_of(policy: Any) -> Callable[[Node], Any]:
    if isinstance(policy, Slru):
        return lambda node: node.hit_count >= policy.protected_threshold
    return SCORES[policy] if isinstance(policy, str) else policy


def tokens_of(nodes: Iterable[Node]) -> int:
    return sum(node.length for node in nodes)


def every(paths: Iterable[list[Node]]) -> set[Node]:
    """Return the nodes of all paths."""
    return {node for path in paths for node in path}


def check_range(values: Sequence[int], largest: int, query: int) -> None:
    for value in values:
        if not 0 <= value <= largest:
            raise QueryError(f"{value} is not in [0, {largest}]", query)


class Oracle:
    """A tree, as slow Python. policy: a name, `flatradix.slru(...)`, or a function from a node to its score."""

    def __init__(
        self,
        max_tokens: int,
        page_size: int = 1,
        policy: Any = "lru",
        bigram: bool = False,
        largest_slot: int = LARGEST,
        evict_by: str = "node",
    ) -> None:
        self.max_tokens = max_tokens
        self.page_size = page_size
        self.score = score_of(policy)
        self.bigram = bigram
        self.largest_slot = largest_slot
        self.evict_by = evict_by
        self.clock = 0
        self.tops: dict[Namespace, dict[Page, Node]] = {}
        self.hidden: list[Node] = []  # dropped nodes at the top of their namespaces
        self.keeper: Keeper | None = None
        self.told: list[Told] = []  # the victims of the last eviction

    # Content

    def nodes(self) -> list[Node]:
        found: list[Node] = []
        waiting = [node for top in self.tops.values() for node in top.values()] + self.hidden
        while waiting:
            node = waiting.pop()
            found.append(node)
            waiting.extend([*node.branches.values(), *node.hidden])
        return found

    @property
    def num_nodes(self) -> int:
        return len(self.nodes())

    @property
    def total_tokens(self) -> int:
        return tokens_of(self.nodes())

    @property
    def protected_tokens(self) -> int:
        return sum(node.length for node in self.nodes() if node.lock_ref > 0)

    @property
    def evictable_tokens(self) -> int:
        return sum(node.length for node in self.nodes() if node.lock_ref == 0)

    def branches_of(self, namespace: Namespace, node: Node | None) -> dict[Page, Node]:
        return self.tops.setdefault(namespace, {}) if node is None else node.branches

    def hidden_beside(self, node: Node) -> list[Node]:
        """Return the list of hidden nodes in which a hidden node stands."""
        return self.hidden if node.parent is None else node.parent.hidden

    # Keys and places

    def units_of(self, tokens: Sequence[int]) -> list[Unit]:
        """Return the units of the tokens, cut down to whole pages."""
        units: list[Unit] = list(pairwise(tokens)) if self.bigram else list(tokens)
        return units[: len(units) // self.page_size * self.page_size]

    def tokens_of_path(self, node: Node) -> list[int]:
        """Return the tokens of which the path to a node's end consists."""
        path = node.path()
        return [path[0][0], *(second for _, second in path)] if self.bigram else path

    def first_page(self, units: list[Unit]) -> Page:
        return tuple(units[: self.page_size])

    def resolve(self, place: Place, query: int = 0) -> Node | None:
        """Return the node whose edge holds the place now, None for the root. query: the query's number, for errors."""
        node, length = place
        if self.is_stale(place):
            raise StaleHandleError("the place has been evicted", query)
        if not 0 <= length <= (0 if node is None else node.end) or length % self.page_size:
            raise QueryError(f"no place at length {length}", query)
        while node is not None and length <= node.end - node.length:
            node = node.parent
        return node

    def is_stale(self, place: Place) -> bool:
        """Return whether an eviction has taken a place, with its node or with the last pages of its node."""
        node, length = place
        cut = self.evict_by == "page" and length % self.page_size == 0
        return node is not None and (not node.alive or (cut and length > node.end))

    def key_of(self, query: int, tokens: Sequence[int], namespace: Namespace, start: Place) -> Key:
        node = self.resolve(start, query)
        if node is None:
            return Key(namespace, self.units_of(tokens), ROOT)
        if namespace is not None and namespace != node.namespace:
            raise QueryError("the start is in another namespace", query)
        path = node.path()[: start.length]
        if self.bigram and tokens and tokens[0] != path[-1][1]:
            raise QueryError("the first token is not the second one of the last pair", query)
        return Key(node.namespace, path + self.units_of(tokens), start)

    def common(self, edge: list[Unit], units: list[Unit]) -> int:
        """Return the length of the common prefix, in whole pages."""
        count = 0
        while count < min(len(edge), len(units)) and edge[count] == units[count]:
            count += 1
        return count // self.page_size * self.page_size

    def walk(self, key: Key) -> Place:
        """Return the place where the longest cached prefix ends. Only a start can lead to what was dropped."""
        node, at = self.resolve(key.place), key.place.length
        if node is not None and at < node.end:
            at += self.common(node.units[at - (node.end - node.length) :], key.units[at:])
            if at < node.end:
                return Place(node, at)
        while at < len(key.units):
            child = self.branches_of(key.namespace, node).get(self.first_page(key.units[at:]))
            if child is None:
                break
            common = self.common(child.units, key.units[at:])
            node, at = child, at + common
            if common < child.length:
                break
        return Place(node, at)

    def split(self, node: Node, length: int, created: int) -> Node:
        """Interrupt the edge of `node` at path length `length`; return the upper part, a new node."""
        cut = length - (node.end - node.length)
        upper = Node(
            units=node.units[:cut],
            slots=node.slots[:cut],
            parent=node.parent,
            namespace=node.namespace,
            tick=node.tick,
            created=created,
            priority=node.priority,
            hit_count=node.hit_count,
            lock_ref=node.lock_ref,
            wants=node.wants,
            dropped=node.dropped,
        )
        if node in self.hidden_beside(node):
            self.hidden_beside(node)[self.hidden_beside(node).index(node)] = upper
        else:
            self.branches_of(node.namespace, node.parent)[self.first_page(upper.units)] = upper
        node.units, node.slots, node.parent = node.units[cut:], node.slots[cut:], upper
        upper.branches[self.first_page(node.units)] = node
        return upper

    def next_tick(self) -> int:
        self.clock += 2
        return self.clock

    # Match

    def match(
        self,
        queries: Sequence[Sequence[int]],
        namespaces: Sequence[Namespace],
        touch: bool = True,
        lock: bool = False,
        starts: Sequence[Place] | None = None,
        split: bool = False,
    ) -> list[Place]:
        keys = self.keys_of(queries, namespaces, starts)
        for query, (tokens, key) in enumerate(zip(queries, keys, strict=True)):
            self.check_read(tokens, key, query)
        return [self.match_one(key, touch, lock, split) for key in keys]

    def keys_of(
        self,
        queries: Sequence[Sequence[int]],
        namespaces: Sequence[Namespace],
        starts: Sequence[Place] | None,
    ) -> list[Key]:
        places = [ROOT] * len(queries) if starts is None else starts
        return [self.key_of(query, *key) for query, key in enumerate(zip(queries, namespaces, places, strict=True))]

    def check_read(self, tokens: Sequence[int], key: Key, query: int) -> None:
        """Check the first page that is not cached: a match reads a key up to the end of that page."""
        found = self.walk(key).length
        if found < len(key.units):
            first = found - key.start
            check_range(tokens[first : first + self.page_size + self.bigram], LARGEST, query)

    def match_one(self, key: Key, touch: bool, lock: bool, split: bool) -> Place:
        place = self.walk(key)
        if touch:
            tick = self.next_tick()
            for node in place.node.upwards() if place.node else ():
                node.tick = tick
        if lock:
            return self.lock_one(place)
        return self.split_one(place) if split else place

    def slots(self, places: Sequence[Place]) -> list[list[int]]:
        nodes = [self.resolve(place, query) for query, place in enumerate(places)]
        pairs = zip(nodes, places, strict=True)
        return [node.path_slots()[: place.length] if node else [] for node, place in pairs]

    def write_slots(self, places: Sequence[Place], table: list[list[int]], rows: Sequence[int]) -> None:
        pairs = list(zip(self.slots(places), rows, strict=True))
        for query, (slots, row) in enumerate(pairs):
            if not 0 <= row < len(table) or len(slots) > len(table[row]):
                raise QueryError(f"row {row} does not take {len(slots)} slots", query)
        for slots, row in pairs:
            table[row][: len(slots)] = slots

    # Lock

    def lock(self, places: Sequence[Place]) -> list[Place]:
        """Lock the places; return them with the handles that unlock them."""
        for query, place in enumerate(places):
            self.resolve(place, query)
        return [self.lock_one(place) for place in places]

    def lock_one(self, place: Place) -> Place:
        node = self.resolve(place)
        if node is None:
            return Place(None, 0)
        if place.length < node.end:
            node = self.split(node, place.length, self.clock + 1)
        node.own_locks += 1
        for above in node.upwards():
            above.lock_ref += 1
        return Place(node, place.length)

    def unlock(self, places: Sequence[Place]) -> None:
        nodes: list[Node] = []
        for query, place in enumerate(places):
            node = self.resolve(place, query)
            if node is not None:
                nodes.append(node)
                if place.length != node.end or nodes.count(node) > node.own_locks:
                    raise QueryError("no lock ends there", query)
        for node in nodes:
            self.unlock_one(node)

    def unlock_one(self, node: Node) -> None:
        node.own_locks -= 1
        for above in node.upwards():
            above.lock_ref -= 1

    def split_at(self, places: Sequence[Place]) -> list[Place]:
        for query, place in enumerate(places):
            self.resolve(place, query)
        return [self.split_one(place) for place in places]

    def split_one(self, place: Place) -> Place:
        """Split the edge at a place, as a lock and an unlock do."""
        renewed = self.lock_one(place)
        if renewed.node is not None:
            self.unlock_one(renewed.node)
        return renewed

    # Insert

    def insert(
        self,
        queries: Sequence[Sequence[int]],
        slots: Sequence[Sequence[int]],
        namespaces: Sequence[Namespace],
        priorities: Sequence[int],
        starts: Sequence[Place] | None = None,
        inserted_lengths: Sequence[int] | None = None,
    ) -> list[Inserted]:
        for query, (tokens, own) in enumerate(zip(queries, slots, strict=True)):
            if len(tokens) != len(own):
                raise QueryError("as many slots as tokens", query)
            check_range(tokens, LARGEST, query)
            check_range(own, self.largest_slot, query)
        keys = self.keys_of(queries, namespaces, starts)
        self.check_capacity(keys)
        before = [0] * len(keys) if inserted_lengths is None else inserted_lengths
        return [self.insert_one(*query) for query in zip(keys, slots, priorities, before, strict=True)]

    def check_capacity(self, keys: Sequence[Key]) -> None:
        needed = self.new_units(keys)
        free = self.max_tokens - self.total_tokens
        if needed > free:
            raise CapacityError(f"{needed} tokens are new, {free} are free", needed, free)

    def new_units(self, keys: Sequence[Key]) -> int:
        """Return the number of units that are not cached. A page that several queries share counts once.

        What is inserted from a dropped place is shared only below the same hidden node.
        """
        pages = set()
        for key in keys:
            node, cached = self.walk(key)
            above = list(node.upwards()) if node is not None else []
            hidden = next((id(one) for one in above if one in self.hidden_beside(one)), None)
            for end in range(cached + self.page_size, len(key.units) + 1, self.page_size):
                pages.add((key.namespace, hidden, tuple(key.units[:end])))
        return len(pages) * self.page_size

    def insert_one(self, key: Key, slots: Sequence[int], priority: int, inserted_length: int) -> Inserted:
        tick = self.next_tick()
        node, cached = self.walk(key)
        if node is not None and cached < node.end:
            lower = node
            node = self.split(node, cached, created=tick)
            lower.tick = tick - 1
        if cached < len(key.units):
            node = self.add_leaf(key, slots, node, cached, tick, priority)
        for above in node.upwards() if node else ():
            above.tick = tick
            above.priority = max(above.priority, priority)
            if above.end > inserted_length:
                above.hit_count += 1
        return Inserted(cached, Place(node, len(key.units)))

    def add_leaf(
        self, key: Key, slots: Sequence[int], parent: Node | None, cached: int, tick: int, priority: int
    ) -> Node:
        units = key.units[cached:]
        leaf = Node(
            units=units,
            slots=list(slots[cached - key.start : len(key.units) - key.start]),
            parent=parent,
            namespace=key.namespace,
            tick=tick,
            created=tick,
            priority=priority,
            dropped=parent is not None and parent.dropped,
        )
        self.branches_of(key.namespace, parent)[self.first_page(units)] = leaf
        return leaf

    # Wants

    def want(self, places: Sequence[Place]) -> list[Place]:
        """Ask evictions to spare the paths as long as they can; return the places with the handles that end it."""
        for query, place in enumerate(places):
            self.resolve(place, query)
        return [self.want_one(place) for place in places]

    def want_one(self, place: Place) -> Place:
        node, length = self.split_one(place)
        if node is not None and not node.dropped:
            self.add_wants(node, 1)
        return Place(node, length)

    def unwant(self, places: Sequence[Place]) -> None:
        """Take back a want of each place. A want of a stale or dropped place has ended already."""
        nodes: list[Node] = []
        for query, place in enumerate(places):
            node = None if self.is_stale(place) else self.resolve(place, query)
            if node is not None and not node.dropped:
                nodes.append(node)
                if place.length != node.end or nodes.count(node) > node.own_wants:
                    raise QueryError("no want ends there", query)
        for node in nodes:
            self.add_wants(node, -1)

    def add_wants(self, node: Node, count: int) -> None:
        node.own_wants += count
        for above in node.upwards():
            above.wants += count

    def alive(self, places: Sequence[Place]) -> list[bool]:
        return [place.is_there and not self._was_dropped(place) for place in places]

    def _was_dropped(self, place: Place) -> bool:
        """Return whether the node was dropped on whose edge a place lies, which a split may have moved up."""
        node = self.resolve(place)
        return node is not None and node.dropped

    def rematch(self, queries: Sequence[Sequence[int]], namespaces: Sequence[Namespace]) -> list[Place]:
        """Match whole keys again. The places of their earlier match only save time, so nobody passes them here."""
        return self.match(queries, namespaces, touch=False)

    # Evict

    def evict(self, num_tokens: int, space: int | None = None) -> Evicted:
        """Evict. space: of the caller's memory; nothing goes if the slots do not fit there."""
        if num_tokens < 0:
            raise ValueError("a negative number of tokens")
        if space is not None:
            rehearsed = copy.deepcopy(self).evict(num_tokens)
            if rehearsed.num_tokens > space:
                raise ValueError("out is too small")
        scores = {node: LOWEST if node.dropped else self.score(node) for node in self.nodes()}
        pinned = {node for node in self.nodes() if node.wants > 0}
        prompts = [list(node.upwards()) for node in self.keeper.nodes_to_give_up()] if self.keeper else []
        self.tail: list[int] = []
        self.told = []
        victims: list[Node] = []
        self.evict_by_policy(num_tokens, victims, scores, pinned | every(prompts))
        for number, path in enumerate(prompts):
            self.evict_path(num_tokens, victims, path, pinned | every(prompts[number + 1 :]))
        self.evict_by_policy(num_tokens, victims, scores, set())
        slots = [slot for victim in victims for slot in victim.slots] + self.tail
        return Evicted(slots, len(slots), len(victims))

    def evict_by_policy(self, num_tokens: int, victims: list[Node], scores: dict[Node, Any], kept: set[Node]) -> None:
        """Free leaves that are not kept, those with the lowest score first."""
        while self.missing(num_tokens, victims) > 0:
            leaves = [node for node in self.nodes() if node.can_go and node not in kept]
            if not leaves:
                break
            victim = min(leaves, key=lambda node: (scores[node], node.tick, -node.end))
            self.evict_node(num_tokens, victims, victim)

    def evict_path(self, num_tokens: int, victims: list[Node], path: list[Node], kept: set[Node]) -> None:
        """Free the nodes of a path that are not kept, the deepest first."""
        for node in path:
            if self.missing(num_tokens, victims) > 0 and node.can_go and node not in kept:
                self.evict_node(num_tokens, victims, node)

    def missing(self, num_tokens: int, victims: list[Node]) -> int:
        return num_tokens - tokens_of(victims) - len(self.tail)

    def evict_node(self, num_tokens: int, victims: list[Node], node: Node) -> None:
        """Free a node, or by pages only as many of its last pages as are missing. Its soft pins end in both cases."""
        self.add_wants(node, -node.own_wants)
        left = node.length - -(-self.missing(num_tokens, victims) // self.page_size) * self.page_size
        begin = left if self.evict_by == "page" and left > 0 else 0
        self.told.append(Told(node.namespace, self.tokens_of_path(node), node.slots[begin:]))
        if begin > 0:
            self.tail = node.slots[left:]
            node.units, node.slots = node.units[:left], node.slots[:left]
        else:
            self.remove(node)
            victims.append(node)

    def remove(self, node: Node) -> None:
        self.take_out(node)
        node.alive = False

    def take_out(self, node: Node) -> None:
        """Remove a node from its parent."""
        if node in self.hidden_beside(node):
            self.hidden_beside(node).remove(node)
        else:
            del self.branches_of(node.namespace, node.parent)[self.first_page(node.units)]

    # Drop

    def drop(self, places: Sequence[Place]) -> Evicted:
        """Drop the nodes on whose edges the places lie, and all nodes below them."""
        tops: list[Node] = []
        for query, place in enumerate(places):
            node = self.resolve(place, query)
            if node is None:
                raise QueryError("a place of length 0", query)
            tops.append(node)
        return self.drop_nodes(tops)

    def drop_namespace(self, namespace: Namespace) -> Evicted:
        return self.drop_nodes(list(self.branches_of(namespace, None).values()))

    def drop_nodes(self, tops: list[Node]) -> Evicted:
        for node in self.nodes():
            if any(above in tops for above in node.upwards()) and not node.dropped:
                self.add_wants(node, -node.own_wants)
                node.dropped = True
        for node in self.nodes():
            if node.dropped and node.lock_ref > 0 and not (node.parent is not None and node.parent.dropped):
                self.hide(node)
        self.tail, self.told = [], []
        victims: list[Node] = []
        gone = sorted(
            [node for node in self.nodes() if node.dropped and node.lock_ref == 0],
            key=lambda node: (node.tick, -node.end),
        )
        for node in gone:
            self.told.append(Told(node.namespace, self.tokens_of_path(node), node.slots))
            self.remove(node)
            victims.append(node)
        slots = [slot for victim in victims for slot in victim.slots]
        return Evicted(slots, len(slots), len(victims))

    def hide(self, node: Node) -> None:
        if node not in self.hidden_beside(node):
            self.take_out(node)
            self.hidden_beside(node).append(node)

    def reset(self) -> None:
        for node in self.nodes():
            node.alive = False
        self.tops.clear()
        self.hidden.clear()


class Row(NamedTuple):
    """One node of the logical tree, with all fields in which two trees must agree."""

    namespace: str
    path: tuple[Unit, ...]
    length: int
    slots: tuple[int, ...]
    lock_ref: int
    own_locks: int
    tick: int
    created: int
    priority: int
    hit_count: int
    children: int
    dropped: bool = False


def _row(node: Any, path: Sequence[Unit]) -> Row:
    values = [getattr(node, name) for name in Row._fields[4:]]
    return Row(repr(node.namespace), tuple(path), node.length, tuple(node.slots), *values)


def dump(oracle: Oracle) -> list[Row]:
    """Return the whole logical tree, sorted."""
    return sorted(_row(node, node.path()) for node in oracle.nodes())


def dump_tree(tree: Any) -> list[Row]:
    """Return the whole logical tree of a RadixTree, sorted, from its content."""
    from flatradix.inspect.nodes import nodes_of

    return sorted(_row(view, view.path) for view in nodes_of(tree.content()))
