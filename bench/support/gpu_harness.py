"""The parts of the GPU benchmark's rows: keys and trees on the device, GPU time and wall-clock time."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from flatradix import RadixTree, Ragged
from flatradix.replay.traces import VOCABULARY

H200_SPEED = 4.3e12  # bytes a second that a copy reads and writes
COPIED = 1 << 30
SHORTEST = 4.5e-6  # seconds of the shortest kernel, on an H200 and on an H100
L2_BYTES = 60e6
SETS = 8
FEWEST_SETS = 4
ROUND_SECONDS = 1e-3
MOST_CALLS = 120  # a round's launches must fit the launch queue, which holds about 1000
FIRST_SLEEP, LONGEST_SLEEP = 2e-3, 0.5
SM_HZ = 2e9
TINY_BATCH = 4

Call = Callable[[], Any]


class Shape(NamedTuple):
    """The shape of a batch: `batch` keys of `tokens` tokens, each a path of `edges` edges of equal length."""

    batch: int
    tokens: int
    edges: int


def arrays_of(tree: RadixTree) -> Any:
    """Return the arrays of a tree on a GPU, as its kernels take them."""
    return tree._index._arrays


class Setup(NamedTuple):
    """The settings that all rows of a run share.

    device: the device of the GPU tree's tensors, or the CPU if kernels are interpreted.
    speed: of that device's memory, in bytes a second.
    """

    quick: bool
    tiny: bool
    page: int
    device: torch.device
    speed: float

    def shape(self, batch: int, tokens: int, edges: int) -> Shape:
        """Return this shape, or with `tiny` a small one instead."""
        if not self.tiny:
            return Shape(batch, tokens, edges)
        edges = min(edges, 4)
        return Shape(min(batch, TINY_BATCH), 8 * self.page * edges, edges)

    def tree(self, max_tokens: int, page: int = 0) -> RadixTree:
        return RadixTree(max_tokens, page or self.page, device="cuda")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def rounds(self) -> int:
        return 1 if self.tiny else 7 if self.quick else 15


class Measured(NamedTuple):
    """A measured time in seconds. floor: the time of memory traffic at full speed, or another lower bound, or None."""

    taken: float
    floor: float | None
    note: str = ""


class Row(NamedTuple):
    """One line of a table.

    target: the highest accepted time in microseconds, with `relative` the highest accepted taken / floor, or None.
    clock: "gpu" (kernels alone, queries on the device) or "wall" (from Python).
    """

    name: str
    work: str
    target: float | None
    measure: Callable[[Setup], Measured]
    clock: str = "gpu"
    relative: bool = False
    slow: bool = False


def number(value: float) -> str:
    """Format a value for a table: three digits, or all digits before the decimal point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def floor_of(setup: Setup, read_and_written: float) -> float:
    """Return the seconds that this many bytes take, at least those of the shortest kernel."""
    return max(SHORTEST, read_and_written / setup.speed)


def copying_speed(device: torch.device) -> float:
    """Measure the bytes a second that a large copy on a GPU reads and writes."""
    source = torch.ones(COPIED, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    samples = []
    for _ in range(6):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        target.copy_(source)
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) * 1e-3)
    return 2 * COPIED / statistics.median(samples[1:])


# Keys and trees


def random_keys(device: torch.device, count: int, tokens: int, seed: int = 1, first: int = 0) -> torch.Tensor:
    """Return random keys, int32 [count, tokens]. The first two tokens of each encode its number, from `first` on."""
    generator = torch.Generator(device).manual_seed(seed)
    keys = torch.randint(VOCABULARY, (count, tokens), dtype=torch.int32, device=device, generator=generator)
    numbers = torch.arange(first, first + count, device=device)
    keys[:, 0] = numbers % VOCABULARY
    keys[:, 1] = numbers // VOCABULARY
    return keys


def ragged(keys: torch.Tensor) -> Ragged:
    """Return the rows of a matrix as a batch."""
    count, tokens = keys.shape
    return Ragged(keys.reshape(-1), torch.arange(count + 1, device=keys.device) * tokens)


def slots_for(keys: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Return int32 slots in the shape of `keys`: first, first + 1, ..."""
    slots = torch.arange(first, first + keys.numel(), dtype=torch.int32, device=keys.device)
    return slots.view(keys.shape)


def insert_edges(tree: RadixTree, keys: torch.Tensor, edges: int) -> None:
    """Cache the rows of a matrix, which share no prefix, as paths of equal edges; assert the number of nodes."""
    slots = slots_for(keys)
    step = keys.shape[1] // edges
    ends = None
    for at in range(0, step * edges, step):
        ends = tree.insert(ragged(keys[:, at : at + step]), ragged(slots[:, at : at + step]), start=ends)
    assert tree.total_tokens == keys.numel()
    assert tree.num_nodes == len(keys) * edges


def input_sets(setup: Setup, shape: Shape) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return all keys to cache, and the batches that a benchmark cycles over.

    At most SETS batches have different keys: as many as make queries and cached tokens twice as large as L2. If these
    are fewer than FEWEST_SETS, the function adds the same keys in other orders, in separate memory.
    """
    count = shape.batch * shape.tokens
    own = 2 if setup.tiny else min(SETS, -(-int(2 * L2_BYTES) // (8 * count)))
    keys = random_keys(setup.device, own * shape.batch, shape.tokens)
    batches = list(keys.view(own, shape.batch, shape.tokens))
    orders = 1 if setup.tiny else -(-FEWEST_SETS // own)
    turned = [torch.roll(batch, shape.batch * order // orders, 0) for order in range(1, orders) for batch in batches]
    return keys, batches + turned


def cached_sets(setup: Setup, shape: Shape) -> tuple[RadixTree, torch.Tensor, list[Ragged]]:
    """Return a tree, the keys that it caches, and batches of these keys. Asserts that each batch is a full hit."""
    keys, batches = input_sets(setup, shape)
    tree = setup.tree(keys.numel())
    insert_edges(tree, keys, shape.edges)
    queries = [ragged(batch) for batch in batches]
    for query in queries:
        assert_lengths(tree.match(query).lengths, shape.tokens)
    return tree, keys, queries


def assert_lengths(lengths: torch.Tensor, expected: int) -> None:
    """Assert that every length is as expected: the time of a wrong result means nothing."""
    assert lengths.unique().tolist() == [expected], f"lengths {lengths.unique().tolist()} instead of {expected}"


def start_afresh(setup: Setup) -> None:
    """Free the memory of earlier rows, and torch's cache of GPU memory."""
    gc.collect()
    if setup.on_gpu:
        torch.cuda.empty_cache()


# GPU time


class Unhidden(RuntimeError):
    """Raised if the GPU waited for Python during the measured time."""


def timed(setup: Setup, run: Call, sleep: float) -> float:
    """Return the GPU seconds of the work that `run` enqueues while a sleep of `sleep` seconds keeps the GPU busy.

    Raises Unhidden if the sleep ended before `run` returned: the time would include launches.
    """
    if not setup.on_gpu:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(sleep * SM_HZ))
    first.record()
    run()
    last.record()
    late = first.query()
    last.synchronize()
    if late:
        raise Unhidden(f"the GPU waited for Python within {sleep:.3g} s")
    return first.elapsed_time(last) * 1e-3


def _run_next(calls: Iterator[Call], count: int) -> None:
    for call in itertools.islice(calls, count):
        call()


def gpu_seconds(setup: Setup, calls: Sequence[Call], restore: Call | None = None, once: bool = False) -> float:
    """Return the median over rounds of the GPU seconds of one call. Rounds cycle over `calls`.

    restore: called after each round, outside the measured time. once: make each call only once between two restores.
    """
    turns = itertools.cycle(calls)
    count = len(calls)
    sleep = FIRST_SLEEP
    samples: list[float] = []
    warm = 0
    while len(samples) < setup.rounds:
        try:
            seconds = timed(setup, partial(_run_next, turns, count), sleep) / count
        except Unhidden:
            sleep *= 2
            if sleep > LONGEST_SLEEP:
                raise
            continue
        finally:
            if restore is not None:
                restore()
        warm += 1
        if warm == 2 and not once and not setup.tiny:
            count = max(count, min(MOST_CALLS, int(ROUND_SECONDS / seconds)))
        if warm > 2 or setup.tiny:
            samples.append(seconds)
    return statistics.median(samples)


def measure(
    setup: Setup, tree: RadixTree, calls: Sequence[Call], moved: float, restore: Call | None = None
) -> Measured:
    """Measure calls with different inputs. A note gives the time of the first one alone, if it differs by over 10 %.

    moved: bytes that a call has to read and write. Raises if the tree refused a call.
    """
    taken = gpu_seconds(setup, calls, restore)
    alone = gpu_seconds(setup, calls[:1], restore)
    tree.raise_pending()
    note = f"{number(alone * 1e6)} us again and again on one input" if abs(alone / taken - 1) > 0.1 else ""
    return Measured(taken, floor_of(setup, moved), note)


# Wall-clock time


def wall_seconds(
    setup: Setup, calls: Sequence[Call], restore: Call | None = None, once: bool = False, budget: float = 0.4
) -> float:
    """Return the median wall-clock seconds of single calls, cycling over `calls`.

    restore: called after each call, outside the measured time. once: make each call at most once.
    budget: seconds to spend (half of it with --quick).
    """
    samples: list[float] = []
    most = 2 if setup.tiny else len(calls) if once else 2000
    least = 2 if setup.tiny else min(9, most)
    end = time.perf_counter() + (budget / 2 if setup.quick else budget)
    gc.collect()
    gc.disable()
    try:
        for call in itertools.islice(itertools.cycle(calls), most):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
            if restore is not None:
                restore()
            if len(samples) >= least and time.perf_counter() > end:
                break
    finally:
        gc.enable()
    return statistics.median(samples)
