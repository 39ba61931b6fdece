"""The command line: `flatradix replay`, `flatradix simulate`, `flatradix tree`, `flatradix info`."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
import typer
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from rich.theme import Theme

from flatradix.errors import CapacityError, DeviceUnavailableError
from flatradix.inputs import devices
from flatradix.inputs.policy import NAMES as POLICIES
from flatradix.inspect import draw as drawing
from flatradix.replay import plot as plotting
from flatradix.replay import replay as replaying
from flatradix.replay import tables, traces
from flatradix.replay import workload as workloads
from flatradix.replay.blocks import BLOCK_TOKENS
from flatradix.replay.plot import PlotUnavailableError
from flatradix.replay.report import Report, Settings, versions
from flatradix.simulate import load as loads
from flatradix.simulate import peer
from flatradix.simulate import plot as simulation_plotting
from flatradix.simulate import run as running
from flatradix.simulate import settings as simulations
from flatradix.simulate import tables as simulation_tables
from flatradix.simulate.load import Job
from flatradix.simulate.report import Report as SimulationReport
from flatradix.version import VERSION

ERROR, INTERRUPTED = 2, 130
STDOUT = "-"

app = typer.Typer(
    name="flatradix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_FROM_TRACE = (
    "The requests, in the format below; - for standard input; may be packed with gzip, bzip2, xz or zstd. "
    "[default: a built-in workload]"
)
_FORMAT = """
A trace has one request a line:

    {"timestamp": 27, "input_length": 700, "output_length": 52, "hash_ids": [4, 7]}

timestamp in ms (or none on any line), lengths in tokens, one hash id for each block of the prompt. Equal ids are equal
blocks. A block has 512 tokens if all lines fit that, else what they tell, or --block-size.
"""

_POLICIES_HELP = (
    f"Whom first: {', '.join(simulations.ORDERS)}; may be given several times. [default: "
    f"{', '.join(simulations.DEFAULTS['flatradix'])}] With --scheduler sglang: "
    f"{', '.join(simulations.SGLANG_ORDERS)}. [default: {', '.join(simulations.DEFAULTS['sglang'])}]"
)

Trace = Annotated[Path | None, typer.Argument(metavar="TRACE", help=_FROM_TRACE, show_default=False)]
PageSize = Annotated[int, typer.Option("--page-size", help="Tokens a page: prompts are cached in whole pages.")]
Capacity = Annotated[int, typer.Option("--capacity", help="Tokens that the cache holds.")]
Hold = Annotated[int, typer.Option("--hold", help="Later requests for which a request keeps its path locked.")]
PolicyName = Annotated[str, typer.Option("--policy", help=f"What is evicted first: {', '.join(POLICIES)}.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto (see `flatradix info`).")]
Batch = Annotated[
    int, typer.Option("--batch", help="Requests that are matched, inserted and released together.", show_default=True)
]
Limit = Annotated[
    int | None, typer.Option("--limit", help="Stop after so many requests of the trace.", show_default=False)
]
JsonPath = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write the figures as JSON; - for standard output.", show_default=False
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        "--block-size",
        help="Tokens for which a hash id of TRACE stands. [default: found from TRACE]",
        show_default=False,
    ),
]
Requests = Annotated[
    int | None, typer.Option(help="Without TRACE, how many requests. [default: 3000]", show_default=False)
]
Workload = Annotated[
    str | None,
    typer.Option(
        "--workload",
        help=f"Without TRACE, the kind of requests: {', '.join(workloads.KINDS)}. [default: mix]",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Without TRACE, the seed of the requests. [default: 0]", show_default=False),
]


class Source(NamedTuple):
    """A named sequence of prompts. requests: how many there are."""

    name: str
    requests: int
    prompts: Iterator[np.ndarray]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flatradix {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """The radix tree behind an LLM server's KV prefix cache: try it on request traces."""


@app.command(
    epilog=f"""
Examples:

    flatradix replay trace.jsonl --capacity 4000000 --plot out.png

    flatradix replay --workload agents --requests 5000 --policy slru

    flatradix replay trace.jsonl --limit 1000 --json - | jq .hit_rate

    ssh host cat trace.jsonl.zst | flatradix replay -
{_FORMAT}"""
)
def replay(
    trace: Trace = None,
    page_size: PageSize = 64,
    capacity: Capacity = 1_000_000,
    hold: Hold = 32,
    policy: PolicyName = "lru",
    device: Device = "auto",
    batch: Batch = 1,
    limit: Limit = None,
    block_size: BlockSize = None,
    workload: Workload = None,
    requests: Requests = None,
    seed: Seed = None,
    json_path: JsonPath = None,
    plot_path: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw them: FILE.png, .svg or .pdf.", show_default=False),
    ] = None,
) -> None:
    """Replay requests through a prefix cache and report hit rate, evictions and the time of each operation.

    Each prompt is matched, and its match is locked. If the prompt does not fit, the excess is evicted. Then the prompt
    is inserted with new slots, and its path stays locked for the next HOLD requests. Every operation is a single call
    and is timed. With --batch N, N requests take each step together, in one call.
    """
    with _plain_errors():
        settings = Settings(page_size, capacity, hold, policy, device, batch)
        settings.validate()
        _check_outputs(trace, json_path, plot_path)
        source = _open(_Given(trace, limit, block_size, workload, requests, seed), default_requests=3000)
        report = _run(source, settings)
        _write(report, source.name, json_path, plot_path)


