"""Mailbox: numbers that kernels write to pinned memory for the host, without stopping the stream.

A word is (call << 32 | value). A store of 8 bytes becomes visible whole or not at all. So a word with the number of a
call also holds the value of that call, without fences or a synchronisation. A host that polls sees a kernel's answer
3.5 us after the launch (H200).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch

from flatradix.layout import mail

_LOW = 0xFFFFFFFF
_SPINS = 4096  # polls between two checks that the device still works


class Refusal(NamedTuple):
    """Why a call was refused. operation: its name. query, value: for the message."""

    operation: str
    reason: int
    query: int
    value: int


# Pinned memory of deleted trees that had calls under way when they were deleted.
_abandoned: list[tuple[Mailbox, Any]] = []


def abandon(mailbox: Mailbox, owner: Any) -> None:
    """Keep a mailbox, and other memory that kernels may still use (`owner`), until the last call is done.

    Otherwise torch would give the pinned memory to its next user, and a kernel would write into it.
    """
    for entry in tuple(_abandoned):
        if entry[0].is_done():
            with suppress(ValueError):  # another thread, or the deletion of another tree, has removed it
                _abandoned.remove(entry)
    if not mailbox.is_done():
        _abandoned.append((mailbox, owner))


class Mailbox:
    """The words of one tree, and the number of the last call that will write them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.words = torch.zeros(mail.SIZE, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._view = memoryview(self.words.numpy().data)
        self.last = 0
        self.last_change = 0  # the last call that may have changed a size: it writes all sizes
        self._told = 0

    def _word(self, place: int, call: int, exact: bool = False) -> int:
        """Wait until `call`, or a later call unless `exact`, has written a word. Return the word.

        Call 0 in a word means that it was never written. Raises the device's errors, and RuntimeError if the device is
        idle and the word is still missing.
        """
        view = self._view
        spins = 0
        while (word := view[place]) >> 32 != call and (exact or word < 1 << 32 or not is_later(word >> 32, call)):
            spins += 1
            if spins % _SPINS == 0 and self._is_idle() and view[place] == word:
                raise RuntimeError(f"call {call} has not told its numbers: its launch failed or was interrupted")
        return word

    def is_done(self) -> bool:
        """Return whether all calls so far have written their numbers. Does not wait."""
        call = self._view[mail.ERRORS] >> 32
        return call == self.last or is_later(call, self.last)

    def _is_idle(self) -> bool:
        """Return whether the device has done all enqueued work. Raises if it has failed: then no word will come."""
        if self._device.type == "cuda":
            if not torch.cuda.current_stream(self._device).query():
                return False
            torch.cuda.synchronize(self._device)
        return True

    def wait(self, place: int, call: int) -> int:
        """Wait until `call` has written a word, and return the value. No later call may write this word meanwhile."""
        return self._word(place, call, exact=True) & _LOW

    def counter(self, place: int) -> int:
        """Wait for all calls so far, and return one of the tree's sizes after them."""
        self._word(mail.ERRORS, self.last)
        return self._word(place, self.last_change) & _LOW

    def latest(self, place: int) -> tuple[int, int]:
        """Return (the call that wrote a word, the value) as the word is now. Does not wait."""
        word = self._view[place]
        return word >> 32, word & _LOW

    def await_answer(self, call: int, index: int = 0) -> int | None:
        """Wait for one number of a single key's answer. Return None if a later call has overwritten it."""
        place = mail.FIRST_ANSWER + call % mail.ANSWER_RING * mail.ANSWER_WORDS + index
        word = self._word(place, call)
        return word & _LOW if word >> 32 == call else None

    def answers(self, call: int) -> list[int] | None:
        """Wait for the four numbers of a single key's answer. Return None if a later call has overwritten one."""
        place = mail.FIRST_ANSWER + call % mail.ANSWER_RING * mail.ANSWER_WORDS
        self._word(place + mail.ANSWER_WORDS - 1, call)
        tag = call << 32
        found = [word - tag for word in self._view[place : place + mail.ANSWER_WORDS]]
        if min(found) < 0 or max(found) > _LOW:  # a word is still missing, or belongs to another call
            one_by_one = [self.await_answer(call, index) for index in range(mail.ANSWER_WORDS)]
            return None if None in one_by_one else one_by_one  # type: ignore[return-value]
        return found

    def refusals(self) -> int:
        """Wait for all calls so far. Return how many refusals were not reported yet."""
        return self._word(mail.ERRORS, self.last) - self._told & _LOW

    def first_refusal(self) -> tuple[Refusal | None, int]:
        """Return the first refusal that was not reported yet and is still stored, and the number of the other refusals.

        Waits for all calls so far. `mark_told` must follow.
        """
        count = self.refusals()
        if count == 0:
            return None, 0
        number = self._told + 1 + max(0, count - mail.REFUSAL_RING)
        place = mail.FIRST_REFUSAL + number % mail.REFUSAL_RING * mail.REFUSAL_WORDS
        kind, query, low, high = (self.wait(place + i, number & mail.CALL_MASK) for i in range(4))
        value = low | high << 32
        value -= (value >> 63) << 64
        return Refusal(mail.OPERATIONS[kind >> 8], -(kind & 0xFF), query, value), count - 1

    def mark_told(self, refusals: int) -> None:
        """Count `refusals` more refusals as reported."""
        self._told += refusals

    # For interrupted calls. No call may be under way on the device.

    def has_run(self, call: int) -> bool:
        """Return whether `call` was the last call that the device did."""
        return self._view[mail.ERRORS] >> 32 == call

    def was_refused(self, call: int) -> bool:
        """Return whether `call` was the last call that was refused."""
        number = self._view[mail.ERRORS] & _LOW
        word = self._view[mail.FIRST_REFUSAL + number % mail.REFUSAL_RING * mail.REFUSAL_WORDS + 4]
        return number > 0 and word & _LOW == call


def is_later(call: int, other: int) -> bool:
    """Return whether `call` came after `other`. After 2**31 - 1, call numbers begin again at 1."""
    return 0 < (call - other & mail.CALL_MASK) < 1 << 30
