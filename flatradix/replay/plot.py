"""The plot of a replay: hit rate and occupancy over the requests, latencies of each operation."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flatradix.replay.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
INK, MUTED, GRID = "#1f2430", "#667085", "#e4e7ec"
_BLUE, _ORANGE, _PALE = "#2563eb", "#ea580c", "#bfdbfe"
_POINTS = 2000
_BINS_PER_DECADE = 24
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class PlotUnavailableError(RuntimeError):
    """matplotlib is not installed."""


def require(path: str | Path) -> None:
    """Raise PlotUnavailableError without matplotlib, ValueError for a file name without a suffix of SUFFIXES."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotUnavailableError("a plot needs matplotlib: pip install 'flatradix[plot]'")
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: the name of a plot ends in {', '.join(SUFFIXES)}")


def save(report: Report, path: str | Path, title: str = "") -> None:
    """Draw a report into a file. Raises PlotUnavailableError, ValueError, OSError."""
    require(path)
    figure(report, title).savefig(path, facecolor="white")


def figure(report: Report, title: str = "") -> Figure:
    """Return the figure of a report, with its own canvas (no pyplot, no window)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        fig = Figure(figsize=(11, 6.4), dpi=150, layout="constrained")
        FigureCanvasAgg(fig)
        grid = fig.add_gridspec(2, 2, width_ratios=(1.25, 1), wspace=0.06, hspace=0.08)
        rate = fig.add_subplot(grid[0, 0])
        _hit_rate(rate, report)
        _occupancy(fig.add_subplot(grid[1, 0], sharex=rate), report)
        _latencies(fig.add_subplot(grid[:, 1]), report)
        s = report.settings
        fig.suptitle(
            f"{title or 'replay'}: {report.requests:,} requests, {_tokens(report.input_tokens)} prompt tokens; "
            f"page size {s.page_size}, policy {s.policy}, held for {s.hold}, on {report.device}",
            x=0.008,
            ha="left",
            fontsize=9.5,
            color=MUTED,
        )
        return fig


def _hit_rate(axes: Axes, report: Report) -> None:
    _head(axes, "Hit rate", "share of prompt tokens")
    if not report.requests:
        return
    window = max(20, report.requests // 60)
    x, (recent, overall) = _thinned(report.windowed_hit_rate(window) * 100, report.cumulative_hit_rate() * 100)
    marker = "o" if len(x) == 1 else None
    axes.plot(x, recent, color=_BLUE, alpha=0.45, lw=1, label=f"last {window} requests")
    axes.plot(x, overall, color=_BLUE, lw=2.2, marker=marker, label=f"so far (at the end {overall[-1]:.1f} %)")
    axes.set_ylim(0, min(101.0, 1.1 * max(5.0, recent.max())))
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.tick_params(labelbottom=False)
    _legend(axes)


def _occupancy(axes: Axes, report: Report) -> None:
    from matplotlib.ticker import MaxNLocator

    _head(axes, "Occupancy", "tokens")
    axes.set_xlabel("request")
    if not report.requests:
        return
    x, (cached, locked) = _thinned(report.cached, report.locked)
    x, cached, locked = (np.concatenate([[0], values]) for values in (x, cached, locked))
    axes.fill_between(x, cached, color=_PALE, lw=0, label="cached")
    axes.fill_between(x, locked, color=_BLUE, lw=0, label="of these locked")
    axes.axhline(report.settings.capacity, color=_ORANGE, lw=1.2, ls=(0, (4, 2)), label="capacity")
    nearly_empty = cached.max() * 4 < report.settings.capacity
    axes.set_ylim(0, 1.1 * (max(1, cached.max()) if nearly_empty else report.settings.capacity))
    axes.set_xlim(0, report.requests + (report.requests == 1))
    axes.yaxis.set_major_formatter(lambda value, _: _tokens(value))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _legend(axes)


def _latencies(axes: Axes, report: Report) -> None:
    """Draw a row for each operation: the distribution of its call times (log scale), with p50, p99 and the maximum."""
    _head(axes, "Latency of each call", "height: share of the calls; line: p50, dot: p99, tick: the slowest")
    operations = [(name, times / 1e3) for name, times in report.latencies.items() if len(times)]
    axes.set_yticks(range(len(operations)), [name for name, _ in operations], color=INK, fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("log")
    axes.spines["left"].set_visible(False)
    if not operations:
        return
    low = np.floor(np.log10(max(1e-2, min(times.min() for _, times in operations))) * 2) / 2
    high = np.ceil(np.log10(max(times.max() for _, times in operations)) * 2) / 2 + 0.01
    edges = np.linspace(low, high, max(2, int((high - low) * _BINS_PER_DECADE)) + 1)
    for row, (_, times) in enumerate(operations):
        _ridge(axes, row, times, edges)
    axes.set_xlim(10**low, 10**high)
    axes.set_ylim(len(operations) - 0.75, -0.95)
    axes.xaxis.set_major_formatter(lambda value, _: _duration(value))
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def _ridge(axes: Axes, row: int, times: np.ndarray, edges: np.ndarray) -> None:
    from matplotlib.transforms import ScaledTranslation

    counts, _ = np.histogram(np.log10(np.maximum(times, 1e-2)), edges)
    heights = row - 0.62 * np.repeat(counts / counts.max(), 2)
    axes.fill_between(10 ** np.repeat(edges, 2)[1:-1], heights, row, color=_PALE, ec=_BLUE, lw=0.8)
    p50, p99 = np.percentile(times, [50, 99])
    axes.plot([p50, p50], [row, row - 0.62], color=INK, lw=1.6)
    axes.plot([p99], [row], marker="o", ms=5, color=_ORANGE, clip_on=False, zorder=3)
    axes.plot([times.max()], [row], marker="|", ms=9, mew=1.4, color=_ORANGE, clip_on=False, zorder=3)
    calls = f"{len(times):,} call" + ("" if len(times) == 1 else "s")
    note = f"{calls}, p50 {_duration(p50)}, p99 {_duration(p99)}, total {_duration(times.sum())}"
    transform = axes.get_yaxis_transform() + ScaledTranslation(0, -5 / 72, axes.figure.dpi_scale_trans)
    axes.text(0, row, note, transform=transform, va="top", fontsize=7.5, color=MUTED)


def _head(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", weight="bold", fontsize=10, pad=16)
    axes.annotate(subtitle, (0, 1), (0, 5), "axes fraction", "offset points", color=MUTED, fontsize=8)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    """Add a legend above the axes, to the right of the title."""
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.01, 0.985), labelcolor=INK, fontsize=8)


def _thinned(*series: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Return request numbers, from 1, and the values of these requests, at most _POINTS: a plot shows no more."""
    length = len(series[0])
    places = np.unique(np.linspace(0, length - 1, min(length, _POINTS)).astype(np.int64))
    return places + 1, tuple(values[places] for values in series)


def _tokens(count: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"


def _duration(microseconds: float) -> str:
    for unit, name in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= unit:
            return f"{microseconds / unit:.3g} {name}"
    return f"{microseconds:.3g} µs"