@app.command(
    epilog=f"""
Examples:

    flatradix simulate trace.jsonl --rate 30000 --capacity 1000000 --figure out.png

    flatradix simulate trace.jsonl --policy fcfs --policy fcfs+keep --policy aged+keep

    flatradix simulate trace.jsonl --servers 2 --rate 20000 --json - | jq '.policies[].hit_rate'

    flatradix simulate trace.jsonl --scheduler sglang --policy lpm
{_FORMAT}"""
)
def simulate(
    trace: Trace = None,
    rate: Annotated[float, typer.Option("--rate", help="Tokens that a server prefills in a second.")] = 30_000,
    capacity: Annotated[int, typer.Option("--capacity", help="KV slots (tokens) of a server.")] = 1_000_000,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="NAME[+keep][+defer]", help=_POLICIES_HELP, show_default=False),
    ] = None,
    scheduler: Annotated[
        str, typer.Option("--scheduler", help="flatradix, or sglang: SGLang's own scheduler and cache.")
    ] = "flatradix",
    servers: Annotated[int, typer.Option("--servers", help="Equal servers; requests go to them in turn.")] = 1,
    page_size: PageSize = 64,
    chunk: Annotated[int, typer.Option("--chunk", help="Tokens that a step prefills, at most.")] = 8192,
    tpot: Annotated[float, typer.Option("--tpot", help="Seconds for each output token of a request.")] = 0.02,
    max_running: Annotated[
        int, typer.Option("--max-running", help="Requests that a server prefills and decodes at a time, at most.")
    ] = 256,
    patience: Annotated[
        float, typer.Option("--patience", help="For aged: seconds of waiting that weigh as much as a full hit.")
    ] = 300.0,
    every: Annotated[int, typer.Option("--every", help="For k-lpm: every so many turns, the oldest goes first.")] = 4,
    offered: Annotated[
        float | None,
        typer.Option(
            "--offered",
            help="Arrivals faster or slower: prompt tokens that arrive in a second. "
            "[default: as in TRACE; without TRACE or timestamps, 1.25 times what the servers can prefill]",
            show_default=False,
        ),
    ] = None,
    limit: Limit = None,
    block_size: BlockSize = None,
    workload: Workload = None,
    requests: Requests = None,
    seed: Seed = None,
    json_path: JsonPath = None,
    figure_path: Annotated[
        Path | None,
        typer.Option("--figure", metavar="FILE", help="Draw them: FILE.png, .svg or .pdf.", show_default=False),
    ] = None,
) -> None:
    """Simulate LLM servers on a trace, once with each policy: hit rates and times to the first token (TTFT).

    A policy says which of the waiting requests go first. With +keep, an eviction spares what waiting requests want.
    With +defer, a request goes after all others while an older one that waits is about to bring its prefix.

    Arrivals, prompts and output lengths are those of the trace. Trees, queues, locks and evictions are real. A clock
    takes the place of the model: a step prefills up to CHUNK uncached tokens in tokens / RATE seconds; then a request
    decodes beside the prefill, and holds its slots for TPOT seconds a token.

    "of Belady" compares the hits with those of an eviction that knows the future (fcfs, whole blocks of 512 tokens).
    """
    with _plain_errors():
        settings = simulations.Settings(rate, capacity, page_size, chunk, servers, tpot, max_running, patience, every)
        settings.validate()
        policies = simulations.read_policies(policy, scheduler)
        _check_outputs(trace, json_path, figure_path)
        if offered is not None and not 0 < offered < float("inf"):
            raise ValueError(f"--offered {offered:g}: it must be more than 0")
        if scheduler == "sglang":
            peer.find()
        name, jobs = _load(_Given(trace, limit, block_size, workload, requests, seed), offered, settings)
        report = _simulate(name, jobs, settings, policies, scheduler)
        _write_simulation(report, name, json_path, figure_path)


