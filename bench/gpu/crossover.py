"""Find the batch size from which the GPU is faster: the same matches on a GPU's tree and on one CPU thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from bench.support.gpu_harness import (
    SETS,
    TINY_BATCH,
    Setup,
    assert_lengths,
    floor_of,
    insert_edges,
    number,
    ragged,
    random_keys,
    start_afresh,
    wall_seconds,
)
from flatradix import RadixTree
from flatradix.replay.plot import GRID, INK, MUTED, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BATCHES = (1, 16, 64, 256, 1024, 4096)
LENGTHS = (128, 1024, 4096, 32768)
QUICK_LENGTHS = (128, 4096)
DRAWN = 4096
MOST_TOKENS = 1 << 26
BUDGET = 0.15

WAYS = {
    "resident": "GPU, queries on it",
    "host": "GPU, queries in pinned memory",
    "cpu": "CPU, one thread",
}
_LINES = {"resident": ("#2563eb", "-"), "host": ("#60a5fa", (0, (4, 2))), "cpu": ("#ea580c", "-")}


class Point(NamedTuple):
    """Seconds from Python to lengths on the host, for one batch shape. floor: seconds of the GPU's memory traffic."""

    batch: int
    tokens: int
    edges: int
    resident: float
    host: float
    cpu: float
    floor: float

    @property
    def fastest(self) -> str:
        return min(WAYS, key=lambda way: getattr(self, way))


def _look_up(tree: RadixTree, keys: torch.Tensor) -> Callable[[], torch.Tensor | int]:
    """Return the cheapest call that matches these keys. A single key is passed as a flat sequence, not as a batch."""
    if len(keys) == 1:
        key = keys[0]
        return lambda: tree.match(key).length
    query = ragged(keys)
    if keys.is_cpu and keys.is_pinned():
        query.offsets = query.offsets.pin_memory()
    return lambda: tree.match(query).host_lengths


def _seconds(setup: Setup, tree: RadixTree, batches: list[torch.Tensor]) -> float:
    calls = [_look_up(tree, batch) for batch in batches]
    for call in calls:
        assert_lengths(torch.as_tensor(call()).reshape(-1), batches[0].shape[1])
    return wall_seconds(setup, calls, budget=BUDGET)


def _points(setup: Setup, length: int) -> Iterator[Point]:
    """Yield the points of one key length. The trees cache the largest batch; smaller batches are parts of it."""
    wanted = [batch for batch in BATCHES if batch * length <= MOST_TOKENS]
    wanted = wanted[:2] if setup.tiny else wanted
    shape = setup.shape(wanted[-1], length, 1 if length == 128 else 8)
    keys = random_keys(setup.device, shape.batch, shape.tokens)
    host = keys.cpu().pin_memory() if setup.on_gpu else keys.cpu()
    gpu = setup.tree(keys.numel())
    cpu = RadixTree(keys.numel(), setup.page, device="cpu")
    insert_edges(gpu, keys, shape.edges)
    insert_edges(cpu, host, shape.edges)
    for batch in wanted:
        size = min(batch, TINY_BATCH) if setup.tiny else batch
        firsts = range(0, shape.batch - size + 1, size)[:SETS]
        on_device, on_host = ([part[first : first + size] for first in firsts] for part in (keys, host))
        times = (_seconds(setup, *side) for side in ((gpu, on_device), (gpu, on_host), (cpu, on_host)))
        yield Point(size, shape.tokens, shape.edges, *times, floor_of(setup, 8 * size * shape.tokens))


def measure(setup: Setup) -> list[Point]:
    """Measure all points; print each one as soon as it is measured."""
    found = []
    lengths = (DRAWN,) if setup.tiny else QUICK_LENGTHS if setup.quick else LENGTHS
    for length in lengths:
        start_afresh(setup)
        for point in _points(setup, length):
            found.append(point)
            times = ", ".join(f"{name} {number(getattr(point, way) * 1e6)} us" for way, name in WAYS.items())
            print(f"crossover {point.batch} x {point.tokens}: {times}", flush=True)
    return found


def table(points: list[Point]) -> str:
    """Return the points as a Markdown table."""
    lines = [
        "| batch x tokens, edges | " + " | ".join(WAYS.values()) + " | fastest |",
        "|---|" + "---|" * (len(WAYS) + 1),
    ]
    for point in points:
        times = " | ".join(number(getattr(point, way) * 1e6) for way in WAYS)
        lines.append(f"| {point.batch} x {point.tokens}, {point.edges} | {times} | {WAYS[point.fastest]} |")
    return "\n".join(lines)


def _first_faster(points: list[Point], way: str) -> int | None:
    """Return the smallest batch from which on this way is always faster than the CPU; None if there is none."""
    first = None
    for point in sorted(points, reverse=True):
        if getattr(point, way) >= point.cpu:
            break
        first = point.batch
    return first


def _where(points: list[Point], way: str) -> str:
    faster, never = [], []
    for tokens in dict.fromkeys(point.tokens for point in points):
        first = _first_faster([point for point in points if point.tokens == tokens], way)
        if first is None:
            never.append(str(tokens))
        else:
            faster.append(f"{first} quer{'y' if first == 1 else 'ies'} of {tokens} tokens")
    parts = [f"from {', '.join(faster)} on"] * bool(faster)
    return ", ".join(parts + [f"never with queries of {' or '.join(never)} tokens"] * bool(never))


def sentence(points: list[Point]) -> str:
    """Return a sentence that names the measured batches from which on the GPU is faster."""
    return (
        f"The GPU is faster than one CPU thread, with queries on the device, {_where(points, 'resident')}; "
        f"with queries in pinned host memory, {_where(points, 'host')}."
    )


def draw(points: list[Point], setup: Setup, device: str, path: Path) -> None:
    """Plot time against batch size, for keys of DRAWN tokens."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tokens = setup.shape(1, DRAWN, 8).tokens
    drawn = [point for point in points if point.tokens == tokens]
    with rc_context(STYLE):
        fig = Figure(figsize=(7.6, 4.8), dpi=150, layout="constrained")
        FigureCanvasAgg(fig)
        axes = fig.add_subplot()
        title = f"Longest prefixes of a batch, {tokens} tokens a query, {drawn[0].edges} edges"
        axes.set_title(title, loc="left", weight="bold", fontsize=10, pad=18)
        axes.annotate(
            f"from Python to lengths on the host; {device}", (0, 1), (0, 6), "axes fraction", "offset points",
            color=MUTED, fontsize=8,
        )  # fmt: skip
        _draw_lines(axes, drawn, setup.speed)
        fig.savefig(path, facecolor="white")


def _draw_lines(axes: Axes, points: list[Point], speed: float) -> None:
    batches = [point.batch for point in points]
    for way, (colour, dashes) in _LINES.items():
        times = [getattr(point, way) * 1e6 for point in points]
        axes.plot(batches, times, color=colour, ls=dashes, lw=2, marker="o", ms=4, label=WAYS[way])
    floors = [point.floor * 1e6 for point in points]
    axes.plot(
        batches,
        floors,
        color=MUTED,
        lw=1.2,
        ls=":",
        label=f"floor: shortest kernel, a token's 8 bytes at {speed / 1e12:.1f} TB/s",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("queries in the batch")
    axes.set_ylabel("time (µs)")
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper left")
