"""The plot of a simulation: the queue and the TTFT over time, one line a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flatradix.replay.plot import GRID, INK, MUTED, STYLE, require
from flatradix.simulate.report import Outcome, Report, mean_ttft, thinned
from flatradix.simulate.tables import count_servers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#475569")
_STYLES = ("-", (0, (5, 2)), (0, (1, 1)))
_POINTS, _BINS = 1500, 150


def save(report: Report, path: str | Path, title: str = "") -> None:
    """Draw a report into a file. Raises PlotUnavailableError, ValueError, OSError."""
    require(path)
    figure(report, title).savefig(path, facecolor="white")


def figure(report: Report, title: str = "") -> Figure:
    """Return the figure of a report, with its own canvas (no pyplot, no window)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    s = report.settings
    with rc_context(STYLE):
        fig = Figure(figsize=(11, 6.4), dpi=150, layout="constrained")
        FigureCanvasAgg(fig)
        above, below = fig.subplots(2, 1, sharex=True)
        _lines(above, report, "Queue", "requests that wait", lambda outcome: thinned(outcome, _POINTS))
        _lines(below, report, "Time to first token", "seconds, mean by arrival", lambda one: mean_ttft(one, _BINS))
        above.legend(
            frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1.01, 0.985), labelcolor=INK, fontsize=8
        )
        below.set_xlabel("time in seconds")
        fig.suptitle(
            f"{title or 'simulation'}: {report.requests:,} requests; {report.scheduler}, {count_servers(s.servers)}, "
            f"{s.rate:,.0f} tokens/s, {s.capacity:,} KV slots, page size {s.page_size}",
            x=0.008,
            ha="left",
            fontsize=9.5,
            color=MUTED,
        )
        return fig


def _lines(
    axes: Axes, report: Report, title: str, subtitle: str, series: Callable[[Outcome], tuple[np.ndarray, np.ndarray]]
) -> None:
    axes.set_title(title, loc="left", weight="bold", fontsize=10, pad=16)
    axes.annotate(subtitle, (0, 1), (0, 5), "axes fraction", "offset points", color=MUTED, fontsize=8)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for number, outcome in enumerate(report.outcomes):
        color = _COLORS[number % len(_COLORS)]
        style = _STYLES[number // len(_COLORS) % len(_STYLES)]
        times, values = series(outcome)
        axes.plot(times, values, color=color, ls=style, lw=1.4, marker="o" * (len(times) == 1), label=outcome.policy)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
