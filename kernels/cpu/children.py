"""The child table: open addressing with linear probing over (tag, row) entries, keyed by (parent, first page).

Only `mask + 1` places of the table are in use; it doubles when half full, so that a small tree stays in the cache
whatever its capacity. A row keeps its tag, so neither growth nor removal hashes tokens again.
"""

from __future__ import annotations

import numpy as np

from flatradix import meta
from flatradix.kernels import scalar
from flatradix.kernels.cpu.jit import helper
from flatradix.kernels.cpu.units import common_tokens, page_sum
from flatradix.layout import FREE_ROW

page_tag = helper(scalar.page_tag)
pack_entry = helper(scalar.pack_entry)
LOW32 = scalar.LOW32


@helper
def tag_of(s, first, second, wide, parent):
    bigram = s.meta[meta.BIGRAM] != 0
    return page_tag(page_sum(s.multipliers, first, second, wide, s.meta[meta.PAGE], bigram), parent)


@helper
def find_child(s, parent, key, wide, limit):
    """(row, units in common) of the child of `parent` that begins with the first page of `key`; (0, 0) if none.

    `key` is an address and has `limit` >= page units. The units in common are whole pages.
    """
    page = s.meta[meta.PAGE]
    bigram = s.meta[meta.BIGRAM] != 0
    step = 8 if wide else 4
    tag = tag_of(s, key, key + step, wide, parent)
    mask = s.meta[meta.TABLE_MASK]
    place = tag & mask
    while True:
        entry = s.table[place]
        if entry == 0:
            return 0, 0
        if ((entry >> 32) & LOW32) == tag:
            row = entry & LOW32
            if s.parent[row] == parent:
                at = np.int64(s.start[row])
                count = min(np.int64(s.length[row]), limit)
                common = common_tokens(s.tokens + 4 * at, key, wide, count)
                if bigram and common > 0:
                    common = common_tokens(s.seconds + 4 * at, key + step, wide, common)
                if common >= page:
                    return row, common - common % page
        place = (place + 1) & mask


@helper
def add_child(s, row, tag):
    """Enter a row whose page no sibling begins with."""
    s.tag[row] = np.int32(tag)
    mask = s.meta[meta.TABLE_MASK]
    place = tag & mask
    while s.table[place] != 0:
        place = (place + 1) & mask
    s.table[place] = pack_entry(tag, row)


@helper
def _place_of(s, row):
    mask = s.meta[meta.TABLE_MASK]
    entry = pack_entry(s.tag[row] & LOW32, row)
    place = entry >> 32 & mask
    while s.table[place] != entry:
        place = (place + 1) & mask
    return place


@helper
def replace_child(s, row, successor):
    """Give the entry of `row` to `successor`, which has the same parent and the same first page."""
    s.tag[successor] = s.tag[row]
    s.table[_place_of(s, row)] = pack_entry(s.tag[row] & LOW32, successor)


@helper
def remove_child(s, row):
    """Take the entry of `row` out and close the gap, so that no probe ends early."""
    mask = s.meta[meta.TABLE_MASK]
    gap = _place_of(s, row)
    place = gap
    while True:
        place = (place + 1) & mask
        entry = s.table[place]
        if entry == 0:
            break
        home = (entry >> 32) & mask
        if ((place - home) & mask) >= ((place - gap) & mask):
            s.table[gap] = entry
            gap = place
    s.table[gap] = 0


@helper
def refill(s, mask):
    """Clear `mask + 1` places and enter every row anew."""
    s.meta[meta.TABLE_MASK] = mask
    for place in range(mask + 1):
        s.table[place] = 0
    for row in range(1, s.meta[meta.ROWS]):
        if s.parent[row] != FREE_ROW:
            add_child(s, row, s.tag[row] & LOW32)


@helper
def make_room(s, additional):
    """Keep the table at most half full with that many more children."""
    places = s.meta[meta.TABLE_MASK] + 1
    wanted = 2 * (s.meta[meta.NODES] + additional)
    if wanted > places:
        while wanted > places:
            places *= 2
        refill(s, places - 1)