@app.command(
    epilog=f"""
Examples:

    flatradix tree

    flatradix tree trace.jsonl --limit 20 --page-size 512 --details
{_FORMAT}"""
)
def tree(
    trace: Trace = None,
    page_size: PageSize = 16,
    capacity: Capacity = 100_000,
    hold: Hold = 2,
    policy: PolicyName = "lru",
    device: Device = "auto",
    limit: Annotated[int, typer.Option("--limit", help="How many requests to replay.")] = 12,
    block_size: BlockSize = None,
    workload: Workload = None,
    seed: Seed = None,
    max_nodes: Annotated[int, typer.Option("--max-nodes", help="Draw no more nodes than this.")] = 60,
    details: Annotated[bool, typer.Option("--details", help="Also creation, hits and priorities.")] = False,
) -> None:
    """Replay a few requests and draw the tree that they leave: lengths, locks and ticks of each node.

    Each line begins with the position of the node's edge on its path (start+length, in tokens) and the edge's first
    tokens. "locks" counts the requests that hold the node, "own" counts the requests with a path that ends there.
    "tick" is the time of the last use, on a clock that goes up by 2 with each match and each insert.
    """
    with _plain_errors():
        settings = Settings(page_size, capacity, hold, policy, device)
        settings.validate()
        if max_nodes < 1:
            raise ValueError(f"--max-nodes {max_nodes}: it must be 1 or more")
        requests = limit if trace is None else None
        source = _open(_Given(trace, limit, block_size, workload, requests, seed), default_requests=limit)
        run = replaying.Replay(settings)
        run.feed(source.prompts)
        out = Console(highlighter=_TreeHighlighter(), theme=_TREE_THEME, soft_wrap=True)
        out.print(Text(f"after {tables.count_requests(source.requests)} of {source.name}"))
        out.print(out.highlighter(drawing.draw(run.tree.content(), max_nodes, details)))
        out.print(Text(drawing.LEGEND, style="dim"))


@app.command()
def info() -> None:
    """Show versions, devices, and which device `auto` takes and why."""
    with _plain_errors():
        out = Console(soft_wrap=True)
        out.print(tables.grid("versions", list(versions().items())))
        out.print(tables.grid("devices", devices.explain()))
        out.print(Text(f"device auto takes {devices.auto_reason()}"))


