"""The child table on a GPU: open addressing keyed by (parent, first page), with the edge beside each entry.

A position holds two int64: (tag, row), and (length, start) of the row's edge. So a walk needs no other load before it
can compare tokens. The entry of an evicted row becomes a tombstone, TOMBSTONE, which names no row. A compaction builds
the table anew if there are many (`compact.py`). Until the next compaction each new entry belongs to a different page of
the pool, and the table has at least two positions for each page, so it cannot fill up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.launch import device_function
from flatradix.layout import handles, hashing, numbers

page_tag = device_function(hashing.page_tag)
pack_entry = device_function(handles.pack_entry)

TOMBSTONE = tl.constexpr(1 << 32)


@triton.jit
def pack_edge(start, length):
    return (length.to(tl.int64) << 32) | start.to(tl.int64)


@triton.jit
def page_at(key, at, units, PAGE: tl.constexpr, WIDTH: tl.constexpr):
    """Return the PAGE values of `key` from `at` on, as WIDTH lanes; zeros from `units` on.

    WIDTH: a power of two, at least PAGE. Lanes beyond PAGE are zero.
    """
    j = tl.arange(0, WIDTH)
    return tl.load(key + at + j, mask=(j < PAGE) & (at + j < units), other=0)


@triton.jit
def tag_of(s, first, second, parent, PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr):
    """Return the tag of the child of `parent` that begins with a page.

    first, second: the first tokens of the page's units and, with bigrams, their second tokens. parent: a row, or ~code
    of a namespace.
    """
    j = tl.arange(0, WIDTH)
    inside = j < PAGE
    total = first.to(tl.int64) * tl.load(s.multipliers + j, mask=inside, other=0)
    if BIGRAM:
        total += second.to(tl.int64) * tl.load(s.multipliers + PAGE + j, mask=inside, other=0)
    return page_tag(tl.sum(total), parent)


@triton.jit
def tags_of_lanes(s, first, second, parent, active, PAGE: tl.constexpr, BIGRAM: tl.constexpr):
    """Return a tag for each lane, as `tag_of` does for one page.

    first, second: pointers to the first tokens of each lane's page and, with bigrams, to their second tokens.
    """
    total = tl.zeros_like(parent)
    for j in range(PAGE):
        total += tl.load(first + j, mask=active, other=0).to(tl.int64) * tl.load(s.multipliers + j)
        if BIGRAM:
            factor = tl.load(s.multipliers + PAGE + j)
            total += tl.load(second + j, mask=active, other=0).to(tl.int64) * factor
    return page_tag(total, parent)


@triton.jit
def probe(s, tag, place, mask):
    """Return (row, edge, position) of the first entry with this tag from position `place` on; row 0 if none."""
    entry = tl.load(s.child_table + 2 * place)
    edge = tl.load(s.child_table + 2 * place + 1)
    while (entry != 0) & (((entry & 0xFFFFFFFF) == 0) | (((entry >> 32) & 0xFFFFFFFF) != tag)):
        place = (place + 1) & mask
        entry = tl.load(s.child_table + 2 * place)
        edge = tl.load(s.child_table + 2 * place + 1)
    return entry & 0xFFFFFFFF, edge, place


@triton.jit
def enter(s, w, row, tag, start, length, active):
    """Enter rows into the child table, one a lane; store each row's tag and the position of its entry.

    Which of two competing rows gets the earlier position varies from run to run. No result depends on it: a probe
    looks at both.
    """
    mask = tl.load(s.numbers + numbers.TABLE_MASK)
    place = tag & mask
    entry = pack_entry(tag, row)
    waiting = active
    while tl.max(waiting.to(tl.int32)) > 0:
        # A lane that is done compares with -1, which no entry equals, so its compare-and-swap changes nothing.
        empty = tl.where(waiting, tl.zeros_like(entry), tl.zeros_like(entry) - 1)
        before = tl.atomic_cas(s.child_table + 2 * place, empty, entry, sem="relaxed")
        taken = waiting & (before == 0)
        tl.store(s.child_table + 2 * place + 1, pack_edge(start, length), mask=taken)
        tl.store(w.entry + row, place.to(tl.int32), mask=taken)
        waiting = waiting & (before != 0)
        place = tl.where(waiting, (place + 1) & mask, place)
    tl.store(s.tag + row, tag.to(tl.int32), mask=active)


@triton.jit
def replace_row(s, w, row, successor, start, length, active):
    """Pass the entry of each `row` on to `successor`, whose edge begins with the same page below the same parent."""
    place = tl.load(w.entry + row, mask=active, other=0).to(tl.int64)
    tag = tl.load(s.tag + row, mask=active, other=0)
    tl.store(s.child_table + 2 * place, pack_entry(tag.to(tl.int64) & 0xFFFFFFFF, successor), mask=active)
    tl.store(s.child_table + 2 * place + 1, pack_edge(start, length), mask=active)
    tl.store(w.entry + successor, place.to(tl.int32), mask=active)
    tl.store(s.tag + successor, tag, mask=active)


@triton.jit
def add_tombstones(s, w, row, active):
    """Replace the entries of evicted rows by tombstones."""
    place = tl.load(w.entry + row, mask=active, other=0).to(tl.int64)
    tl.store(s.child_table + 2 * place, tl.zeros_like(place) + TOMBSTONE, mask=active)
