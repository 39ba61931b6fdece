"""Launch an insert: plan, settle, perhaps compact, build. Their arguments are explained in `kernels/gpu`."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import fixed_types, helper
from flatradix.kernels.native.launch import cells_of, start
from flatradix.kernels.native.stage import put, reserve


@helper
def _plan(
    record, stream, values, offsets, names, start_handles, start_lengths, slots, slot_offsets, stage, total, slot_total,
    limit, name, batch, mask,
):  # fmt: skip
    cells = cells_of(record)
    cells[0] = values
    cells[1] = offsets
    cells[2] = names
    cells[3] = start_handles
    cells[4] = start_lengths
    cells[5] = slots
    cells[6] = slot_offsets
    cells[7] = stage
    cells[8] = total
    cells[9] = slot_total
    cells[10] = limit
    cells[11] = name
    cells[12] = batch
    cells[13] = mask
    return start(record, batch, stream)


@helper
def _settle(record, programs, stream, values, offsets, names, name, batch, rows, mask, may_compact):
    cells = cells_of(record)
    cells[0] = values
    cells[1] = offsets
    cells[2] = names
    cells[3] = name
    cells[4] = batch
    cells[5] = rows
    cells[6] = mask
    cells[7] = may_compact
    return start(record, programs, stream)


@helper
def _compact(record, programs, stream, pool):
    cells = cells_of(record)
    cells[0] = pool
    cells[1] = programs
    cells[2] = 0
    return start(record, programs, stream)


@helper
def _build(
    record, programs, stream, values, offsets, names, slots, slot_offsets, priorities, inserteds, pool, prefix_lengths,
    lengths, handles, name, priority, inserted, batch, rows, call,
):  # fmt: skip
    cells = cells_of(record)
    cells[0] = values
    cells[1] = offsets
    cells[2] = names
    cells[3] = slots
    cells[4] = slot_offsets
    cells[5] = priorities
    cells[6] = inserteds
    cells[7] = pool
    cells[8] = prefix_lengths
    cells[9] = lengths
    cells[10] = handles
    cells[11] = name
    cells[12] = priority
    cells[13] = inserted
    cells[14] = batch
    cells[15] = rows
    cells[16] = call
    return start(record, programs, stream)


_KINDS = ["int64"] * 36
_KINDS[11] = _KINDS[14] = _KINDS[15] = "boolean"


@fixed_types(f"({', '.join(_KINDS)})", nogil=True)
def start_insert(
    plan, settle, compact, build, settle_programs, compact_programs, build_programs, stream, desk, stage, values, wide,
    offsets, slots, slots_on_host, slots_wide, slot_offsets, names, name, start_handles, start_lengths, total,
    slot_total, limit, batch, mask, rows, pool, priorities, priority, inserteds, inserted, prefix_lengths, lengths,
    handles, call,
):  # fmt: skip
    """Launch the three or four kernels of an insert. Return the driver's code; -1 if too few pinned buffers are free.

    plan, settle, compact, build: addresses of records; compact is 0 if no compaction is needed. stage: 0, or the values
    are a key in host memory, which goes to a pinned buffer, from which the first kernel copies it to this address.
    slots_on_host: whether the slots are in host memory, and go to a pinned buffer too. After an error, the buffers stay
    free: whoever uses them next must first wait for the device. The other arguments are those of the kernels.
    """
    staged = 0
    if stage:
        values = put(desk, staged, values, total, wide)
        staged += 1
    if slots_on_host:
        slots = put(desk, staged, slots, slot_total, slots_wide)
        staged += 1
    if (stage and values == 0) or (slots_on_host and slots == 0):
        return -1
    code = _plan(
        plan, stream, values, offsets, names, start_handles, start_lengths, slots, slot_offsets, stage, total,
        slot_total, limit, name, batch, mask,
    )  # fmt: skip
    key = stage if stage else values
    if code == 0:
        code = _settle(
            settle, settle_programs, stream, key, offsets, names, name, batch, rows, mask, 1 if compact else 0
        )
    if code == 0 and compact:
        code = _compact(compact, compact_programs, stream, pool)
    if code == 0:
        code = _build(
            build, build_programs, stream, key, offsets, names, slots, slot_offsets, priorities, inserteds, pool,
            prefix_lengths, lengths, handles, name, priority, inserted, batch, rows, call,
        )  # fmt: skip
    if code == 0:
        for _ in range(staged):
            reserve(desk, call)
    return code
