"""Launch an insert: of a batch in three or four kernels, of one key in one. For the arguments see `kernels/gpu`."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import fixed_types, helper, int64_at
from flatradix.kernels.native.launch import cells_of, start
from flatradix.kernels.native.stage import put, reserve
from flatradix.layout.desk import STAGING


@helper
def _plan(
    record, stream, values, offsets, names, start_handles, start_lengths, slots, slot_offsets, total, slot_total, limit,
    name, batch, mask,
):  # fmt: skip
    cells = cells_of(record)
    cells[0] = values
    cells[1] = offsets
    cells[2] = names
    cells[3] = start_handles
    cells[4] = start_lengths
    cells[5] = slots
    cells[6] = slot_offsets
    cells[7] = total
    cells[8] = slot_total
    cells[9] = limit
    cells[10] = name
    cells[11] = batch
    cells[12] = mask
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


@fixed_types(f"({'int64, ' * 31})", nogil=True)
def start_insert(
    plan, settle, compact, build, settle_programs, compact_programs, build_programs, stream, values, offsets, slots,
    slot_offsets, names, name, start_handles, start_lengths, total, slot_total, limit, batch, mask, rows, pool,
    priorities, priority, inserteds, inserted, prefix_lengths, lengths, handles, call,
):  # fmt: skip
    """Launch the kernels of a batch: plan, settle, perhaps compact, build. Return the driver's code.

    plan, settle, compact, build: addresses of records; compact is 0 if no compaction is needed. The other arguments are
    those of the kernels.
    """
    code = _plan(
        plan, stream, values, offsets, names, start_handles, start_lengths, slots, slot_offsets, total, slot_total,
        limit, name, batch, mask,
    )  # fmt: skip
    if code == 0:
        code = _settle(
            settle, settle_programs, stream, values, offsets, names, name, batch, rows, mask, 1 if compact else 0
        )
    if code == 0 and compact:
        code = _compact(compact, compact_programs, stream, pool)
    if code == 0:
        code = _build(
            build, build_programs, stream, values, offsets, names, slots, slot_offsets, priorities, inserteds, pool,
            prefix_lengths, lengths, handles, name, priority, inserted, batch, rows, call,
        )  # fmt: skip
    return code


_KINDS = ["int64"] * 23
_KINDS[4] = _KINDS[5] = _KINDS[9] = _KINDS[10] = "boolean"


@fixed_types(f"({', '.join(_KINDS)})", nogil=True)
def start_insert_one(
    record, stream, desk, values, on_host, wide, start_handles, start_lengths, slots, slots_on_host, slots_wide, pool,
    prefix_lengths, lengths, handles, total, slot_total, limit, name, priority, inserted, rows, call,
):  # fmt: skip
    """Launch the insert of one key. Return the driver's code; -1 if too few pinned buffers are free.

    on_host, slots_on_host: whether the key and its slots are in host memory, and go to a pinned buffer each, from which
    the kernel reads them. wide, slots_wide: whether they have 64 bits. After an error, the buffers stay free: whoever
    uses them next must first wait for the device. The other arguments are those of the kernel.
    """
    staged = 0
    if on_host:
        values = put(desk, staged, values, total, wide)
        staged += 1
    if slots_on_host:
        slots = put(desk, staged, slots, slot_total, slots_wide)
        staged += 1
    if (on_host and values == 0) or (slots_on_host and slots == 0):
        return -1
    cells = cells_of(record)
    cells[0] = values
    cells[1] = start_handles
    cells[2] = start_lengths
    cells[3] = slots
    cells[4] = int64_at(desk)[STAGING] if on_host else 0
    cells[5] = pool
    cells[6] = prefix_lengths
    cells[7] = lengths
    cells[8] = handles
    cells[9] = total
    cells[10] = slot_total
    cells[11] = limit
    cells[12] = name
    cells[13] = priority
    cells[14] = inserted
    cells[15] = rows
    cells[16] = call
    code = start(record, 1, stream)
    if code == 0:
        for _ in range(staged):
            reserve(desk, call)
    return code
