"""Slots on a separate device: copies by torch, and copies by a kernel in one launch, compared with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatradix.host.slots_apart import Ranges, SlotsApart
from flatradix.inputs import devices
from flatradix.kernels import cpu

UNITS = 5000


def pool_on(device: str, dtype: torch.dtype) -> tuple[SlotsApart, np.ndarray]:
    """Return a pool whose slots are all different, and the same slots in host memory."""
    where = torch.device("cpu") if device == "cpu" or devices.interpreted() else torch.device(device)
    slots = SlotsApart(UNITS, dtype, where, 0)
    if device == "cpu":
        slots._copy_ranges = None  # as on a machine without Triton
    assert (slots._copy_ranges is None) == (device == "cpu")
    values = np.random.default_rng(1).permutation(UNITS)
    slots.values.copy_(torch.from_numpy(values))
    return slots, values


def some_ranges(lengths: list[int]) -> Ranges:
    """Return ranges of these lengths, anywhere in the pool."""
    numbers = np.random.default_rng(len(lengths))
    counts = np.array(lengths, np.int32)
    starts = np.array([numbers.integers(0, UNITS - length + 1) for length in lengths], np.int32)
    return Ranges(starts, counts, int(counts.sum()))


def expected(values: np.ndarray, ranges: Ranges) -> list[np.ndarray]:
    return [values[start : start + length] for start, length in zip(ranges.starts, ranges.lengths, strict=True)]


LENGTHS = st.lists(st.one_of(st.integers(1, 5), st.sampled_from([1023, 1024, 1025, 2500])), max_size=9)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(lengths=LENGTHS)
def test_gather(lengths: list[int], dtype: torch.dtype, device: str) -> None:
    slots, values = pool_on(device, dtype)
    ranges = some_ranges(lengths)
    found = slots.gather(ranges)
    assert (found.dtype, found.device) == (dtype, slots.device)
    assert found.tolist() == [slot for part in expected(values, ranges) for slot in part]


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(paths=st.lists(LENGTHS, min_size=1, max_size=4))
def test_write_rows(paths: list[list[int]], dtype: torch.dtype, table_dtype: torch.dtype, device: str) -> None:
    """The last row of the table stays unchanged, and so do the elements after the end of a path."""
    slots, values = pool_on(device, dtype)
    ranges = some_ranges([length for path in paths for length in path])
    sums = [sum(path) for path in paths]
    offsets = np.concatenate([[0], np.cumsum(sums, dtype=np.int64)])
    width = max(sums) + 1
    whole = torch.full((len(paths) + 1, width + 3), -7, dtype=table_dtype, device=slots.device)
    rows = np.random.default_rng(2).permutation(len(paths))
    slots.write_ranges(ranges, offsets, whole[:, 2 : 2 + width], rows)
    joined = np.concatenate([np.empty(0, np.int64), *expected(values, ranges)])
    wanted = np.full(tuple(whole.shape), -7)
    for query, row in enumerate(rows):
        wanted[row, 2 : 2 + sums[query]] = joined[offsets[query] : offsets[query + 1]]
    assert whole.tolist() == wanted.tolist()


@given(gaps=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 300)), max_size=8))
def test_compact(gaps: list[tuple[int, int]], device: str) -> None:
    """The index plans the moves of the edges in the pool, and the slots follow."""
    slots, values = pool_on(device, torch.int32)
    lengths = np.array([length for _, length in gaps], np.int32)
    before = np.cumsum(lengths, dtype=np.int32) - lengths
    starts = np.cumsum([gap for gap, _ in gaps], dtype=np.int32) + before

    def plan(_addresses: int, *moves: np.ndarray) -> None:
        for move, wanted in zip(moves, (starts, before, lengths), strict=True):
            move[:] = wanted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "plan_compaction", plan)
        patch.setattr(cpu, "compact", lambda *arguments: None)
        slots.compact(1, len(gaps))
    wanted = [slot for part in expected(values, Ranges(starts, lengths, 0)) for slot in part]
    assert slots.values[: len(wanted)].tolist() == wanted


def test_the_slots_of_one_query_on_the_device_are_not_copied(gpu: str) -> None:
    slots, _ = pool_on(gpu, torch.int32)
    mine = torch.arange(5, device=gpu, dtype=torch.int32)
    assert slots.read_one(mine, True)[3].values is mine
    with pytest.raises(ValueError, match="-1 at position 2 is negative"):
        slots.read_one(torch.tensor([3, 4, -1], device=gpu), True)


@pytest.mark.parametrize("mine", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_first_slot_that_is_none_is_named(dtype: torch.dtype, mine: torch.dtype, device: str) -> None:
    slots, _ = pool_on(device, dtype)
    with pytest.raises(ValueError, match="query 1: -1 at position 0 is negative"):
        slots._batch(torch.tensor([3, 4, -1], dtype=mine, device=slots.device), np.array([2, 1]), True)


@pytest.mark.parametrize("mine", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(batch=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 300)), min_size=1, max_size=6))
def test_write(batch: list[tuple[int, int]], dtype: torch.dtype, mine: torch.dtype, device: str) -> None:
    """The first slots of each query are left out, as their tokens are cached. The rest may be empty."""
    slots, values = pool_on(device, dtype)
    numbers = np.random.default_rng(3)
    parts = [torch.from_numpy(numbers.integers(0, 1 << 20, skip + count)) for skip, count in batch]
    parts = [part.to(slots.device, mine) for part in parts]
    source = slots.read(parts, True)
    skips, counts = (np.array(column) for column in zip(*batch, strict=True))
    places = np.cumsum(counts + 7) - counts
    slots.store(source, skips, counts, places)
    for place, skip, part in zip(places, skips, parts, strict=True):
        values[place : place + len(part) - skip] = part[skip:].cpu()
    assert slots.values.tolist() == values.tolist()


def test_many_calls_behind_a_busy_stream(gpu: str) -> None:
    """A call does not overwrite the range list of an earlier call whose kernel has not run yet."""
    slots, values = pool_on(gpu, torch.int32)
    torch.cuda._sleep(200_000_000)
    several = [some_ranges([1 + count, 3, 40 + count]) for count in range(50)]
    found = [slots.gather(ranges) for ranges in several]
    for ranges, part in zip(several, found, strict=True):
        assert part.tolist() == np.concatenate(expected(values, ranges)).tolist()
