"""Mailbox: numbers that kernels write to pinned memory for the host, without stopping the stream.

A word is (call << 32 | value). A store of 8 bytes becomes visible whole or not at all. So a word with the number of a
call also holds the value of that call, without fences or a synchronisation. A host that polls sees a kernel's answer
3.5 us after the launch (H200).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch

from flatradix.kernels import native
from flatradix.layout import mail

_LOW = 0xFFFFFFFF
_TURNS = 1 << 16  # polls between two checks that the device still works, in which a signal waits: 50 us


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
        self._address = self.words.data_ptr()
        self.last = 0
        self.last_change = 0  # the last call that may have changed a size: it writes all sizes
        self._told = 0
        self._next_length = 0

    def _word(self, place: int, call: int, exact: bool = False) -> int:
        """Wait until `call`, or a later call unless `exact`, has written a word. Return the word.

        Call 0 in a word means that it was never written. Raises the device's errors, and RuntimeError if the device is
        idle and the word is still missing.
        """
        word = self._view[place]
        if word >> 32 == call:
            return word
        address = self._address + 8 * place
        while (word := native.await_word.call(address, call, exact, _TURNS)) < 0:
            self._check_device(place, call, exact)
        return word

    def _check_device(self, place: int, call: int, exact: bool) -> None:
        """Raise RuntimeError if the device is idle and a word is still missing. Raises the device's errors."""
        if self._is_idle() and native.await_word.call(self._address + 8 * place, call, exact, 1) < 0:
            raise RuntimeError(f"call {call} has not told its numbers: its launch failed or was interrupted")

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

    def await_answer(self, call: int) -> None:
        """Wait until the kernel of a single key has answered."""
        self._word(_answer_of(call), call)

    def answer(self, call: int) -> tuple[int, int, int] | None:
        """Wait for the answer to a single key: (length, handle, prefix length), the lengths unsigned.

        Return None if a later call has overwritten a part of the answer.
        """
        while not (found := native.await_answer.call(self._address, call, _TURNS))[0]:
            for place in range(_answer_of(call), _answer_of(call) + mail.ANSWER_WORDS):
                self._check_device(place, call, False)
        return found[1:] if found[0] > 0 else None

    def reserve_lengths(self, batch: int) -> int:
        """Return where a call may tell the lengths of a batch, or -1 if the batch is too large."""
        if batch > mail.MOST_TOLD:
            return -1
        place = self._next_length if self._next_length + batch <= mail.TOLD_RING else 0
        self._next_length = place + batch
        return place

    def lengths(self, call: int, place: int, batch: int) -> torch.Tensor | None:
        """Wait for the lengths that a call tells at a place: int32 [B] in host memory.

        Return None if the call was refused, which the words of its invalid queries tell, or if a later call has
        overwritten a part.
        """
        found = torch.empty(batch, dtype=torch.int32, device="cpu")
        arguments = self._address + 8 * (mail.FIRST_TOLD + place), call, batch, found.data_ptr()
        while not (state := native.await_lengths.call(*arguments, _TURNS)):
            if self._is_idle() and not native.await_lengths.call(*arguments, 1):
                raise RuntimeError(f"call {call} has not told its lengths: its launch failed or was interrupted")
        return found if state > 0 else None

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


def _answer_of(call: int) -> int:
    return mail.FIRST_ANSWER + call % mail.ANSWER_RING * mail.ANSWER_WORDS


def is_later(call: int, other: int) -> bool:
    """Return whether `call` came after `other`. After 2**31 - 1, call numbers begin again at 1."""
    return 0 < (call - other & mail.CALL_MASK) < 1 << 30
