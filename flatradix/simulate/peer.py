"""Finding and importing SGLang's scheduler without its server and without a GPU.

`find` looks among the installed packages, then in the folder that the environment variable FLATRADIX_PEERS names, then
in the folder `.peers` beside the package (a checkout). The package `sglang` imports a whole front end, which nothing
here needs: a bare module takes its place, and `sglang.srt` under it is the real code. Packages for pictures and
notebooks that SGLang imports and that are not installed get empty stand-ins during the import.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = "0.5.23"
HINT = (
    f"get it with: pip install --no-deps --target FOLDER sglang=={VERSION} kernels==0.17.2 && pip install -r "
    "requirements/peers.txt; then set FLATRADIX_PEERS=FOLDER"
)
_PICTURES = ("IPython", "torchvision")
_MODULES = {
    "allocation": "sglang.srt.mem_cache.allocation",
    "common": "sglang.srt.mem_cache.common",
    "component_type": "sglang.srt.mem_cache.unified_cache.component_type",
    "context": "sglang.srt.runtime_context",
    "paged": "sglang.srt.mem_cache.allocator.paged",
    "params": "sglang.srt.mem_cache.cache_init_params",
    "policy": "sglang.srt.managers.schedule_policy",
    "pools": "sglang.srt.mem_cache.memory_pool",
    "radix": "sglang.srt.mem_cache.radix_cache",
    "requests": "sglang.srt.managers.schedule_batch",
    "sampling": "sglang.srt.sampling.sampling_params",
    "speculative": "sglang.srt.speculative.spec_info",
    "token": "sglang.srt.mem_cache.allocator.token",
    "unified": "sglang.srt.mem_cache.unified_radix_cache",
}


class PeerMissingError(RuntimeError):
    """SGLang cannot run here. The message says why, and how to get it."""


def find() -> Path:
    """Return the folder of the package `sglang`. Raises PeerMissingError."""
    places = []
    if "sglang" in sys.modules:
        places += [Path(place) for place in getattr(sys.modules["sglang"], "__path__", ())]
    elif (spec := importlib.util.find_spec("sglang")) is not None:
        places += [Path(place) for place in spec.submodule_search_locations or ()]
    if "FLATRADIX_PEERS" in os.environ:
        places.append(Path(os.environ["FLATRADIX_PEERS"]) / "sglang")
    places.append(Path(__file__).resolve().parents[2] / ".peers" / "sglang")
    for place in places:
        if (place / "srt" / "managers" / "schedule_policy.py").is_file():
            return place
    raise PeerMissingError(f"--scheduler sglang needs SGLang {VERSION}, which is not installed; {HINT}")


@functools.cache
def load() -> Any:
    """Import SGLang, give it a default configuration, and return its modules under short names.

    Raises PeerMissingError.
    """
    folder = find()
    fresh = "sglang" not in sys.modules
    if fresh:
        package = types.ModuleType("sglang")
        package.__path__ = [str(folder)]
        sys.modules["sglang"] = package
        sys.path.append(str(folder.parent))  # for the package `kernels`, which SGLang imports too
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        modules = _import_all()
    except ImportError as error:
        if fresh:
            for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
                del sys.modules[name]
        raise PeerMissingError(f"SGLang in {folder} does not import: {error}; {HINT}") from error
    return types.SimpleNamespace(**modules)


def _import_all() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # transformers remembers whether torchvision is installed: it must look before the stand-in exists.
        importlib.import_module("transformers.utils").is_torchvision_available()
        stand_ins = _StandIns()
        sys.meta_path.insert(0, stand_ins)
        try:
            modules = {name: importlib.import_module(path) for name, path in _MODULES.items()}
        finally:
            sys.meta_path.remove(stand_ins)
            for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
                del sys.modules[name]
    context = modules["context"].get_context()
    if not context.is_config_namespace_published("exec"):
        context.override_server_args().install()
    return modules


class _Anything(type):
    """The type of every attribute of a stand-in: a name, a base class, a decorator; of no use otherwise."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An import hook that makes a stand-in for each package of _PICTURES that is not installed."""

    def __init__(self) -> None:
        self._roots = {name for name in _PICTURES if importlib.util.find_spec(name) is None}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in self._roots:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass
