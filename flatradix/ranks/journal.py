"""Journal: what the calls of a tree or of a cache did, in numbers that are equal on all ranks while the trees are.

Each entry holds the call, its number of queries, and with an index on the CPU the clock and the sizes of the tree after
it. With an index on a GPU the host does not know these numbers, and does not wait for them. Two hashes run over all
entries: over the calls alone, and over the numbers too. The last entries are kept, to tell where two ranks parted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import numpy as np

from flatradix.index import Index
from flatradix.inputs.sequences import address_of
from flatradix.kernels import cpu
from flatradix.layout import journal as layout
from flatradix.layout.journal import KEPT, UNKNOWN
from flatradix.results import Places

CALLS = (
    "match", "match_array", "lock", "unlock", "split", "want", "unwant", "expire", "insert", "evict", "drop", "reset",
)  # fmt: skip
CALLS_OF_CACHES = (
    "begin", "extend", "commit", "step", "fork", "finish", "abort", "drop", "reset",  # PrefixCache
    "match_prefix", "touch_prefix", "lock", "unlock", "inc_lock_ref", "dec_lock_ref", "insert", "checkpoint", "evict",
)  # fmt: skip
NAMES = tuple(dict.fromkeys(CALLS + CALLS_OF_CACHES))
_OF_PLACES = ("lock", "unlock", "split")  # they take places alone
_WITH_PLACES = ("match", "match_array", "insert")
_NOTHING = (UNKNOWN,) * 5
_MOST = 2**63 - 1


class Entry(NamedTuple):
    """A call. queries: how many, or the tokens of an eviction. known: the clock, evictable and protected tokens,
    nodes, and the digest after it; UNKNOWN where the host does not know. by_calls, by_numbers: the hashes behind it.
    """

    name: int
    queries: int
    known: tuple[int, ...]
    by_calls: int
    by_numbers: int

    @classmethod
    def of(cls, numbers: list[int]) -> Entry:
        """Return the entry that a journal holds in these numbers."""
        return cls(
            numbers[layout.NAME],
            numbers[layout.QUERIES],
            tuple(numbers[layout.CLOCK : layout.CALLS_HASH]),
            numbers[layout.CALLS_HASH],
            numbers[layout.NUMBERS_HASH],
        )


class Journal:
    """The entries of one tree. deep: whether each entry holds the digest, for which it waits.

    note: writes an entry; takes a place in NAMES and the number of queries. A kernel does it, which nothing interrupts,
    so an interrupted call has written its entry or has not. Valid as long as the journal exists.
    """

    def __init__(self, index: Index, deep: bool) -> None:
        watched = getattr(index, "watched", None)  # an index in host memory
        self.deep = deep
        self.knows_numbers = deep or watched is not None
        self._index = index  # not the tree: whoever keeps a journal keeps no tree alive
        self._table = np.zeros(layout.STATE + KEPT * layout.ENTRY, np.int64)
        self._address = address_of(self._table)
        self._table[layout.STAMP] = self._stamp()
        if watched is None or deep:
            self.note: Callable[[int, int], None] = self._note
            cpu.note_call.prepare()
        else:
            numbers = address_of(np.frombuffer(watched.numbers, np.int64))
            cpu.note_call_and_sizes.prepare()
            self.note = partial(cpu.note_call_and_sizes.call, self._address, numbers)

    @property
    def number(self) -> int:
        """How many entries were ever written."""
        return int(self._table[layout.NUMBER])

    @property
    def hashes(self) -> tuple[int, int]:
        return int(self._table[layout.BY_CALLS]), int(self._table[layout.BY_NUMBERS])

    def _stamp(self) -> int:
        """Return `changes` of the tree. Times of use are not undone with a call, so the clock does not tell."""
        return self._index.changes()

    def _note(self, name: int, queries: int) -> None:
        numbers = _numbers_of(self._index) if self.deep else _NOTHING
        cpu.note_call.call(self._address, name, queries, *numbers, self._stamp())

    def note_if_done(self, name: int, arguments: tuple[Any, ...]) -> None:
        """Write the entry of a call that was interrupted, if it took effect and has no entry yet."""
        self._index.settle()
        if self._stamp() != self._table[layout.STAMP]:
            result = self._index.last_result if NAMES[name] in _WITH_PLACES else None
            self.note(name, _count(result, arguments))

    def rows(self) -> tuple[int, np.ndarray]:
        """Return the number of the first entry that is kept, and all that are: int64 [N, layout.ENTRY]."""
        first = max(0, self.number - KEPT)
        places = np.arange(first, self.number) % KEPT
        return first, self._table[layout.STATE :].reshape(KEPT, layout.ENTRY)[places]


def _numbers_of(index: Index) -> tuple[int, ...]:
    """Return the numbers of an entry with a digest, as the tree is now. Waits for the device. O(cached tokens).

    The clock is left out: a GPU does not tell it, and the digest covers it.
    """
    half = signed(index.digest()[:16])
    return UNKNOWN, index.evictable_tokens, index.protected_tokens, index.num_nodes, half


def signed(digits: str) -> int:
    """Return 16 hex digits as a signed number of 64 bits."""
    value = int(digits, 16)
    return value - ((value >= 1 << 63) << 64)


def watch_tree(tree: Any, journal: Journal) -> None:
    """Replace calls of a tree, for this object alone, by calls that also write entries."""
    for name in CALLS:
        make = _watched_match if name == "match" else _watched_lock if name in _OF_PLACES else _watched
        _replace(tree, name, make(journal, getattr(tree, name), NAMES.index(name)))


def watch_cache(cache: Any, journal: Journal) -> None:
    """Do the same for a cache. A call that raises is not recorded: a cache undoes it by other calls of its tree."""
    for name in CALLS_OF_CACHES:
        if hasattr(cache, name):
            _replace(cache, name, _watched_if_done(journal, getattr(cache, name), NAMES.index(name)))


def _replace(target: Any, name: str, call: Callable[..., Any]) -> None:
    setattr(target, name, wraps(getattr(target, name))(call))


def _watched(journal: Journal, inner: Callable[..., Any], code: int) -> Callable[..., Any]:
    note = journal.note

    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            result = inner(*arguments, **keywords)
            note(code, _count(result, arguments))
            return result
        except BaseException:
            journal.note_if_done(code, arguments)
            raise

    return call


def _watched_if_done(journal: Journal, inner: Callable[..., Any], code: int) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        result = inner(*arguments, **keywords)
        journal.note(code, _count(result, arguments))
        return result

    return call


def _watched_lock(journal: Journal, inner: Callable[..., Any], code: int) -> Callable[..., Any]:
    """Do what `_watched` does: these calls are so short that passing on arguments of any kind would double them."""
    note = journal.note

    def call(places: Any) -> None:
        try:
            inner(places)
            note(code, _queries(places))
        except BaseException:
            journal.note_if_done(code, (places,))
            raise

    return call


def _watched_match(journal: Journal, inner: Callable[..., Any], code: int) -> Callable[..., Any]:
    note = journal.note

    def match(
        q: Any, namespace: Any = None, touch: bool = True, lock: bool = False, start: Any = None, split: bool = False
    ) -> Any:
        try:
            result = inner(q, namespace, touch, lock, start, split)
            if touch or lock or split:  # others leave no trace, and ranks may differ in them
                note(code, _queries(result))
            return result
        except BaseException:
            journal.note_if_done(code, ())
            raise

    return match


def _count(result: Any, arguments: tuple[Any, ...]) -> int:
    """Return the number of queries of a call, or of tokens that it asks for; UNKNOWN where that would have to wait."""
    if isinstance(result, Places):
        return _queries(result)
    return _queries(arguments[0]) if arguments else UNKNOWN


def _queries(of: Any) -> int:
    """Return the number of queries of places or of other arguments; of a number of tokens, the number."""
    if isinstance(of, Places):
        return 1 if of.late is None else len(of)
    if type(of) is int:
        return max(UNKNOWN, min(of, _MOST))
    try:
        return len(of if hasattr(of, "__len__") else of.lengths)
    except (TypeError, AttributeError):
        return UNKNOWN
