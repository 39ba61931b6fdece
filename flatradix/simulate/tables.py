"""The table that `flatradix simulate` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from flatradix.replay.tables import count_requests, grid
from flatradix.simulate.report import Outcome, Report

_COLUMNS = ("hit rate", "of Belady", "TTFT mean", "p50", "p99", "longest queue", "CPU time")


def print_report(out: Console, report: Report, name: str) -> None:
    s = report.settings
    share = report.belady_tokens / max(1, report.input_tokens)
    running = max((outcome.most_running for outcome in report.outcomes), default=0)
    rows = [
        ("load", f"{count_requests(report.requests)}, {report.input_tokens:,} prompt tokens, {_pace(report.offered)}"),
        (
            "servers",
            f"{count_servers(s.servers)}, {s.rate:,.0f} tokens/s, {s.capacity:,} KV slots, chunks of {s.chunk:,}, "
            f"page size {s.page_size}",
        ),
        ("decoding", f"{s.tpot:g} s a token, at most {s.max_running} at a time (there were up to {running})"),
        ("Belady", f"{share:.2%} of the prompt tokens (fcfs, whole blocks of 512, the future known)"),
        ("scheduler", f"{report.scheduler}, {', '.join(dict.fromkeys(o.cache for o in report.outcomes))}"),
    ]
    lost = {outcome.rejected for outcome in report.outcomes if outcome.rejected}
    if lost:
        rows.append(("rejected", f"{max(lost):,} at most: empty, or with prompt and output larger than a server"))
    out.print(grid(name, rows))
    out.print(_policies(report))


def _policies(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("policy")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for outcome in report.outcomes:
        table.add_row(outcome.policy, *_row(report, outcome))
    return table


def _row(report: Report, outcome: Outcome) -> list[str]:
    share = report.of_belady(outcome)
    ttft = outcome.ttft_figures()
    return [
        f"{report.hit_rate(outcome):.2%}",
        "-" if share is None else f"{share:.1%}",
        *(seconds(ttft[key]) for key in ("mean", "p50", "p99")),
        f"{outcome.longest_queue:,}",
        f"{outcome.cpu_seconds:.1f} s",
    ]


def seconds(value: float | None) -> str:
    """Return a time in seconds with three digits, or more if it is large."""
    if value is None:
        return "-"
    return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"


def count_servers(count: int) -> str:
    return "1 server" if count == 1 else f"{count} servers, each"


def _pace(offered: float) -> str:
    return f"{offered:,.0f} tokens/s offered" if offered < float("inf") else "all at once"
