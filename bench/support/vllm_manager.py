"""vLLM's own KV cache manager and scheduler without its engine and without a GPU.

`load` imports their modules, from a folder in which a vLLM wheel is unpacked: `pip install --no-deps --target FOLDER
vllm==0.33.0`, or `unzip` of the wheel. `find` looks in the folder `.peers` at the repository root, then in the folder
that the environment variable FLATRADIX_PEERS names. `Manager` drives the real `KVCacheManager`, its block pool and its
queue of free blocks. These modules import much that they never run (models, configurations, layers); stand-ins replace
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.support.sglang_trees import FOLDER, PeerMissing

_REAL = (
    "vllm.utils.math_utils",
    "vllm.v1.core.block_pool",
    "vllm.v1.core.encoder_cache_manager",
    "vllm.v1.core.kv_cache_coordinator",
    "vllm.v1.core.kv_cache_manager",
    "vllm.v1.core.kv_cache_metrics",
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.core.sched.interface",
    "vllm.v1.core.sched.output",
    "vllm.v1.core.sched.request_queue",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.core.sched.utils",
    "vllm.v1.core.single_type_kv_cache_manager",
    "vllm.v1.engine",
    "vllm.v1.kv_cache_interface",
    "vllm.v1.kv_cache_layout",
    "vllm.v1.kv_cache_spec_registry",
    "vllm.v1.metrics.stats",
    "vllm.v1.outputs",
    "vllm.v1.request",
    "vllm.v1.structured_output.request",
)
# Small functions of other modules that the real modules do run: by module and name, what stands in for each.
_RUN = {
    "vllm.utils": {"length_from_prompt_token_ids_or_embeds": lambda tokens, _: len(tokens)},
    "vllm.v1.utils": {
        "ConstantList": lambda tokens: tokens,
        "record_function_or_nullcontext": lambda _: contextlib.nullcontext(),
    },
}


class _Nothing(type):
    """The class of what stand-in modules hold: a name, a base class, a decorator, or a function without effect."""

    def __new__(cls, name: str, bases: tuple[type, ...] = (), body: dict[str, Any] | None = None) -> _Nothing:
        return super().__new__(cls, name, bases, body or {})

    def __getattr__(cls, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls

    def __getitem__(cls, _: Any) -> _Nothing:
        return cls

    def __bool__(cls) -> bool:
        return False

    def __or__(cls, _: Any) -> _Nothing:
        return cls

    __ror__ = __or__


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> _Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name)


class _Modules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An import hook: the modules of the manager are real, all others of vLLM are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, name: str, *_: Any) -> Any:
        if name.split(".")[0] != "vllm":
            return None
        if name in _REAL:
            path = self._folder.joinpath(*name.split(".")[1:])
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        module = _StandIn(spec.name)
        vars(module).update(_RUN.get(spec.name, {}))
        return module

    def exec_module(self, _: types.ModuleType) -> None:
        return


def find() -> Path:
    """Return the folder `vllm` of an unpacked wheel. Raises PeerMissing."""
    for home in (FOLDER, os.environ.get("FLATRADIX_PEERS", "")):
        folder = Path(home) / "vllm"
        if home and (folder / "v1" / "core" / "kv_cache_manager.py").is_file():
            return folder
    raise PeerMissing("vLLM is not unpacked: pip install --no-deps --target .peers vllm==0.33.0")


def load(name: str) -> Any:
    """Return a module of vLLM, such as "v1.request". Raises PeerMissing."""
    if "vllm" not in sys.modules:
        sys.meta_path.insert(0, _Modules(find()))
    try:
        return importlib.import_module(f"vllm.{name}")
    except (ImportError, AttributeError, TypeError) as error:
        raise PeerMissing(f"vLLM's {name} does not import: {error}") from error


class Manager:
    """A KVCacheManager for full attention, with blocks of `page` tokens. It serves one request at a time."""

    def __init__(self, slots: int, page: int, most: int) -> None:
        """most: the most tokens of a request. vLLM keeps one block to itself, which is added. Raises PeerMissing."""
        managers, specs = load("v1.core.kv_cache_manager"), load("v1.kv_cache_interface")
        spec = specs.FullAttentionSpec(block_size=page, num_kv_heads=1, head_size=1, dtype=torch.float16)
        group = specs.KVCacheGroupSpec(["layer"], spec)
        config = specs.KVCacheConfig(slots // page + 1, [], [group])
        self._manager = managers.KVCacheManager(config, most, scheduler_block_size=page, hash_block_size=page)
        self._page = page
        self._ids = itertools.count()

    def serve(self, prompt: Sequence[int]) -> int:
        """Run a request; return how many tokens of its prompt were cached."""
        tokens = np.asarray(prompt, np.int64)
        names = []
        name = b""
        for end in range(self._page, len(tokens) + 1, self._page):
            name = hashlib.sha256(name + tokens[end - self._page : end].tobytes()).digest()
            names.append(name)
        request = types.SimpleNamespace(
            request_id=str(next(self._ids)), block_hashes=names, num_tokens=len(tokens), num_computed_tokens=0,
            num_prompt_tokens=len(tokens), all_token_ids=tokens, lora_request=None, mm_features=[], cache_salt=None,
            skip_reading_prefix_cache=False, num_preemptions=0, shared_prefix_boundary=0, prompt_embeds=None,
            status=None, num_in_flight_tokens=0,
        )  # fmt: skip
        blocks, cached, *_ = self._manager.get_computed_blocks(request)
        if self._manager.allocate_slots(request, len(tokens) - cached, cached, blocks) is None:
            raise RuntimeError(f"{len(tokens)} tokens do not fit")
        request.num_computed_tokens = len(tokens)
        self._manager.free(request)
        return int(cached)
