"""The tables that the command line prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatradix.replay.report import Report


def print_report(out: Console, report: Report, name: str) -> None:
    s = report.settings
    rows = [
        ("requests", f"{report.requests:,}" + (f", {report.rejected:,} rejected" if report.rejected else "")),
        (
            "hit rate",
            f"{report.hit_rate:.2%} ({report.hit_tokens:,} of {report.input_tokens:,} prompt tokens)",
        ),
        ("evicted", f"{report.evicted_tokens:,} tokens"),
        ("cached at the end", f"{report.final_tokens:,} of {s.capacity:,} tokens in {report.nodes:,} nodes"),
        ("memory", f"{report.nbytes / 2**20:,.1f} MiB set aside for the index and its slots"),
        ("time", f"{_operation_seconds(report):.2f} s in the tree, {report.seconds:.2f} s in all"),
        (
            "settings",
            f"page size {s.page_size}, hold {s.hold}, "
            + (f"batches of {s.batch}, " if s.batch > 1 else "")
            + f"policy {s.policy}, device {report.device}",
        ),
    ]
    out.print(grid(name, rows))
    out.print(_operations_table(report))


def _operations_table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("operation")
    for column in ("calls", "p50 µs", "p99 µs", "max µs", "total s"):
        table.add_column(column, justify="right")
    for name, row in report.operations().items():
        times = (f"{row[key]:,.1f}" for key in ("p50_us", "p99_us", "max_us"))
        table.add_row(name, f"{row['calls']:,}", *times, f"{row['total_seconds']:.3f}")
    return table


def _operation_seconds(report: Report) -> float:
    return sum(row["total_seconds"] for row in report.operations().values())


def grid(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False,
        padding=(0, 2, 0, 0),
    )  # fmt: skip
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    return table


def count_requests(count: int) -> str:
    return f"{count:,} request" + ("" if count == 1 else "s")
