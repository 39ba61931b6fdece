"""What a kernel leaves about its call: why it was refused, or what it changed."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import helper
from flatradix.layout import numbers


@helper
def refuse(s, query, value):
    """Note which query is refused, and a number that the message wants."""
    s.numbers[numbers.ERROR_QUERY] = query
    s.numbers[numbers.ERROR_VALUE] = value


@helper
def note(s, call, operation, handle, length, prefix):
    """Note what a call changed, the last thing that a kernel does: if its Python is cut short, it is taken back.

    Of a batch, the caller keeps handles, lengths and prefix lengths. Call 0 takes the last one back.
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
