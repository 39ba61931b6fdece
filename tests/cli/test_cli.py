"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from inspect import signature
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
from typer.testing import CliRunner

from flatradix import cli
from flatradix.replay import plot
from tests.support.depth import examples

ROOT = Path(__file__).parents[2]
ENCODINGS = ["gbk", "shift_jis", "ascii", "cp1252", "utf-8"]
# Older click mixes stderr into stdout unless `mix_stderr` is False. Newer click never does, and lacks the option.
SEPARATE: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in signature(CliRunner).parameters else {}
RUNNER = CliRunner(**SEPARATE)
LINES = [
    {"timestamp": 0, "input_length": 1000, "output_length": 1, "hash_ids": [1, 2]},
    {"timestamp": 1, "input_length": 1300, "output_length": 1, "hash_ids": [1, 2, 3]},
    {"timestamp": 2, "input_length": 600, "output_length": 1, "hash_ids": [1, 4]},
]


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(path)


def call(*arguments: str, device: bool = True) -> Any:
    extra = ["--device", "cpu"] if device and arguments[0] in ("replay", "tree") else []
    return RUNNER.invoke(cli.app, [*arguments, *extra], env={"COLUMNS": "200"})


def refused(*arguments: str, device: bool = True) -> str:
    """Make a call that must fail; return the one line that it prints."""
    result = call(*arguments, device=device)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_replay(trace: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = call("replay", trace, "--page-size", "100", "--capacity", "2000", "--hold", "1", "--json", str(out))
    assert result.exit_code == 0, result.output
    assert "51.72% (1,500 of 2,900 prompt tokens)" in result.stdout
    for word in ("match", "lock", "slots", "insert", "unlock", "p50 µs", "p99 µs", "total s", "1,400 of 2,000", "MiB"):
        assert word in result.stdout
    assert result.stderr == "replaying 3 requests of trace.jsonl\n"
    figures = json.loads(out.read_text())
    assert figures["source"] == "trace.jsonl"
    wanted = {"input_tokens": 2900, "hit_tokens": 1500, "evicted_tokens": 0, "rejected": 0, "final_tokens": 1400}
    assert {name: figures[name] for name in wanted} == wanted
    assert len(figures["hits_sha256"]) == 64
    assert {"calls", "p50_us", "p99_us", "max_us", "total_seconds"} == set(figures["operations"]["match"])
    assert figures["versions"]["flatradix"]


def test_json_to_standard_output(trace: str) -> None:
    result = call("replay", trace, "--json", "-", "--limit", "2")
    assert json.loads(result.stdout)["requests"] == 2
    assert "hit rate" in result.stderr


def test_plot_file(trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.png"
    assert call("replay", trace, "--plot", str(path)).exit_code == 0
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_built_in_workload() -> None:
    def figures(*arguments: str) -> dict:
        shown = json.loads(call("replay", "--json", "-", "--requests", "30", *arguments).stdout)
        return {name: shown[name] for name in ("source", "requests", "input_tokens", "hits_sha256", "digest")}

    first = figures()
    assert first["source"] == "the built-in workload (mix)"
    assert first["requests"] == 30
    assert figures() == first
    assert figures("--seed", "1")["digest"] != first["digest"]
    assert figures("--workload", "agents")["source"] == "the built-in workload (agents)"
    assert figures("--limit", "7")["requests"] == 7


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--capacity", "63"], "capacity 63 is less than one page of 64 tokens"),
        (["--capacity", "9000000000"], "too large"),
        (["--page-size", "0"], "page size 0"),
        (["--hold", "-1"], "hold -1"),
        (["--policy", "random"], "policy 'random' is unknown: one of lru, "),
        (["--limit", "0"], "--limit 0: it must be 1 or more"),
        (["--requests", "0"], "--requests 0: it must be 1 or more"),
        (["--seed", "-1"], "--seed -1: it must be 0 or more"),
        (["--workload", "songs"], "workload 'songs' is unknown: one of mix, chat"),
        (["--json", "/no/such/folder/a.json"], "there is no directory"),
        (["--json", "."], "it is a directory"),
        (["--plot", "/no/such/folder/a.png"], "there is no directory"),
        (["--plot", "a.txt"], "the name of a plot ends in .png"),
    ],
)
def test_refuses_before_any_work(arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.replaying, "warm_up", lambda settings: pytest.fail("it began to work"))
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: True)
    result = call("replay", *arguments)
    assert result.exit_code == 2, result.output
    assert reason in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


def test_refuses_devices() -> None:
    assert 'device="tpu" is no device' in refused("replay", "--device", "tpu", device=False)
    if not cli.devices.why_not_cuda():
        pytest.skip("there is a GPU")
    assert 'device="cuda" cannot be used: ' in refused("replay", "--device", "cuda", device=False)


def test_options_that_need_no_trace(trace: str) -> None:
    for option, value in (("--workload", "chat"), ("--requests", "5"), ("--seed", "1")):
        assert f"{option} is for the built-in workload" in refused("replay", trace, option, value)


