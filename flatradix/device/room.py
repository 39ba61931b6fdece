"""The memory of an eviction on a GPU, and what the device tells of its victims."""

from __future__ import annotations

from typing import NamedTuple

import torch

from flatradix.device.mailbox import Mailbox
from flatradix.layout import mail
from flatradix.layout.queries import Freeing

# An eviction allocates memory for so many slots more than it was asked for before it knows what goes: first for some,
# later for twice as many as were needed, up to a limit. If that does not suffice, it waits twice.
FIRST_BEYOND, MOST_BEYOND = 1 << 12, 1 << 16


class Room(NamedTuple):
    """Memory for the slots that an eviction returns: first those of an earlier, interrupted one, then others.

    slots: on the tree's device. known: how many slots of an earlier eviction come first. space: how many others fit.
    returned: memory of the same size on the slot device; None if that is the tree's device.
    """

    slots: torch.Tensor
    known: int
    space: int
    returned: torch.Tensor | None = None

    def freeing(self, counts: int = 0) -> Freeing:
        """Return the addresses for kernels. counts: as in `Freeing`."""
        address, known = self.slots.data_ptr(), self.known
        if known:
            address += known * self.slots.itemsize
        return Freeing(address, self.space, counts, known)

    def filled(self, tokens: int) -> torch.Tensor:
        """Return the known slots and `tokens` others, on the slot device."""
        slots, returned = self.slots, self.returned
        if self.space > tokens:
            slots = slots[: self.known + tokens]
            returned = None if returned is None else returned[: self.known + tokens]
        return slots if returned is None else returned.copy_(slots)


class Found(NamedTuple):
    """The victims that the device has selected. tokens: to free. nodes: victims. kept: tokens that the last one keeps.

    ordered: whether they are in the order of eviction.
    """

    tokens: int
    nodes: int
    kept: int
    ordered: bool


def allocate(known: torch.Tensor | None, space: int, dtype: torch.dtype, devices: tuple[torch.device, ...]) -> Room:
    """Return memory for `known` slots, which are copied there, and others. devices: of the tree and of the slots."""
    count = 0 if known is None else len(known)
    slots = torch.empty(count + space, dtype=dtype, device=devices[0])
    returned = torch.empty_like(slots, device=devices[1]) if len(devices) > 1 else None
    if known is not None:
        slots[:count] = known
    return Room(slots, count, space, returned)


def found_by(mailbox: Mailbox, call: int, wanted: int, page: int, by_page: bool) -> Found:
    """Wait for the selection of `call`, and return the victims."""
    tokens, nodes = (mailbox.wait(place, call) for place in (mail.TOKENS, mail.VICTIMS))
    kept = max(tokens - -(-wanted // page) * page, 0) if by_page else 0
    return Found(tokens - kept, nodes & ~mail.UNORDERED, kept, not nodes & mail.UNORDERED)
