"""What kernels tell the host without stopping the stream: numbers in pinned memory, each marked with its call.

A word is (call << 32 | value). A store of 8 bytes is seen whole or not at all, so a word that carries the call's number
carries its value too, and neither fences nor a synchronisation are needed: 3.5 us after its launch a kernel's answer is
seen by a host that looks for it (H200).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import torch

from flatradix.layout import mail

_LOW = 0xFFFFFFFF
_SPINS = 4096  # between two looks at whether the device still works


class Refusal(NamedTuple):
    """Why a call was refused. `operation`: its name; `query`, `value`: for the message."""

    operation: str
    reason: int
    query: int
    value: int


# Pinned memory of trees that are gone, with calls that were still under way when they went.
_abandoned: list[tuple[Mailbox, Any]] = []


def abandon(mailbox: Mailbox, owner: Any) -> None:
    """Keep a mailbox, and what else kernels may still use, until the last call is done.

    Torch would give the memory to the next who wants pinned memory, and a kernel would write into it.
    """
    for entry in tuple(_abandoned):
        if entry[0].is_done():
            with suppress(ValueError):  # another thread, or a tree that went meanwhile, was here first
                _abandoned.remove(entry)
    if not mailbox.is_done():
        _abandoned.append((mailbox, owner))


class Mailbox:
    """The words of one tree, and the number of its last call that will write them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.words = torch.zeros(mail.SIZE, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self._view = memoryview(self.words.numpy().data)
        self.last = 0
        self.last_change = 0  # the last call that may have changed a size, and tells them all
        self._told = 0

    def _word(self, place: int, call: int, exact: bool = False) -> int:
        """A word, once `call`, or unless `exact` a later one, has written it. Raises what the device raises.

        A word that was never written carries 0, which is no call.
        """
        view = self._view
        spins = 0
        while (word := view[place]) >> 32 != call and (exact or word < 1 << 32 or not is_later(word >> 32, call)):
            spins += 1
            if spins % _SPINS == 0 and self._is_idle() and view[place] == word:
                raise RuntimeError(f"call {call} has not told its numbers: its launch failed or was interrupted")
        return word

    def is_done(self) -> bool:
        """Whether all calls so far have told their numbers; looks once."""
        return self._view[mail.ERRORS] >> 32 == self.last

    def _is_idle(self) -> bool:
        """Whether the device has done all that was enqueued. Raises if it has failed: then no word will come."""
        if self._device.type == "cuda":
            if not torch.cuda.current_stream(self._device).query():
                return False
            torch.cuda.synchronize(self._device)
        return True

    def wait(self, place: int, call: int) -> int:
        """The value of a word that nobody else writes after `call`, once that has."""
        return self._word(place, call, exact=True) & _LOW

    def counter(self, place: int) -> int:
        """One of the tree's numbers after all calls so far."""
        self._word(mail.ERRORS, self.last)
        return self._word(place, self.last_change) & _LOW

    def latest(self, place: int) -> tuple[int, int]:
        """(the call that wrote it, the value) of a word as it is now."""
        word = self._view[place]
        return word >> 32, word & _LOW

    def await_answer(self, call: int, index: int = 0) -> int | None:
        """A number of a single key's answer; None where later calls have overwritten it."""
        place = mail.FIRST_ANSWER + call % mail.ANSWERS * mail.ANSWER_WORDS + index
        word = self._word(place, call)
        return word & _LOW if word >> 32 == call else None

    def answers(self, call: int) -> list[int] | None:
        """The four numbers of a single key's answer; None where a later call overwrites them, even now."""
        place = mail.FIRST_ANSWER + call % mail.ANSWERS * mail.ANSWER_WORDS
        self._word(place + mail.ANSWER_WORDS - 1, call)
        tag = call << 32
        found = [word - tag for word in self._view[place : place + mail.ANSWER_WORDS]]
        if min(found) < 0 or max(found) > _LOW:  # not all are here yet, or another call's
            one_by_one = [self.await_answer(call, index) for index in range(mail.ANSWER_WORDS)]
            return None if None in one_by_one else one_by_one  # type: ignore[return-value]
        return found

    def refusals(self) -> int:
        """How many calls were refused since they were last asked for. Waits for all calls so far."""
        return self._word(mail.ERRORS, self.last) - self._told & _LOW

    def first_refusal(self) -> tuple[Refusal | None, int]:
        """The first refusal that was not told yet, and how many came after it. `mark_told` must follow."""
        count = self.refusals()
        if count == 0:
            return None, 0
        number = self._told + 1 + max(0, count - mail.REFUSALS)
        place = mail.FIRST_REFUSAL + number % mail.REFUSALS * mail.REFUSAL_WORDS
        kind, query, low, high = (self.wait(place + i, number & mail.CALL_MASK) for i in range(4))
        value = low | high << 32
        value -= (value >> 63) << 64
        return Refusal(mail.OPERATIONS[kind >> 8], -(kind & 0xFF), query, value), count - 1

    def mark_told(self, refusals: int) -> None:
        """So many refusals were told."""
        self._told += refusals

    # For what was cut short; nothing may be under way.

    def has_run(self, call: int) -> bool:
        """Whether this call was the last that the device did."""
        return self._view[mail.ERRORS] >> 32 == call

    def was_refused(self, call: int) -> bool:
        """Whether this call was the last that was refused."""
        number = self._view[mail.ERRORS] & _LOW
        word = self._view[mail.FIRST_REFUSAL + number % mail.REFUSALS * mail.REFUSAL_WORDS + 4]
        return number > 0 and word & _LOW == call


def is_later(call: int, other: int) -> bool:
    """Whether a call came after another; their numbers begin anew after 2**31."""
    return 0 < (call - other & mail.CALL_MASK) < 1 << 30
