"""Wait for words that kernels write to pinned memory. A word is (call << 32 | value)."""

from __future__ import annotations

from flatradix.kernels.cpu.jit import fixed_types, helper, int32_at
from flatradix.kernels.native.memory import load_acquire
from flatradix.layout import mail

_LOW = 0xFFFFFFFF


@helper
def _is_later(call, other):
    return 0 < ((call - other) & mail.CALL_MASK) < 1 << 30


@helper
def _has_come(word, call):
    """Return whether `call`, or a later call, has written a word. Call 0 means that it was never written."""
    return word >> 32 == call or (word >> 32 != 0 and _is_later(word >> 32, call))


@helper
def _answer_at(words, call):
    return words + 8 * (mail.FIRST_ANSWER + call % mail.ANSWER_RING * mail.ANSWER_WORDS)


@helper
def has_answered(words, call):
    """Return whether the kernel of a single key has written the first number of its answer. words: of the mail."""
    return _has_come(load_acquire(_answer_at(words, call)), call)


@fixed_types("(int64, int64, boolean, int64)", nogil=True)
def await_word(address, call, exact, turns):
    """Wait until `call`, or a later call unless `exact`, has written a word. Return the word, or -1 after `turns`."""
    for _ in range(turns):
        word = load_acquire(address)
        if word >> 32 == call or (not exact and _has_come(word, call)):
            return word
    return -1


@fixed_types("(int64, int64, int64)", nogil=True)
def await_answer(words, call, turns):
    """Wait for the answer to a single key. Return (state, length, handle, prefix length), the lengths unsigned.

    state: 1 if these are the numbers, 0 if they have not come after `turns`, -1 if a later call has overwritten one.
    """
    place = _answer_at(words, call)
    for _ in range(turns):
        missing = lost = False
        for index in range(mail.ANSWER_WORDS):
            told = load_acquire(place + 8 * index) >> 32
            missing |= told == 0 or (told != call and not _is_later(told, call))
            lost |= told != call
        if lost and not missing:
            return -1, 0, 0, 0
        if not missing:
            low, high = load_acquire(place + 8) & _LOW, load_acquire(place + 16) & _LOW
            return 1, load_acquire(place) & _LOW, low | high << 32, load_acquire(place + 24) & _LOW
    return 0, 0, 0, 0


@fixed_types("(int64, int64, int64, int64, int64)", nogil=True)
def await_lengths(words, call, count, lengths, turns):
    """Wait for the lengths that `call` tells in `count` words, and copy them to int32 [count] at `lengths`.

    Return 1, or 0 if a word has not come after `turns`, or -1 if a later call has overwritten one, or one is NO_LENGTH.
    """
    out = int32_at(lengths)
    for query in range(count):
        word = load_acquire(words + 8 * query)
        while word >> 32 != call:
            if word >> 32 != 0 and _is_later(word >> 32, call):
                return -1
            if turns == 0:
                return 0
            turns -= 1
            word = load_acquire(words + 8 * query)
        if word & _LOW == mail.NO_LENGTH:
            return -1
        out[query] = word & _LOW
    return 1