def main() -> None:
    """Run the command line. The exit code is 0, 2 (a bad call) or 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack characters, as "µ" in ASCII
    try:
        app(prog_name="flatradix")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn errors that a user can correct into one red line and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="red")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except (MemoryError, torch.OutOfMemoryError):
        _fail("there is not enough memory for a tree of this capacity")
    except (
        ValueError,
        CapacityError,
        DeviceUnavailableError,
        PlotUnavailableError,
        peer.PeerMissingError,
        OSError,
    ) as error:
        _fail(str(error))


def _fail(reason: str) -> NoReturn:
    line = " ".join(reason.split())
    Console(stderr=True, soft_wrap=True).print(Text(f"error: {line}", style="red"))
    raise typer.Exit(ERROR) from None


def _check_outputs(trace: Path | None, json_path: Path | None, plot_path: Path | None) -> None:
    """Check the output paths before the replay, so that a bad path fails before the work."""
    files = [path for path in (json_path, plot_path) if path is not None and str(path) != STDOUT]
    if plot_path is not None:
        plotting.require(plot_path)
    for path in files:
        _check_writable(path)
        if trace is not None and str(trace) != traces.STANDARD_INPUT and path.resolve() == trace.resolve():
            raise ValueError(f"{path}: this would overwrite the trace")
    if len(files) == 2 and files[0].resolve() == files[1].resolve():
        raise ValueError(f"{files[0]}: JSON and plot cannot go into the same file")


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: cannot be written, it is a directory")
    if path.exists():
        if not os.access(path, os.W_OK):
            raise ValueError(f"{path}: cannot be written, permission denied")
    elif not path.parent.is_dir():
        raise ValueError(f"{path}: cannot be written, there is no directory {path.parent}")
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: cannot be written, no permission in {path.parent}")


class _Given(NamedTuple):
    """The options that say which requests there are."""

    trace: Path | None
    limit: int | None
    block_size: int | None
    workload: str | None
    requests: int | None
    seed: int | None

    def check(self) -> None:
        """Raise ValueError for a number out of range, or an option that does not fit the others."""
        for name, value, least in (
            ("--limit", self.limit, 1),
            ("--block-size", self.block_size, 1),
            ("--requests", self.requests, 1),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} {value}: it must be {least} or more")
        if self.trace is None and self.block_size is not None:
            raise ValueError("--block-size is for a TRACE")
        for name, given in (("--workload", self.workload), ("--requests", self.requests), ("--seed", self.seed)):
            if self.trace is not None and given is not None:
                raise ValueError(f"{name} is for the built-in workload; with a TRACE, use --limit")

    def built_in(self, default_requests: int) -> tuple[str, int, int]:
        """Return the kind, the number and the seed of the requests of the built-in workload."""
        count = min(self.requests or default_requests, self.limit or sys.maxsize)
        return self.workload or "mix", count, self.seed or 0

    def read(self) -> tuple[str, list[traces.Request]]:
        """Return the name of the trace, with its block size if that is not 512, and its requests."""
        assert self.trace is not None
        found = traces.read_trace(self.trace, self.limit, self.block_size)
        name = "standard input" if str(self.trace) == traces.STANDARD_INPUT else self.trace.name
        size = found[0].block_size
        return name if size == BLOCK_TOKENS else f"{name} (blocks of {size} tokens)", found


def _open(given: _Given, default_requests: int) -> Source:
    given.check()
    if given.trace is None:
        kind, count, seed = given.built_in(default_requests)
        return Source(f"the built-in workload ({kind})", count, workloads.prompts(kind, count, seed))
    name, found = given.read()
    return Source(name, len(found), traces.prompts(found))


def _load(given: _Given, offered: float | None, settings: simulations.Settings) -> tuple[str, list[Job]]:
    """Return the name and the requests of a simulation."""
    given.check()
    pace = offered or 1.25 * settings.rate * settings.servers
    if given.trace is None:
        kind, count, seed = given.built_in(3000)
        return f"the built-in workload ({kind})", loads.of_workload(kind, count, seed, pace)
    name, found = given.read()
    with _bar("reading the prompts", len(found)) as step:
        jobs = loads.of_trace(found, None if step is None else lambda done: step(name, done, None))
    timed = found[0].timestamp is not None
    return name, jobs if timed and offered is None else loads.paced(jobs, pace)


def _simulate(
    name: str, jobs: list[Job], settings: simulations.Settings, policies: list[simulations.Policy], scheduler: str
) -> SimulationReport:
    with _bar("getting ready", len(jobs)) as step:
        if step is None:
            count = f"{len(policies)} polic" + ("y" if len(policies) == 1 else "ies")
            line = f"simulating {tables.count_requests(len(jobs))} of {name} with {count}"
            Console(stderr=True, highlight=False).print(line, soft_wrap=True, markup=False)
        serving = running.scheduler(scheduler, settings.page_size)
        return running.simulate(jobs, settings, policies, serving, step)


def _run(source: Source, settings: Settings) -> Report:
    """Replay with a progress bar on a terminal; elsewhere print one line first."""
    s = settings
    with _bar("compiling kernels", source.requests) as step:
        if step is None:
            line = f"replaying {tables.count_requests(source.requests)} of {source.name}"
            Console(stderr=True, highlight=False).print(line, soft_wrap=True, markup=False)
        progress = None if step is None else lambda done, rate: step(source.name, done, rate)
        return replaying.replay(source.prompts, s.page_size, s.capacity, s.hold, s.policy, s.device, progress, s.batch)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[str, int, float | None], None] | None]:
    """Show a progress bar on a terminal. Yield a function that takes (title, done, hit rate); None elsewhere."""
    err = Console(stderr=True, highlight=False)
    if not err.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rate = TextColumn("{task.fields[rate]}")
    # No auto-refresh: its thread would take the GIL during timed calls.
    with Progress(*columns, rate, console=err, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(title, total=total, rate="")
        bar.refresh()

        def step(name: str, done: int, rate: float | None) -> None:
            shown = "" if rate is None else f"hit rate {rate:.1%}"
            bar.update(task, description=escape(name), completed=done, rate=shown, refresh=True)

        yield step


def _write(report: Report, name: str, json_path: Path | None, plot_path: Path | None) -> None:
    try:
        _write_json({"source": name, **report.to_json()}, json_path)
        if plot_path is not None:
            plotting.save(report, plot_path, name)
    finally:
        tables.print_report(_console_beside(json_path), report, name)


def _write_simulation(report: SimulationReport, name: str, json_path: Path | None, figure_path: Path | None) -> None:
    try:
        _write_json({"source": name, **report.to_json()}, json_path)
        if figure_path is not None:
            simulation_plotting.save(report, figure_path, name)
    finally:
        simulation_tables.print_report(_console_beside(json_path), report, name)


def _console_beside(json_path: Path | None) -> Console:
    """Return where a report is printed: standard error if the JSON goes to standard output."""
    return Console(stderr=json_path is not None and str(json_path) == STDOUT, highlight=False)


def _write_json(figures: dict[str, Any], path: Path | None) -> None:
    if path is None:
        return
    text = json.dumps(figures, indent=2)
    if str(path) == STDOUT:
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


class _TreeHighlighter(RegexHighlighter):
    base_style = "tree."
    highlights: ClassVar[list[str]] = [
        r"(?P<tokens>\[[^\]]*\])",
        r"(?P<locks>locks \d+( \(own \d+\))?)",
        r"(?P<tick>tick \d+.*)",
    ]


_TREE_THEME = Theme({"tree.tokens": "cyan", "tree.locks": "bold yellow", "tree.tick": "dim"})
