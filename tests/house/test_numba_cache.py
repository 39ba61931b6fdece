"""Machine code on disk: checkouts and versions share one folder, and each runs its own code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MATCH = """
import flatradix
tree = flatradix.RadixTree(16, device="cpu")
tree.insert([1, 2, 3], [7, 8, 9])
print(tree.match([1, 2, 3]).length)
"""
# A helper in a file of its own: numba's own stamp knows the kernel's file alone.
HELPER = "kernels/cpu/walk.py"
SOUND, CHANGED = "return units - units % s.numbers[numbers.PAGE]", "return np.int64(0)"


def checkout(folder: Path) -> Path:
    """Copy the package as `git clone` would lay it."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("flatradix", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    return folder


def change(folder: Path) -> None:
    """Make a match find nothing, in the helper alone; its time of change stays."""
    path = folder / HELPER
    source, times = path.read_text(), path.stat()
    assert SOUND in source
    path.write_text(source.replace(SOUND, CHANGED))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def length(folder: Path, cache: Path) -> int:
    """What a match finds in a process of its own that runs the checkout."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "NUMBA_CACHE_DIR": str(cache),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", MATCH], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def files(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*.nbc")}


def test_two_checkouts_share_a_folder(tmp_path: Path, cache: Path) -> None:
    first, second = checkout(tmp_path / "first"), checkout(tmp_path / "second")
    change(second)
    assert [length(folder, cache) for folder in (first, second, first, second)] == [3, 0, 3, 0]


def test_two_versions_in_one_place_share_a_folder(tmp_path: Path, cache: Path) -> None:
    """A later version leaves the machine code of the one before as it is, and comes back to its own."""
    home = checkout(tmp_path / "home")
    assert length(home, cache) == 3
    before = files(cache)
    change(home)
    assert length(home, cache) == 0
    both = files(cache)
    assert before < both
    shutil.copy(ROOT / HELPER, home / HELPER)
    assert length(home, cache) == 3
    assert files(cache) == both
