"""mini-sglang's prefix caches and its cache manager without its engine and without a GPU.

`load_or_skip` looks for the folder `minisgl` in the folder `.peers` at the repository root, then in the folder that the
environment variable FLATRADIX_PEERS names. mini-sglang is not on PyPI: copy the folder `python/minisgl` of its
repository. Its tree compares keys in C++, which needs apache-tvm-ffi, a compiler and ninja.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from bench.support.sglang_trees import FOLDER


class Modules(NamedTuple):
    core: Any
    kvcache: Any
    radix_cache: Any
    scheduler_cache: Any


def _bare(name: str, folder: Path) -> ModuleType:
    """Make a package whose own `__init__` does not run, because it would import the whole engine."""
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return package


def load_or_skip() -> Modules:
    """Return the modules, or skip the test module with the reason."""
    homes = [Path(home) / "minisgl" for home in (FOLDER, os.environ.get("FLATRADIX_PEERS", "")) if home]
    home = next((home for home in homes if (home / "kvcache" / "radix_cache.py").is_file()), None)
    if home is None:
        pytest.skip("mini-sglang is not there: copy its folder python/minisgl to .peers", allow_module_level=True)
    _bare("minisgl", home)
    _bare("minisgl.scheduler", home / "scheduler")
    utils = _bare("minisgl.utils", home / "utils")
    try:
        for source, names in (("registry", ["Registry"]), ("misc", ["align_down", "div_ceil"])):
            module = importlib.import_module(f"minisgl.utils.{source}")
            for name in names:
                setattr(utils, name, getattr(module, name))
        importlib.import_module("minisgl.kernel").fast_compare_key(torch.tensor([1]), torch.tensor([1]))
        return Modules(
            *map(
                importlib.import_module,
                ("minisgl.core", "minisgl.kvcache", "minisgl.kvcache.radix_cache", "minisgl.scheduler.cache"),
            )
        )
    except Exception as error:  # a compiler that fails raises what it likes
        pytest.skip(f"mini-sglang does not run here: {error}", allow_module_level=True)
