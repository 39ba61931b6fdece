"""What a kernel stores about its call: why it was refused, or what it changed."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import helper
from flatradix.layout import numbers


@helper
def note_refusal(s, query, value):
    """Store which query is refused, and a number for the error message."""
    s.numbers[numbers.ERROR_QUERY] = query
    s.numbers[numbers.ERROR_VALUE] = value


@helper
def note_change(s, call, operation, handle, length, prefix):
    """Store what a call changed, as the last step of its kernel: if the call is interrupted then, it can be undone.

    For a batch, the caller keeps handles, lengths and prefix lengths. Call 0 is the undoing of the last call.
    """
    if call == 0:
        s.numbers[numbers.LAST_CALL] = s.numbers[numbers.CALL_BEFORE]
    elif s.numbers[numbers.LAST_CALL] != call:
        s.numbers[numbers.CALL_BEFORE] = s.numbers[numbers.LAST_CALL]
        s.numbers[numbers.LAST_CALL] = call
    s.numbers[numbers.LAST_OPERATION] = operation
    s.numbers[numbers.LAST_HANDLE] = handle
    s.numbers[numbers.LAST_LENGTH] = length
    s.numbers[numbers.LAST_PREFIX] = prefix
