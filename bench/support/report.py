"""The output of the CPU benchmarks: the machine, and each row against its target."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numba
import torch

from bench.support import sglang_trees
from bench.support.harness import Measured, Row

SCALE = {"us": 1e6, "ms": 1e3, "s": 1.0, "bytes": 1.0}


def pin(core: int | None) -> int | None:
    """Pin the process to one core and torch to one thread. Return the core, or None if the system cannot pin."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0)) if core is None else core
    os.sched_setaffinity(0, {core})
    return core


def number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def result_of(row: Row, measured: Measured) -> dict[str, Any]:
    scale = SCALE[row.unit]
    theirs = None if measured.theirs is None else measured.theirs * scale
    ours = measured.ours * scale
    ratio = None if theirs is None else ours / theirs
    judged = ours if row.absolute else ratio
    return {
        "name": row.name,
        "work": row.work,
        "unit": row.unit,
        "ours": ours,
        "theirs": theirs,
        "ratio": ratio,
        "target": row.target,
        "target_is": "ours" if row.absolute else "ratio",
        "met": None if judged is None else judged <= row.target,
        "note": measured.note,
    }


def machine_of(core: int | None) -> dict[str, Any]:
    models = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "core": core,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "sglang": sglang_trees.VERSION,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
