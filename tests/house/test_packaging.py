"""The modules that `import flatradix` loads, and the contents of the wheel."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code: str, *path: Path, **environment: str) -> str:
    """Run Python code in a new process, with only these folders before the installed packages; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment},
        cwd=path[0],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_in_no_compiler_and_no_plots() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import flatradix
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    brought = run(code, ROOT)
    for name in ("numba", "llvmlite", "triton", "matplotlib", "typer", "rich", "scipy"):
        assert f"'{name}'" not in brought


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this checkout, unpacked into a folder."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: no wheel can be built")
    import setuptools

    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is too old to build the wheel: 77 is wanted")
    built = tmp_path_factory.mktemp("built")
    source = tmp_path_factory.mktemp("source")
    _copy_sources(source)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(built)!r}))"
    name = run(code, source).splitlines()[-1]
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(built / name).extractall(folder)
    return folder


def _copy_sources(target: Path) -> None:
    """Copy the sources without build products, so that the build leaves nothing in the checkout."""
    import shutil

    ignored = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    for name in ("flatradix", "kernels"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)


def test_wheel_installs_no_top_level_kernels(unpacked_wheel: Path) -> None:
    names = {path.name for path in unpacked_wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"flatradix"}
    assert (unpacked_wheel / "flatradix/kernels/cpu/match.py").is_file()
    assert not (unpacked_wheel / "flatradix/kernels").is_symlink()


def test_wheel_works_beside_the_package_named_kernels(unpacked_wheel: Path) -> None:
    peers = ROOT / ".peers"
    if not (peers / "kernels" / "__init__.py").is_file():
        pytest.skip("the package kernels is not in .peers; make test puts it there")
    code = """
import importlib.util, flatradix
length = flatradix.RadixTree(16).match([1, 2, 3]).length  # compiles one kernel
print(length, flatradix.__file__, importlib.util.find_spec("kernels").origin)
"""
    length, ours, theirs = run(code, unpacked_wheel, peers).split()
    assert length == "0"
    assert Path(ours) == unpacked_wheel / "flatradix/__init__.py"
    assert Path(theirs) == peers / "kernels/__init__.py"


def test_the_version_is_one(unpacked_wheel: Path) -> None:
    import flatradix

    (metadata,) = unpacked_wheel.glob("*.dist-info/METADATA")
    assert f"\nVersion: {flatradix.__version__}\n" in metadata.read_text()
