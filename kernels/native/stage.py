"""Pinned buffers for single keys, used in turn. Kernels read them in place: a copy would need its own launch."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import fixed_types, helper, int32_at, int64_at
from flatradix.kernels.native.answers import has_answered
from flatradix.kernels.native.memory import copy
from flatradix.layout import desk as places
from flatradix.layout.numbers import MAX_TOKEN


@helper
def _narrow(target, key, tokens):
    """Copy int64 tokens to int32. A token out of range becomes -1, which is out of range too."""
    wide, narrow = int64_at(key), int32_at(target)
    for at in range(tokens):
        token = wide[at]
        narrow[at] = token if 0 <= token <= MAX_TOKEN else -1


@helper
def put(desk, key, tokens, wide):
    """Copy a key to the next buffer. Return its address; 0 if a kernel may still read that buffer.

    key: address of the tokens, int64 if `wide`, else int32. Half as many bytes are read over PCIe as with int64.
    """
    d = int64_at(desk)
    reader = d[places.FIRST_CALL + d[places.NEXT]]
    if reader and not has_answered(d[places.MAIL], reader):
        return 0
    target = d[places.STAGES] + d[places.NEXT] * places.STAGED_TOKENS * 4
    if wide:
        _narrow(target, key, tokens)
    else:
        copy(target, key, 4 * tokens)
    return target


@helper
def reserve(desk, call):
    """Keep the last buffer until the kernel of `call` has answered."""
    d = int64_at(desk)
    d[places.FIRST_CALL + d[places.NEXT]] = call
    d[places.NEXT] = (d[places.NEXT] + 1) % places.COUNT


@fixed_types("(int64, int64, int64, boolean)", nogil=True)
def stage_key(desk, key, tokens, wide):
    """Copy a key as `put` does. Without a `commit_key`, the next key takes the same buffer."""
    return put(desk, key, tokens, wide)


@fixed_types("(int64, int64)", nogil=True)
def commit_key(desk, call):
    """Keep the buffer of the last `stage_key` until the kernel of `call` has answered."""
    reserve(desk, call)
