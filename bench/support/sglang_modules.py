"""SGLang's scheduler without its server and without a GPU: the real requests, pools, allocators, policies and caches.

`load` imports the real SGLang, with the packages of requirements/peers.txt. Only packages for images and notebooks are
replaced by stand-ins. `bench/support/sglang_trees.py` imports less and uses more stand-ins. The first of the two that a
process loads decides, so load this one first.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import types
import warnings
from typing import Any

from bench.support.sglang_trees import HINT, PeerMissing, find
from bench.support.stand_ins import StandIns, missing

_PICTURES = ("IPython", "torchvision")
_MODULES = {
    "allocator": "sglang.srt.mem_cache.allocator",
    "base": "sglang.srt.mem_cache.base_prefix_cache",
    "common": "sglang.srt.mem_cache.common",
    "component_type": "sglang.srt.mem_cache.unified_cache.component_type",
    "context": "sglang.srt.runtime_context",
    "events": "sglang.srt.disaggregation.kv_events",
    "page_interleave": "sglang.srt.mem_cache.allocator.page_interleave",
    "paged": "sglang.srt.mem_cache.allocator.paged",
    "params": "sglang.srt.mem_cache.cache_init_params",
    "plugins": "sglang.srt.plugins",
    "policy": "sglang.srt.managers.schedule_policy",
    "pools": "sglang.srt.mem_cache.memory_pool",
    "radix": "sglang.srt.mem_cache.radix_cache",
    "registry": "sglang.srt.mem_cache.registry",
    "requests": "sglang.srt.managers.schedule_batch",
    "sampling": "sglang.srt.sampling.sampling_params",
    "speculative": "sglang.srt.speculative.spec_info",
    "token": "sglang.srt.mem_cache.allocator.token",
    "unified": "sglang.srt.mem_cache.unified_radix_cache",
}


@functools.cache
def load() -> Any:
    """Import SGLang, install a default configuration, and return its modules under short names. Raises PeerMissing."""
    if "sglang" in sys.modules and "sglang.srt.mem_cache.memory_pool" not in sys.modules:
        raise PeerMissing("SGLang was imported with stand-ins before: import bench.support.sglang_modules first")
    folder = find()
    if "sglang" not in sys.modules:
        package = types.ModuleType("sglang")
        package.__path__ = [str(folder)]
        sys.modules["sglang"] = package
        sys.path.append(str(folder.parent))  # for the package `kernels`, which SGLang imports too
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # transformers remembers whether torchvision is installed: it must look before the stand-in exists.
            importlib.import_module("transformers.utils").is_torchvision_available()
            with StandIns(missing(_PICTURES)):
                modules = {name: importlib.import_module(path) for name, path in _MODULES.items()}
            modules["context"].get_context().override_server_args().install()
    except ImportError as error:
        for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
            del sys.modules[name]
        raise PeerMissing(f"SGLang in {folder} does not import: {error} ({HINT})") from error
    return types.SimpleNamespace(**modules)
