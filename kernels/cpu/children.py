"""The child table: open addressing with linear probing over (tag, row) entries, keyed by (parent, first page).

Only `mask + 1` entries are in use. This part doubles when it is half full, so that the table of a small tree stays in
the CPU cache whatever its capacity. A row keeps its tag, so neither growth nor removal hashes tokens again.
"""

from __future__ import annotations

import numpy as np

from flatradix.kernels.cpu.jit import helper
from flatradix.kernels.cpu.units import common_tokens, page_sum
from flatradix.layout import handles, hashing, numbers
from flatradix.layout.handles import LOW32
from flatradix.layout.state import FREE_ROW

page_tag = helper(hashing.page_tag)
pack_entry = helper(handles.pack_entry)


@helper
def tag_of(s, first, second, wide, parent):
    bigram = s.numbers[numbers.BIGRAM] != 0
    return page_tag(page_sum(s.multipliers, first, second, wide, s.numbers[numbers.PAGE], bigram), parent)


@helper
def find_child(s, parent, key, wide, limit):
    """Return (row, units in common) of the child of `parent` that begins with the first page of `key`, or (0, 0).

    `key` is an address of `limit` units, at least one page. The units in common are whole pages.
    """
    page = s.numbers[numbers.PAGE]
    bigram = s.numbers[numbers.BIGRAM] != 0
    step = 8 if wide else 4
    tag = tag_of(s, key, key + step, wide, parent)
    mask = s.numbers[numbers.TABLE_MASK]
    at = tag & mask
    while True:
        entry = s.child_table[at]
        if entry == 0:
            return 0, 0
        if ((entry >> 32) & LOW32) == tag:
            row = entry & LOW32
            if s.parent[row] == parent:
                start = np.int64(s.start[row])
                count = min(np.int64(s.length[row]), limit)
                common = common_tokens(s.tokens + 4 * start, key, wide, count)
                if bigram and common > 0:
                    common = common_tokens(s.seconds + 4 * start, key + step, wide, common)
                if common >= page:
                    return row, common - common % page
        at = (at + 1) & mask


@helper
def add_child(s, row, tag):
    """Enter a row. No sibling may begin with the same page, unless it is detached."""
    s.tag[row] = np.int32(tag)
    mask = s.numbers[numbers.TABLE_MASK]
    at = tag & mask
    while s.child_table[at] != 0:
        at = (at + 1) & mask
    s.child_table[at] = pack_entry(tag, row)


@helper
def _entry_of(s, row):
    mask = s.numbers[numbers.TABLE_MASK]
    entry = pack_entry(s.tag[row] & LOW32, row)
    at = entry >> 32 & mask
    while s.child_table[at] != entry:
        at = (at + 1) & mask
    return at


@helper
def replace_child(s, row, successor):
    """Give the entry of `row` to `successor`, which has the same parent and the same first page."""
    s.tag[successor] = s.tag[row]
    s.child_table[_entry_of(s, row)] = pack_entry(s.tag[row] & LOW32, successor)


@helper
def remove_child(s, row):
    """Remove the entry of `row` and close the gap, so that no probe ends early."""
    mask = s.numbers[numbers.TABLE_MASK]
    gap = _entry_of(s, row)
    at = gap
    while True:
        at = (at + 1) & mask
        entry = s.child_table[at]
        if entry == 0:
            break
        home = (entry >> 32) & mask
        if ((at - home) & mask) >= ((at - gap) & mask):
            s.child_table[gap] = entry
            gap = at
    s.child_table[gap] = 0


@helper
def refill(s, mask):
    """Clear the first `mask + 1` entries, use only these, and enter every live row again."""
    s.numbers[numbers.TABLE_MASK] = mask
    for at in range(mask + 1):
        s.child_table[at] = 0
    for row in range(1, s.numbers[numbers.ROWS]):
        if s.parent[row] != FREE_ROW:
            add_child(s, row, s.tag[row] & LOW32)


@helper
def grow_table(s, additional):
    """Grow the table until it is at most half full with `additional` more children."""
    entries = s.numbers[numbers.TABLE_MASK] + 1
    wanted = 2 * (s.numbers[numbers.NODES] + additional)
    if wanted > entries:
        while wanted > entries:
            entries *= 2
        refill(s, entries - 1)
