"""Journal: write an entry about a call of a tree, and continue the two hashes over all entries."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import fixed_types, helper, int64_at
from flatradix.layout import hashing, journal, numbers

_mix = helper(hashing.mix)


@helper
def _write(address, name, queries, clock, evictable, protected, nodes, digest, stamp):
    state = int64_at(address)
    number = state[journal.NUMBER]
    by_calls = _mix(_mix(state[journal.BY_CALLS] * 3 + name) * 3 + queries)
    by_numbers = _mix(_mix(_mix(state[journal.BY_NUMBERS] * 3 + by_calls) * 3 + clock) * 3 + evictable)
    by_numbers = _mix(_mix(_mix(by_numbers * 3 + protected) * 3 + nodes) * 3 + digest)
    place = journal.STATE + (number & (journal.KEPT - 1)) * journal.ENTRY
    state[place + journal.NAME] = name
    state[place + journal.QUERIES] = queries
    state[place + journal.CLOCK] = clock
    state[place + journal.EVICTABLE] = evictable
    state[place + journal.PROTECTED] = protected
    state[place + journal.NODES] = nodes
    state[place + journal.DIGEST] = digest
    state[place + journal.CALLS_HASH] = by_calls
    state[place + journal.NUMBERS_HASH] = by_numbers
    state[journal.NUMBER] = number + 1
    state[journal.BY_CALLS] = by_calls
    state[journal.BY_NUMBERS] = by_numbers
    state[journal.STAMP] = stamp


@fixed_types("(int64, int64, int64, int64, int64, int64, int64, int64, int64)")
def note_call(address, name, queries, clock, evictable, protected, nodes, digest, stamp):
    """Write an entry. address: of a journal; see `flatradix.layout.journal`."""
    _write(address, name, queries, clock, evictable, protected, nodes, digest, stamp)


@fixed_types("(int64, int64, int64, int64)")
def note_call_and_sizes(address, tree, name, queries):
    """Write an entry with the clock and the sizes of a tree. tree: the address of `TreeState.numbers`."""
    known = int64_at(tree)
    clock, last = known[numbers.CLOCK], known[numbers.LAST_CALL]
    sizes = known[numbers.EVICTABLE], known[numbers.PROTECTED], known[numbers.NODES]
    _write(address, name, queries, clock, *sizes, journal.UNKNOWN, last)
