"""Evict: free the nodes that `select` found, or the last pages of the last of them, and gather their slots."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

from flatradix.kernels.gpu.children import add_tombstones, pack_edge
from flatradix.kernels.gpu.evict_keys import HIGHEST
from flatradix.kernels.gpu.evict_order import SPENT
from flatradix.kernels.gpu.finish import arrive, first_refusal, publish, refuse
from flatradix.kernels.gpu.launch import Arrays, Constants, Kernel, Variant, multi_processors
from flatradix.kernels.gpu.rows import FREE, next_generation
from flatradix.layout import mail, numbers, reasons, scratch
from flatradix.layout.queries import Freeing

# Victims that a program frees at once. With 64, comparing their parents takes 187 registers, and 15 us instead of 9.
FREED = tl.constexpr(32)
# Slots of one page share the search for their edge: up to 16 slots, which are two memory sectors of the pool. A program
# copies GROUPS such groups at once, or more if these have fewer than LEAST_UNITS slots.
MOST_TOGETHER = 16
GROUPS = 128
LEAST_UNITS = 512
# The branching factor of the search for the victim that a slot belongs to.
FAN = tl.constexpr(256)


@triton.jit
def _together(parent):
    """Return (how many lanes have the parent of this lane, whether this lane is the first of them)."""
    lane = tl.arange(0, FREED)
    equal = parent[:, None] == parent[None, :]
    count = tl.sum(equal.to(tl.int32), axis=1)
    return count, tl.min(tl.where(equal, lane[None, :], FREED), axis=1) == lane


@triton.jit
def _detach(s, parent):
    """Subtract one child a lane from the counts of parents or namespaces; FREE marks a lane without a child.

    Lists namespaces that have become empty in `s.released`. Siblings are subtracted together: 10,000 leaves may have
    one parent, and additions to one count wait for one another.
    """
    count, is_first = _together(parent)
    below_row = is_first & (parent >= 0)
    tl.atomic_add(s.children + tl.where(below_row, parent, 0), -count, mask=below_row, sem="relaxed")
    top = is_first & (parent < 0) & (parent != FREE)
    namespace = tl.where(top, ~parent, 0)
    before = tl.atomic_add(s.namespace_children + namespace, -count, mask=top, sem="relaxed")
    empty = top & (before == count) & (namespace > 0)
    counter = s.numbers + numbers.RELEASED + tl.zeros([FREED], tl.int32)
    place = tl.atomic_add(counter, 1, mask=empty, sem="relaxed")
    tl.store(s.released + place, namespace, mask=empty)


@triton.jit
def _free_rows(s, w, victim, count):
    """Free the rows of victims, one a lane. Only the lane of a row reads or writes `s.parent` of that row."""
    active = victim < count
    row = tl.load(w.victims + victim, mask=active, other=0).to(tl.int64)
    parent = tl.load(s.parent + row, mask=active, other=FREE)
    generation = tl.load(s.generation + row, mask=active, other=0)
    stack = s.free_rows + tl.load(s.numbers + numbers.FREE_ROWS)
    tl.debug_barrier()  # every thread has read what is about to be overwritten
    tl.store(s.parent + row, tl.zeros([FREED], tl.int32) + FREE, mask=active)
    tl.store(s.generation + row, next_generation(generation), mask=active)
    tl.store(stack + victim, row.to(tl.int32), mask=active)
    add_tombstones(s, w, row, active)
    _detach(s, parent)


@triton.jit
def _owner(w, unit, count):
    """Return the last of `count` victims that has at most `unit` tokens before it; scalar."""
    low = tl.zeros([], tl.int64)
    high = count
    while high - low > 1:
        step = (high - low + FAN - 1) // FAN
        place = low + tl.arange(0, FAN).to(tl.int64) * step
        before = tl.load(w.tokens_before + place, mask=place < high, other=HIGHEST)
        low += (tl.sum((before <= unit).to(tl.int64)) - 1) * step
        high = tl.minimum(low + step, high)
    return low


@triton.jit
def _copy_slots(
    s, w, pool, slots, begin, end, count, kept, TOGETHER: tl.constexpr, UNITS: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Copy slots `begin` to `end`, each from its edge. TOGETHER slots in a row lie on one edge and share one search.

    kept: how many slots of the last victim's edge stay. EDGES: on how many edges UNITS slots and the slot before them
    can lie.
    """
    inner = tl.arange(0, TOGETHER)[None, :]
    low = _owner(w, begin, count)
    while begin < end:
        unit = begin + tl.arange(0, UNITS // TOGETHER).to(tl.int64) * TOGETHER
        inside = unit < end
        victim = tl.zeros_like(unit) + low
        span = tl.minimum(count - low, EDGES)
        while span > 1:
            half = span >> 1
            before = tl.load(w.tokens_before + victim + half)
            victim = tl.where(before <= unit, victim + half, victim)
            span -= half
        row = tl.load(w.victims + victim)
        before = tl.load(w.tokens_before + victim)
        first = tl.load(s.start + row).to(tl.int64) + tl.where(victim == count - 1, kept, 0)
        source = tl.multiple_of(first + unit - before, TOGETHER)
        slot = tl.load(pool + source[:, None] + inner, mask=inside[:, None], other=0)
        tl.store(slots + tl.multiple_of(unit, TOGETHER)[:, None] + inner, slot, mask=inside[:, None])
        low = tl.max(tl.where(inside, victim, 0))
        begin += UNITS


@triton.jit
def _shorten(s, w, victim, kept):
    """Leave the first `kept` units of a victim's edge. Only the last program to finish calls this."""
    row = tl.load(w.victims + victim).to(tl.int64)
    length = tl.load(s.length + row)
    end = tl.load(s.end + row)
    start = tl.load(s.start + row)
    spent = tl.load(w.counters + SPENT)
    tl.debug_barrier()
    tl.store(s.length + row, kept.to(tl.int32))
    tl.store(s.end + row, end - length + kept.to(tl.int32))
    tl.store(s.child_table + 2 * tl.load(w.entry + row).to(tl.int64) + 1, pack_edge(start, kept))
    tl.store(w.counters + SPENT, spent - kept)


@triton.jit
def found_victims(s, w, count, tokens, kept, space):
    """Return (victims, tokens to free, tokens that the last victim keeps, whether to free them).

    If `count` is negative, the selection has left these numbers on the device. Then nothing is freed if the selection
    was refused, if the victims are not in order, or if there is no space for so many slots.
    """
    good = first_refusal(w) == scratch.NO_ERROR
    if count < 0:
        page = tl.load(s.numbers + numbers.PAGE)
        tokens = tl.load(w.counters + scratch.SELECTED)
        count = tl.load(w.counters + scratch.SELECTED + 1)
        wanted = tl.load(w.counters + scratch.SELECTED + 2)
        kept = tl.maximum(tokens - (wanted + page - 1) // page * page, 0) * tl.load(s.numbers + numbers.BY_PAGE)
        tokens -= kept
        good = good & (tokens <= space) & (count < mail.UNORDERED)
    return count, tokens, kept, good


@triton.jit
def _tell_victims(w, call, tokens, nodes):
    tag = (call & mail.CALL_MASK) << 32
    tl.store(w.mail + mail.FREED, tag | tokens)
    tl.store(w.mail + mail.GONE, tag | nodes)


@triton.jit
def _update_counters(s, w, call, count, tokens):
    """Update the tree's counters, and tell the host how many namespaces were released.

    Only the last program to finish calls this.
    """
    released = tl.load(s.numbers + numbers.RELEASED)
    free = tl.load(s.numbers + numbers.FREE_ROWS)
    nodes = tl.load(s.numbers + numbers.NODES)
    evictable = tl.load(s.numbers + numbers.EVICTABLE)
    tombstones = tl.load(s.numbers + numbers.TOMBSTONES)
    tl.debug_barrier()
    tl.store(w.mail + mail.RELEASED, ((call & mail.CALL_MASK) << 32) | released)
    tl.store(s.numbers + numbers.RELEASED, 0)
    tl.store(s.numbers + numbers.FREE_ROWS, free + count)
    tl.store(s.numbers + numbers.NODES, nodes - count)
    tl.store(s.numbers + numbers.EVICTABLE, evictable - tokens)
    tl.store(s.numbers + numbers.TOMBSTONES, tombstones + count)


@triton.jit(
    do_not_specialize=[
        "pool", "slots", "counts", "count", "tokens", "kept", "space", "returned", "call", "programs", "freeing",
    ]
)  # fmt: skip
def free_kernel(
    s, w, pool, slots, counts, count: tl.int64, tokens: tl.int64, kept: tl.int64, space: tl.int64, returned: tl.int64,
    call: tl.int64, programs: tl.int32, freeing: tl.int32,
    TOGETHER: tl.constexpr, UNITS: tl.constexpr, EDGES: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Free victims: the first `freeing` programs free the rows while the others copy the slots, UNITS at once.

    If the last victim keeps units, it is no row to free: the last program shortens it. If the victims are not to be
    freed, see `found_victims`, this launch only tells their number. With COUNTS, that is a refusal.
    """
    call = call.to(tl.int64)
    space = space.to(tl.int64)
    returned = returned.to(tl.int64)
    count, tokens, kept, good = found_victims(s, w, count.to(tl.int64), tokens.to(tl.int64), kept.to(tl.int64), space)
    gone = tl.where(kept > 0, count - 1, count)
    program = tl.program_id(0).to(tl.int64)
    if good & (program < freeing):
        first = program * FREED
        while first < gone:
            _free_rows(s, w, first + tl.arange(0, FREED), gone)
            first += freeing * FREED
    elif good:
        tiles = (tokens + UNITS - 1) // UNITS
        each = (tiles + programs - freeing - 1) // (programs - freeing) * UNITS
        begin = (program - freeing) * each
        if begin < tokens:
            end = tl.minimum(begin + each, tokens)
            _copy_slots(s, w, pool, slots, begin, end, count, kept, TOGETHER, UNITS, EDGES)
    last, _bad = arrive(w, programs)
    if last:
        if good:
            if kept > 0:
                _shorten(s, w, gone, kept)
            _update_counters(s, w, call, gone, tokens)
            _tell_victims(w, call, tokens, gone)
            if COUNTS:
                tl.store(counts, returned + tokens)
                tl.store(counts + 1, gone)
            publish(s, w, call, tl.zeros([], tl.int64) + scratch.NO_ERROR, mail.EVICT)
        elif COUNTS:
            tl.store(counts, -1)
            tl.store(counts + 1, -1)
            if first_refusal(w) == scratch.NO_ERROR:
                refuse(w, tokens * 0, reasons.NO_ROOM, ((returned + tokens) << 32) | (returned + space))
            tl.debug_barrier()  # one thread stores the refusal, all threads read it
            publish(s, w, call, first_refusal(w), mail.EVICT)
        else:
            _tell_victims(w, call, tokens, gone)
            tl.store(w.counters + scratch.ARRIVED, 0)


_free = Kernel(free_kernel, ["*w", "*w", "*i64", "i64", "i64", "i64", "i64", "i64", "i64", "i32", "i32"])


def _tile(page: int) -> tuple[int, int]:
    """Return (slots that share a search, slots that a program copies at once)."""
    together = min(page & -page, MOST_TOGETHER)
    return together, max(GROUPS * together, LEAST_UNITS)


def _constants(page: int, counts: bool) -> Constants:
    together, units = _tile(page)
    # EDGES: the edge of the slot before, and the edges of `units` slots.
    return together, units, 1 + -(-units // page), counts


@functools.cache
def free_variant(page: int, wide: bool, counts: bool) -> Variant:
    """Return the variant that `free_selected` launches. counts: whether it tells the numbers on the device."""
    return _free.variant(_constants(page, counts), (wide, wide))


def programs_for(arrays: Arrays, into: Freeing) -> tuple[int, int]:
    """Return (programs, how many of them free rows) to free victims of unknown number.

    The host expects nearly as many as there is space for. A graph has space for the most that there may ever be.
    """
    at_once, space = multi_processors(arrays.device), into.space
    victims = min(space // arrays.page, arrays.rows)
    freeing = max(1, min(-(-victims // FREED.value), at_once if into.counts else 4 * at_once))
    return freeing + min(-(-space // _tile(arrays.page)[1]), 8 * at_once), freeing


def free_selected(arrays: Arrays, into: Freeing, call: int) -> None:
    """Free the victims of `select` and gather their slots, without the host: as `free`, with the device's numbers.

    If there is too little space, nothing is freed. With `into.counts` that is a refusal. Without, the mail tells the
    tokens (FREED) and nodes (GONE), also if they are not freed: the caller then compares them with the space. The bit
    UNORDERED of GONE also says that nothing was freed. The host may then call `free`.
    """
    programs, freeing = programs_for(arrays, into)
    variant = free_variant(arrays.page, arrays.pool_wide, into.counts != 0)
    _free(
        arrays, programs,
        (arrays.pool, into.slots, into.counts, -1, 0, 0, into.space, into.returned, call, programs, freeing),
        variant.constants, variant.wide,
    )  # fmt: skip


def free(arrays: Arrays, count: int, tokens: int, slots: int, call: int, kept: int = 0) -> None:
    """Free the `count` victims of `select`, and gather their slots in the order of eviction.

    tokens: the tokens to free. kept: tokens at the beginning of the last victim's edge that stay, whole pages; if there
    are any, the victim is shortened. slots: address of the output, [tokens] of the pool's dtype. The freed rows become
    the last entries of `free_rows`, in order; their `start` and `length` stay readable. The mail tells how many
    namespaces lost their last node. The codes of these namespaces are the first entries of `state.released`, in any
    order, until the next eviction. Takes 4 us for one node and 9 us for 8,500 nodes of 64 tokens on an H200.
    """
    at_once = 4 * multi_processors(arrays.device)
    freeing = max(1, min(-(-count // FREED.value), at_once))
    copying = min(-(-tokens // _tile(arrays.page)[1]), 2 * at_once)
    programs = freeing + copying
    _free(
        arrays, programs, (arrays.pool, slots, 0, count, tokens, kept, tokens, 0, call, programs, freeing),
        _constants(arrays.page, False), (arrays.pool_wide, arrays.pool_wide),
    )  # fmt: skip
