"""Machine code on disk: checkouts and versions share one folder, and each runs its own code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Whether a handle that no tree gave out is refused. It takes one small kernel.
SLOTS = """
from types import SimpleNamespace
import flatradix, torch
try:
    flatradix.RadixTree(16, device="cpu").slots(SimpleNamespace(handles=torch.tensor([5]), lengths=torch.tensor([0])))
    print("taken")
except flatradix.StaleHandleError:
    print("refused")
"""
# A helper in another file than its kernel: numba's own stamp knows the file of the kernel alone.
HELPER = "kernels/cpu/rows.py"
SOUND = "    if handle < 0 or row >= s.numbers[numbers.ROWS]:\n        return np.int64(reasons.STALE)\n"
CHANGED = "    if handle == 5:\n        return np.int64(0)\n"


def checkout(folder: Path) -> Path:
    """Copy the package as `git clone` would lay it."""
    for name in ("flatradix", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def change(folder: Path) -> None:
    """Change the helper alone: it takes the handle from now on. Its time of change stays."""
    path = folder / HELPER
    source, times = path.read_text(), path.stat()
    assert SOUND in source
    path.write_text(source.replace(SOUND, CHANGED))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def run(folder: Path, cache: Path) -> str:
    """Return what a process that runs the checkout prints."""
    variables = {"PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", SLOTS]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def machine_code(cache: Path) -> set[Path]:
    return set(cache.rglob("*.nbc"))


def test_versions_and_checkouts_share_a_folder(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    home, other = checkout(tmp_path / "home"), checkout(tmp_path / "other")
    assert run(home, cache) == "refused"
    first = machine_code(cache)
    change(home)
    assert run(home, cache) == "taken"
    both = machine_code(cache)
    assert first < both
    assert run(other, cache) == "refused"
    shutil.copy(ROOT / HELPER, home / HELPER)
    before = machine_code(cache)
    assert run(home, cache) == "refused"
    assert machine_code(cache) == before, "a version that was there before compiles nothing"
