"""Machine code on disk: checkouts and versions share one folder, each runs its own code, and no disk stops a call."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.depth import examples

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


def call(folder: Path, code: str = SLOTS, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that imports the package from `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)


def run(folder: Path, cache: Path, **variables: str) -> str:
    """Return what a process that runs the checkout prints. It must be silent otherwise."""
    done = call(folder, NUMBA_CACHE_DIR=str(cache), **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def machine_code(cache: Path) -> set[Path]:
    return set(cache.rglob("*.nbc"))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return checkout(tmp_path / "home")


def no_place(folder: Path) -> dict[str, str]:
    """Return variables with which no folder can be written: files stand where the folders would be."""
    in_the_way = folder.parent / "in_the_way"
    in_the_way.write_text("")
    for kernels in (folder / "kernels" / "cpu", folder / "flatradix" / "kernels" / "cpu"):
        if kernels.is_dir() and not (kernels / "__pycache__").exists():
            (kernels / "__pycache__").write_text("")
    return {name: str(in_the_way / "below") for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")}


def test_versions_and_checkouts_share_a_folder(tmp_path: Path, home: Path) -> None:
    cache = tmp_path / "cache"
    other = checkout(tmp_path / "other")
    assert run(home, cache) == "refused"
    first = machine_code(cache)
    assert run(other, cache) == "refused"
    assert machine_code(cache) == first, "the same sources in another place compile nothing"
    change(home)
    assert run(home, cache) == "taken"
    both = machine_code(cache)
    assert first < both
    assert run(other, cache) == "refused"
    shutil.copy(ROOT / HELPER, home / HELPER)
    assert run(home, cache) == "refused"
    assert machine_code(cache) == both, "a version that was there before compiles nothing"


def test_without_a_place_there_is_one_warning(home: Path) -> None:
    done = call(home, "import flatradix\n" + SLOTS + SLOTS, **no_place(home))
    assert (done.returncode, done.stdout) == (0, "refused\nrefused\n"), done.stderr
    assert done.stderr.count("NUMBA_CACHE_DIR") == 1
    assert len(done.stderr.splitlines()) == 1


def test_what_root_has_compiled_is_read_where_nothing_can_be_written(home: Path) -> None:
    own = home / "flatradix" / "kernels" / "cpu" / "__pycache__"
    done = call(home, NUMBA_CACHE_DIR="")
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
    assert machine_code(own)
    assert run(home, Path(no_place(home)["NUMBA_CACHE_DIR"])) == "refused"


@pytest.mark.parametrize("damage", examples(["cut"], ["cut", "empty", "other bytes"]))
def test_a_damaged_file_is_replaced(tmp_path: Path, home: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    assert run(home, cache) == "refused"
    whole = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    for path, content in whole.items():
        half = len(content) // 2
        path.write_bytes({"cut": content[:half], "empty": b"", "other bytes": content[:half] + bytes(half)}[damage])
    assert run(home, cache) == "refused"
    assert {path.stat().st_size for path in whole} == {len(content) for content in whole.values()}
    after = {path: path.stat().st_mtime_ns for path in whole}
    assert run(home, cache) == "refused"
    assert {path: path.stat().st_mtime_ns for path in whole} == after, "what was replaced is used"


FULL = """
import errno, os
import flatradix, flatradix.kernels.cpu
replace = os.replace
def full(source, target):
    raise OSError(errno.ENOSPC, "No space left on device", target)
os.replace = full
"""


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, home: Path) -> None:
    cache = tmp_path / "cache"
    done = call(home, FULL + SLOTS, **no_place(home) | {"NUMBA_CACHE_DIR": str(cache)})
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
    assert done.stderr.count("NUMBA_CACHE_DIR") == len(done.stderr.splitlines()) == 1
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", examples(["app.zip"], ["app.zip", "app.whl"]))
def test_a_package_in_a_zip_file(tmp_path: Path, home: Path, name: str) -> None:
    (home / "flatradix" / "kernels").unlink()
    (home / "kernels").rename(home / "flatradix" / "kernels")
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", home)).rename(tmp_path / name)
    cache = tmp_path / "cache"
    assert run(archive, cache) == "refused"
    first = machine_code(cache)
    assert len(first) > 0
    assert run(archive, cache) == "refused"
    assert machine_code(cache) == first


def test_numba_without_its_compiler_gets_a_plain_message(home: Path) -> None:
    done = call(home, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 1
    assert "Unset NUMBA_DISABLE_JIT" in done.stderr.splitlines()[-1]
