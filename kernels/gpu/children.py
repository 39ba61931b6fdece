"""The child table on a GPU: open addressing keyed by (parent, first page), with the edge beside each entry.

A place is two int64: (tag, row), and (length, start) of the row's edge, so that a walk needs no other load before it
can compare tokens. The entry of an evicted row becomes TOMB, which names no row, until the next compaction builds the
table anew; until then every entry ever made is of another pool page, so the table cannot fill up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.launch import device_function
from flatradix.layout import handles, hashing, numbers

page_tag = device_function(hashing.page_tag)
pack_entry = device_function(handles.pack_entry)

TOMB = tl.constexpr(1 << 32)


@triton.jit
def pack_edge(start, length):
    return (length.to(tl.int64) << 32) | start.to(tl.int64)


@triton.jit
def page_at(key, at, units, PAGE: tl.constexpr, WIDTH: tl.constexpr):
    """The PAGE values of `key` from `at` on, zeros beyond `units`; WIDTH: PAGE, up to a power of two."""
    j = tl.arange(0, WIDTH)
    return tl.load(key + at + j, mask=(j < PAGE) & (at + j < units), other=0)


@triton.jit
def tag_of(s, first, second, parent, PAGE: tl.constexpr, WIDTH: tl.constexpr, BIGRAM: tl.constexpr):
    """The tag of the child of `parent` that begins with a page: its first tokens and, with bigrams, its second ones."""
    j = tl.arange(0, WIDTH)
    inside = j < PAGE
    total = first.to(tl.int64) * tl.load(s.multipliers + j, mask=inside, other=0)
    if BIGRAM:
        total += second.to(tl.int64) * tl.load(s.multipliers + PAGE + j, mask=inside, other=0)
    return page_tag(tl.sum(total), parent)


@triton.jit
def tags_of_lanes(s, first, second, parent, active, PAGE: tl.constexpr, BIGRAM: tl.constexpr):
    """The same for lanes, from pointers to the first tokens of each page and, with bigrams, to its second ones."""
    total = tl.zeros_like(parent)
    for j in range(PAGE):
        total += tl.load(first + j, mask=active, other=0).to(tl.int64) * tl.load(s.multipliers + j)
        if BIGRAM:
            factor = tl.load(s.multipliers + PAGE + j)
            total += tl.load(second + j, mask=active, other=0).to(tl.int64) * factor
    return page_tag(total, parent)


@triton.jit
def probe(s, tag, place, mask):
    """The first entry with this tag from `place` on: (row, its edge, where it stands); row 0 if there is none."""
    entry = tl.load(s.child_table + 2 * place)
    edge = tl.load(s.child_table + 2 * place + 1)
    while (entry != 0) & (((entry & 0xFFFFFFFF) == 0) | (((entry >> 32) & 0xFFFFFFFF) != tag)):
        place = (place + 1) & mask
        entry = tl.load(s.child_table + 2 * place)
        edge = tl.load(s.child_table + 2 * place + 1)
    return entry & 0xFFFFFFFF, edge, place


@triton.jit
def enter(s, w, row, tag, start, length, active):
    """Enter rows, one a lane, under their tags, and note the tags and where the entries stand.

    Which of two rows gets the earlier place is chance, and decides nothing: a probe passes over both.
    """
    mask = tl.load(s.numbers + numbers.TABLE_MASK)
    place = tag & mask
    entry = pack_entry(tag, row)
    waiting = active
    while tl.max(waiting.to(tl.int32)) > 0:
        # Lanes that have their place look for -1, which no entry is, and change nothing.
        empty = tl.where(waiting, tl.zeros_like(entry), tl.zeros_like(entry) - 1)
        before = tl.atomic_cas(s.child_table + 2 * place, empty, entry, sem="relaxed")
        taken = waiting & (before == 0)
        tl.store(s.child_table + 2 * place + 1, pack_edge(start, length), mask=taken)
        tl.store(w.entry + row, place.to(tl.int32), mask=taken)
        waiting = waiting & (before != 0)
        place = tl.where(waiting, (place + 1) & mask, place)
    tl.store(s.tag + row, tag.to(tl.int32), mask=active)


@triton.jit
def hand_over(s, w, row, successor, start, length, active):
    """Give the entries of `row` to `successor`, which begins with the same page below the same parent."""
    place = tl.load(w.entry + row, mask=active, other=0).to(tl.int64)
    tag = tl.load(s.tag + row, mask=active, other=0)
    tl.store(s.child_table + 2 * place, pack_entry(tag.to(tl.int64) & 0xFFFFFFFF, successor), mask=active)
    tl.store(s.child_table + 2 * place + 1, pack_edge(start, length), mask=active)
    tl.store(w.entry + successor, place.to(tl.int32), mask=active)
    tl.store(s.tag + successor, tag, mask=active)


@triton.jit
def bury(s, w, row, active):
    """Make the entries of evicted rows tombs."""
    place = tl.load(w.entry + row, mask=active, other=0).to(tl.int64)
    tl.store(s.child_table + 2 * place, tl.zeros_like(place) + TOMB, mask=active)
