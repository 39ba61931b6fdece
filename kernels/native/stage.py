"""Pinned buffers for single keys, used in turn. Kernels read them in place: a copy would need its own launch."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import fixed_types, helper, int64_at
from flatradix.kernels.native.answers import has_answered
from flatradix.kernels.native.memory import copy
from flatradix.layout import desk as places


@helper
def put(desk, key, size):
    """Copy a key of `size` bytes to the next buffer. Return its address; 0 if a kernel may still read that buffer."""
    d = int64_at(desk)
    reader = d[places.FIRST_CALL + d[places.NEXT]]
    if reader and not has_answered(d[places.MAIL], reader):
        return 0
    target = d[places.STAGES] + d[places.NEXT] * places.STAGED_BYTES
    copy(target, key, size)
    return target


@helper
def reserve(desk, call):
    """Keep the last buffer until the kernel of `call` has answered."""
    d = int64_at(desk)
    d[places.FIRST_CALL + d[places.NEXT]] = call
    d[places.NEXT] = (d[places.NEXT] + 1) % places.COUNT


@fixed_types("(int64, int64, int64)", nogil=True)
def stage_key(desk, key, size):
    """Copy a key as `put` does. Without a `commit_key`, the next key takes the same buffer."""
    return put(desk, key, size)


@fixed_types("(int64, int64)", nogil=True)
def commit_key(desk, call):
    """Keep the buffer of the last `stage_key` until the kernel of `call` has answered."""
    reserve(desk, call)
