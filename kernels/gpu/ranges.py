"""Copy ranges of slots on a GPU for a tree on the CPU, any number of ranges in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from flatradix.kernels.gpu.launch import Arrays, Kernel

BLOCK = tl.constexpr(1024)


@triton.jit(do_not_specialize=["ranges", "source", "target", "count", "total"])
def copy_ranges_kernel(ranges, source, target, count: tl.int32, total: tl.int64):
    """Copy `total` values, of which each program copies BLOCK. ranges: as for `copy_ranges`."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + count - 1
    while tl.max(high - low) > 0:  # the first range that ends beyond j
        middle = (low + high) // 2
        beyond = tl.load(ranges + middle) > j
        high = tl.where(beyond, middle, high)
        low = tl.where(beyond, low, tl.minimum(middle + 1, high))
    inside = j < total
    value = tl.load(source + j + tl.load(ranges + count + low), mask=inside)
    place = j + tl.load(ranges + 2 * count + low)
    tl.store(target + place, value.to(target.dtype.element_ty), mask=inside)


_copy_ranges = Kernel(copy_ranges_kernel, ["*i64", "*w", "*w", "i32", "i64"])


def copy_ranges(
    arrays: Arrays, ranges: int, count: int, total: int, source: int, source_wide: bool, target: int, target_wide: bool
) -> None:
    """Copy `count` ranges with `total` values, at least one, from `source` to `target`.

    source, target: addresses of int64 (`_wide`) or int32 values. ranges: address of int64 [3, count] on the device. Row
    0: the sum of the lengths up to and including each range. Row 1: the position of the range in `source`, minus the
    sum of the lengths before it. Row 2: the same difference for its position in `target`.
    """
    arguments = (ranges, source, target, count, total)
    _copy_ranges(arrays, -(-total // BLOCK.value), arguments, wide=(source_wide, target_wide))