def test_outputs_that_would_destroy_something(trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: True)
    assert "this would overwrite the trace" in refused("replay", trace, "--json", trace)
    same = str(tmp_path / "a.png")
    assert "cannot go into the same file" in refused("replay", trace, "--json", same, "--plot", same)


def test_without_matplotlib(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'flatradix[plot]'" in refused("replay", trace, "--plot", "a.png")


def test_damaged_trace(trace: str) -> None:
    with open(trace, "a") as file:
        file.write('{"timestamp": 5, "input_le')
    for command in ("replay", "tree"):
        assert f"error: {trace}:4: the JSON is cut short" in refused(command, trace)
    assert "none: no such file" in refused("replay", trace + ".none")


def test_tree(trace: str) -> None:
    result = call("tree", trace, "--page-size", "100", "--hold", "1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "after 3 requests of trace.jsonl"
    assert lines[1] == "1,400 of 100,000 tokens in 4 nodes, 1,400 locked; page size 100, policy lru"
    assert lines[2] == "no namespace"
    assert lines[3].startswith("└── 0+500 [")
    assert lines[3].endswith("locks 2  tick 12")
    assert sum("(own 1)" in line for line in lines[4:7]) == 2
    assert "… 3 more" in call("tree", trace, "--page-size", "100", "--max-nodes", "1").stdout
    assert "created" in call("tree", "--limit", "2", "--details").stdout
    assert "--max-nodes 0" in refused("tree", "--max-nodes", "0")


def test_info() -> None:
    result = call("info")
    assert result.exit_code == 0
    for word in ("flatradix", "torch", "numba", "cpu", "cuda", "device auto takes "):
        assert word in result.stdout


def test_help_teaches() -> None:
    for command in ([], ["replay"], ["tree"], ["info"]):
        result = call(*command, "--help", device=False)
        assert result.exit_code == 0
    assert "hash_ids" in call("replay", "--help", device=False).stdout


def test_interrupt(trace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.replaying, "replay", interrupt)
    result = call("replay", trace)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_as_a_process(trace: str) -> None:
    good = run("-m", "flatradix", "replay", trace, "--device", "cpu", "--json", "-")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["hit_tokens"] == 1472
    assert "\x1b" not in good.stderr
    Path(trace).write_text("[]\n")
    bad = run("-m", "flatradix", "replay", trace, "--device", "cpu")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith(f"error: {trace}:1: a JSON array; ")
    assert bad.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "encoding"),
    examples([("replay", "gbk"), ("simulate", "ascii")], list(product(["replay", "simulate"], ENCODINGS))),
)
def test_any_terminal_gets_the_report(trace: str, tmp_path: Path, encoding: str, command: str) -> None:
    out = tmp_path / "out.json"
    extra = ["--device", "cpu"] if command == "replay" else []
    call = [sys.executable, "-m", "flatradix", command, trace, "--json", str(out), *extra]
    variables = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "150"}
    done = subprocess.run(call, capture_output=True, cwd=ROOT, timeout=300, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())
    assert "hit rate" in done.stdout.decode(encoding)


@pytest.mark.parametrize("command", ["replay", "simulate"])
def test_figures_are_saved_before_the_report_is_printed(
    trace: str, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("the terminal is gone")

    monkeypatch.setattr(cli.tables, "print_report", fail)
    monkeypatch.setattr(cli.simulation_tables, "print_report", fail)
    out = tmp_path / "out.json"
    result = call(command, trace, "--json", str(out))
    assert result.exit_code == 2
    assert json.loads(out.read_text())["source"] == "trace.jsonl"


def test_version() -> None:
    assert call("--version", device=False).stdout == f"flatradix {cli.VERSION}\n"


def test_standard_input(trace: str) -> None:
    content = Path(trace).read_bytes()
    for command in ("replay", "tree"):
        for given in (content, gzip.compress(content)):
            result = RUNNER.invoke(cli.app, [command, "-", "--device", "cpu"], input=given)
            assert result.exit_code == 0, result.output
            assert "standard input" in result.output + result.stderr
    assert RUNNER.invoke(cli.app, ["replay", "-"], input=b"{").stderr.startswith("error: -:1: the JSON is cut short")


def test_blocks_of_another_size_and_no_timestamps(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"input_length": 40 + at, "output_length": 1, "hash_ids": [1, 2, 3]} for at in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "--block-size" in refused("replay", str(path))
    for command in ("replay", "simulate"):
        result = call(command, str(path), "--block-size", "16", "--page-size", "8", "--json", "-")
        assert json.loads(result.stdout)["source"] == "trace.jsonl (blocks of 16 tokens)"
    assert "--block-size 0" in refused("replay", str(path), "--block-size", "0")
    assert "--block-size is for a TRACE" in refused("replay", "--block-size", "16")


def test_import_stays_light() -> None:
    code = "import sys, flatradix; print([m for m in ('typer', 'rich', 'matplotlib', 'triton') if m in sys.modules])"
    assert run("-c", code).stdout == "[]\n"
