"""Rows that need a fresh process: memory use, and the time of the first use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from bench.support.harness import Measured, Row, Setup

ROOT = Path(__file__).resolve().parents[2]


def _run(arguments: list[str], root: Path = ROOT, **environment: str) -> float:
    """Run `bench.cpu.process ARGUMENTS` of a checkout in a fresh process; return the number that it prints last."""
    command = [sys.executable, "-m", "bench.cpu.process", *arguments]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def _memory(what: str, setup: Setup) -> Measured:
    theirs = _run([what, "theirs"]) if setup.peer else None
    return Measured(_run([what, "ours"]), theirs)


def _cold(setup: Setup) -> Measured:
    """Compile in a copy of this checkout without the machine code that lies beside the kernels."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("flatradix", "bench"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        return Measured(_run(["compile"], root, NUMBA_CACHE_DIR=folder, XDG_CACHE_HOME=folder), None)


def _second(setup: Setup) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        _run(["first-match"], NUMBA_CACHE_DIR=folder)
        times = sorted(_run(["first-match"], NUMBA_CACHE_DIR=folder) for _ in range(1 if setup.quick else 5))
    return Measured(times[len(times) // 2], None)


ROWS = [
    Row(
        "bytes-token", "memory of a token, 131072-token edges", "bytes", 12, partial(_memory, "bytes-token"),
        absolute=True,
    ),
    Row(
        "bytes-node", "memory of a node of 64 tokens, 1M nodes", "bytes", 1000, partial(_memory, "bytes-node"),
        absolute=True, slow=True,
    ),
    Row("compile", "compile every kernel, nothing cached", "s", 30, _cold, absolute=True),
    Row("first-match", "import and first match, compiled before", "s", 1, _second, absolute=True),
]  # fmt: skip
