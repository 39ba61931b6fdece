"""Arguments of the functions that launch GPU kernels: device addresses of the parts of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Values(NamedTuple):
    """A batch of sequences on the device.

    address: of int64 (`wide`) or int32 values. offsets: address of int64 [B + 1], 0 for a single sequence.
    counts: int64 [B] on the host, None if only the device knows them, and for a single sequence (`total` is its count).
    owner: keeps the memory alive until the kernels are enqueued. left_out: tokens at the end of each sequence that a
    match does not look up. on_host: whether this is a single sequence of at most STAGED_TOKENS that is still in host
    memory: an insert copies it to pinned memory, with 32 bits a value.
    """

    address: int
    wide: bool
    offsets: int
    total: int
    batch: int
    counts: np.ndarray | None
    owner: Any
    left_out: int = 0
    on_host: bool = False


class PerQuery(NamedTuple):
    """One number per query: the address of int64 [B], or 0 and one `number` for all queries. owner: as in Values."""

    address: int
    number: int
    owner: Any = None


class PlaceAddresses(NamedTuple):
    """Addresses of int64 [B] handles and int32 [B] lengths, 0 if there are none. owner: as in Values."""

    handles: int
    lengths: int
    batch: int
    owner: Any = None


class PromptAddresses(NamedTuple):
    """Addresses of the waiting prompts of a queue on a device, for `capacity` entries: what `follow` takes.

    pool: int32 tokens. begins, units, names: int64, int32 and int64 [B]: where each prompt begins in the pool, the
    units in its whole pages, the code of its namespace. handles, lengths: int64 and int32 [2, B]: the place at which
    its match ends, and a place above. rows: int32 [B], the row at which its match ends. told: int32 [2, B] in pinned
    memory: lengths and rows for the host.
    """

    pool: int
    begins: int
    units: int
    names: int
    handles: int
    lengths: int
    rows: int
    told: int
    capacity: int


class Wants(NamedTuple):
    """What waiting prompts want. rows: address of int32, by entry. order: address of int32 [waiting], entries."""

    rows: int
    order: int
    waiting: int


class Wanted(NamedTuple):
    """How many tokens an eviction is to free: `more` and, if `address` is not 0, the int64 on the device there.

    in_order: have the device order the victims, however many there are. owner: as in Values.
    """

    more: int
    address: int = 0
    in_order: bool = False
    owner: Any = None


class Freeing(NamedTuple):
    """Where an eviction writes the slots that it frees.

    slots: address of the output, of the pool's dtype. space: for how many slots. counts: address of int64 [2] on the
    device, which get the number of slots and of nodes, or -1; 0 if only the host is told. returned: slots that lie
    before the output, which count as well.
    """

    slots: int
    space: int
    counts: int = 0
    returned: int = 0


class Desk(NamedTuple):
    """Where single keys wait for their kernels.

    address: of int64 [desk.SIZE] (`layout.desk`) in host memory. staging: of int32 [STAGED_TOKENS] on the
    device, to which a kernel copies its key.
    """

    address: int
    staging: int


class Output(NamedTuple):
    """Addresses for the results: int64 [B] handles, int32 [B] lengths and, for inserts, int32 [B] prefix lengths.

    told: where a match tells the host its lengths, counted from `mail.FIRST_TOLD`, or -1.
    """

    handles: int
    lengths: int
    prefix_lengths: int = 0
    told: int = -1


class SlotTable(NamedTuple):
    """An engine's slot table: `height` rows of `width` elements, int64 (`wide`) or int32, `stride` elements apart."""

    address: int
    wide: bool
    stride: int
    height: int
    width: int


NO_PLACES = PlaceAddresses(0, 0, 0)
