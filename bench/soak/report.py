"""What a soak tells: the memory and the times of its first and last tenth, as a table, as JSON and as a picture."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.soak.times import PARTS, Times

MARGIN = 32 << 20  # bytes by which memory may differ between two tenths: what malloc and the page cache of numba move


class Sample(NamedTuple):
    """The state of a run at one moment. occupancy: of the cache and of the tree, the share of slots that is in use."""

    seconds: float
    resident: int
    on_gpu: int
    steps: int
    evicted: tuple[int, int]
    occupancy: tuple[float, float]


class Growth(NamedTuple):
    """Bytes of memory: the medians of the first and of the last tenth of the samples."""

    name: str
    first: float
    last: float

    @property
    def is_flat(self) -> bool:
        return self.last - self.first <= MARGIN


def growth_of(samples: list[Sample]) -> list[Growth]:
    tenth = max(1, len(samples) // 10)
    first, last = samples[:tenth], samples[-tenth:]
    found = []
    for name in ("resident", "on_gpu"):
        old, new = (median(getattr(one, name) for one in some) for some in (first, last))
        found.append(Growth(name, old, new))
    return found


def rows_of(times: Times) -> list[dict[str, Any]]:
    """Return the calls, and p50 and p99 in microseconds of the first and of the last tenth, of each operation."""
    return [
        {
            "operation": name,
            "calls": times.total(name),
            **{
                f"{label} {when}": times.quantile(name, share, part)
                for label, share in (("p50", 0.5), ("p99", 0.99))
                for when, part in (("first", 0), ("last", PARTS - 1))
            },
        }
        for name in times.names
    ]


def micro(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def table(times: Times) -> str:
    lines = ["| operation | calls | p50 first, us | p50 last | p99 first | p99 last |", "|---|---|---|---|---|---|"]
    for row in rows_of(times):
        numbers = [micro(row[name]) for name in ("p50 first", "p50 last", "p99 first", "p99 last")]
        lines.append(f"| {row['operation']} | {row['calls']:,} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def memory(samples: list[Sample]) -> str:
    return "\n".join(
        f"{one.name}: {one.first / 2**20:,.1f} MiB in the first tenth, {one.last / 2**20:,.1f} in the last"
        for one in growth_of(samples)
        if one.last
    )


def plot(samples: list[Sample], times: Times, file: Path) -> None:
    """Draw memory over time, and the p99 of the five operations with the most calls by tenth. Needs matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    minutes = [one.seconds / 60 for one in samples]
    left.plot(minutes, [one.resident / 2**20 for one in samples], label="in RAM")
    if any(one.on_gpu for one in samples):
        left.plot(minutes, [one.on_gpu / 2**20 for one in samples], label="reserved on the GPU")
    left.set(xlabel="minutes", ylabel="MiB", ylim=(0, None))
    left.legend()
    for name in sorted(times.names, key=times.total, reverse=True)[:5]:
        right.plot(range(1, PARTS + 1), [times.quantile(name, 0.99, part) for part in range(PARTS)], label=name)
    right.set(xlabel="tenth of the run", ylabel="p99, us", yscale="log")
    right.legend()
    figure.savefig(file)
