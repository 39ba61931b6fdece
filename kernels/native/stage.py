"""Pinned buffers for single keys and their slots, used in turn.

Kernels read them in place: a copy would need its own launch.
"""

from __future__ import annotations

from flatradix.kernels.cpu.jit import fixed_types, helper, int32_at, int64_at
from flatradix.kernels.native.answers import has_answered
from flatradix.kernels.native.memory import copy
from flatradix.layout import desk as places
from flatradix.layout.numbers import MAX_TOKEN


@helper
def _narrow(target, key, tokens):
    """Copy int64 tokens or slots to int32. What is out of range becomes -1, which is out of range too."""
    wide, narrow = int64_at(key), int32_at(target)
    for at in range(tokens):
        token = wide[at]
        narrow[at] = token if 0 <= token <= MAX_TOKEN else -1


@helper
def put(desk, ahead, values, count, wide):
    """Copy values to the buffer that is next in turn, or with `ahead` to the one after that.

    Returns its address; 0 if a kernel may still read that buffer. values: address of `count` numbers, no more than a
    buffer holds, int64 if `wide`, else int32. Half as many bytes are read over PCIe as with int64.
    """
    d = int64_at(desk)
    at = (d[places.NEXT] + ahead) % d[places.BUFFERS]
    reader = d[places.FIRST_CALL + at]
    if reader and not has_answered(d[places.MAIL], reader):
        return 0
    target = d[places.STAGES] + at * d[places.TOKENS] * 4
    if wide:
        _narrow(target, values, count)
    else:
        copy(target, values, 4 * count)
    return target


@helper
def reserve(desk, call):
    """Keep the next buffer until the kernel of `call` has answered."""
    d = int64_at(desk)
    d[places.FIRST_CALL + d[places.NEXT]] = call
    d[places.NEXT] = (d[places.NEXT] + 1) % d[places.BUFFERS]


@fixed_types("(int64, int64, int64, int64, boolean)", nogil=True)
def stage(desk, ahead, values, count, wide):
    """Copy values as `put` does. Without a `commit`, the next call takes the same buffer."""
    return put(desk, ahead, values, count, wide)


@fixed_types("(int64, int64)", nogil=True)
def commit(desk, call):
    """Keep the buffer of the last `stage` until the kernel of `call` has answered. Once for each buffer, in order."""
    reserve(desk, call)
