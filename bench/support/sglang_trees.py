"""SGLang's prefix caches without its server: the Python `RadixCache`, and the default tree with its Rust core.

`find` looks for SGLang among the installed packages, then in the folder `.peers` at the repository root, then in the
folder that the environment variable FLATRADIX_PEERS names. To fill such a folder:
`pip install --no-deps --target FOLDER sglang==0.5.23`. The caches need the first two packages of
`requirements/peers.txt`. Their modules import much more (KV pools, layers, the server's web stack, Triton), which the
caches never run. Stand-ins replace it during the import; a stand-in raises when its truth value is used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import types
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.support.stand_ins import StandIns, missing

VERSION = "0.5.23"
FOLDER = Path(__file__).resolve().parents[2] / ".peers"
HINT = (
    f"pip install --no-deps --target .peers sglang=={VERSION} && pip install -r requirements/peers.txt, "
    "at the repository root"
)

# SGLang's own modules that the trees import but never run.
_UNUSED = (
    "sglang.kernels",
    "sglang.srt.configs",
    "sglang.srt.distributed",
    "sglang.srt.layers",
    "sglang.srt.managers",
    "sglang.srt.mem_cache.memory_pool",
    "sglang.srt.observability.metrics_collector",
    "sglang.srt.server_args",
)
# Packages that SGLang's modules import and the trees never use. An installed package gets no stand-in.
_OPTIONAL = (
    "PIL",
    "orjson",
    "psutil",
    "pybase64",
    "pydantic",
    "pydantic_core",
    "requests",
    "starlette",
    "torchcodec",
    "triton",
    "zmq",
)


class PeerMissing(RuntimeError):
    """Raised if SGLang cannot run here. The message says why, and what to install."""


class Classes(NamedTuple):
    """SGLang's classes under their own names. radix_module: the module of the Python tree, to replace its clock."""

    CacheInitParams: Any
    ComponentType: Any
    EvictParams: Any
    InsertParams: Any
    MatchPrefixParams: Any
    RadixCache: Any
    RadixKey: Any
    UnifiedRadixCache: Any
    radix_module: Any


def find() -> Path:
    """Return the folder of the package `sglang`. Raises PeerMissing."""
    places = []
    spec = None
    with contextlib.suppress(ValueError):  # a stand-in of a test, which was imported by that name
        spec = importlib.util.find_spec("sglang")
    if spec is not None:
        places += [Path(place) for place in spec.submodule_search_locations or ()]
    places.append(FOLDER / "sglang")
    if "FLATRADIX_PEERS" in os.environ:
        places.append(Path(os.environ["FLATRADIX_PEERS"]) / "sglang")
    for place in places:
        if (place / "srt" / "mem_cache" / "radix_cache.py").is_file():
            return place
    raise PeerMissing(f"SGLang is not installed ({HINT})")


def _import_caches() -> Classes:
    base = importlib.import_module("sglang.srt.mem_cache.base_prefix_cache")
    radix = importlib.import_module("sglang.srt.mem_cache.radix_cache")
    params = importlib.import_module("sglang.srt.mem_cache.cache_init_params")
    unified = importlib.import_module("sglang.srt.mem_cache.unified_radix_cache")
    component = importlib.import_module("sglang.srt.mem_cache.unified_cache.component_type")
    return Classes(
        CacheInitParams=params.CacheInitParams,
        ComponentType=component.ComponentType,
        EvictParams=base.EvictParams,
        InsertParams=base.InsertParams,
        MatchPrefixParams=base.MatchPrefixParams,
        RadixCache=radix.RadixCache,
        RadixKey=radix.RadixKey,
        UnifiedRadixCache=unified.UnifiedRadixCache,
        radix_module=radix,
    )


@functools.cache
def load() -> Classes:
    """Import SGLang's caches and return their classes. Raises PeerMissing with the reason if that fails.

    If the process has imported `sglang` before, that package stays. Otherwise a bare package `sglang` without its front
    end stays behind. A later import of a module that had a stand-in then loads the real module.
    """
    if "sglang" in sys.modules:
        return _import_caches()
    folder = find()
    package = types.ModuleType("sglang")
    package.__path__ = [str(folder)]
    sys.modules["sglang"] = package
    try:
        with StandIns([*_UNUSED, *missing(_OPTIONAL)]):
            classes = _import_caches()
            # If the core does not load, RustTree raises PeerMissing later.
            with contextlib.suppress(ImportError, RuntimeError, OSError):
                importlib.import_module("sglang.srt.mem_cache.rust_tree_core.adapter")
            return classes
    except ImportError as error:
        for name in [name for name in sys.modules if name == "sglang" or name.startswith("sglang.")]:
            del sys.modules[name]
        raise PeerMissing(f"SGLang in {folder} does not import: {error} ({HINT})") from error


class Recorder:
    """The allocator of a tree without a KV pool: records the freed slots in order.

    keep: a benchmark sets it to False, so that the memory of freed slots is released at once, as with a real allocator.
    """

    device = torch.device("cpu")

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.freed: list[torch.Tensor] = []

    def free(self, slots: torch.Tensor) -> None:
        if self.keep:
            self.freed.append(slots)

    def free_segment(self, slots: torch.Tensor, start_pos: int = 0) -> None:
        if self.keep:
            self.freed.append(slots)

    def available_size(self) -> int:
        return 0

    def take(self) -> torch.Tensor:
        """Return all slots that were freed since the last call, int64 [K]."""
        freed, self.freed = self.freed, []
        return torch.cat(freed) if freed else torch.empty(0, dtype=torch.int64)


class _Tree:
    """The common methods of both trees. cache: SGLang's object. classes: SGLang's parameter classes."""

    cache: Any

    def __init__(self) -> None:
        self.classes = load()
        self.allocator = Recorder()

    def key(self, tokens: array[int], namespace: str | None = None) -> Any:
        return self.classes.RadixKey(tokens, extra_key=namespace)

    def match(self, key: array[int], namespace: str | None = None) -> tuple[int, Any]:
        """Return (matched length, node). Splits the edge if the match ends inside it."""
        result = self.cache.match_prefix(self.classes.MatchPrefixParams(key=self.key(key, namespace)))
        return result.device_prefix_len, result.last_device_node

    def lock(self, node: Any) -> Any:
        return self.cache.lock(node)

    def unlock(self, token: Any) -> None:
        self.cache.unlock(token)

    def insert(
        self,
        key: array[int],
        slots: torch.Tensor,
        namespace: str | None = None,
        priority: int = 0,
        inserted_len: int = 0,
    ) -> int:
        """Insert a key; return the length that was cached before. slots: int64 [len(key)]."""
        params = self.classes.InsertParams(
            key=self.key(key, namespace), value=slots, priority=priority, inserted_len=inserted_len
        )
        return self.cache.insert(params).prefix_len

    def evict(self, num_tokens: int) -> torch.Tensor:
        """Evict nodes; return their slots, int64 [K], in the order in which SGLang frees them."""
        self.allocator.take()
        self.cache.evict(self.classes.EvictParams(num_tokens=num_tokens))
        return self.allocator.take()

    def slots(self, node: Any) -> torch.Tensor:
        return self.cache.path_device_indices(node)

    @property
    def evictable(self) -> int:
        return self.cache.evictable_size()

    @property
    def protected(self) -> int:
        return self.cache.protected_size()


class PythonTree(_Tree):
    """SGLang's `RadixCache`."""

    def __init__(self, page_size: int, policy: str = "lru", is_eagle: bool = False) -> None:
        super().__init__()
        params = self.classes.CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            eviction_policy=policy,
            is_eagle=is_eagle,
        )
        self.cache = self.classes.RadixCache(params)


class RustTree(_Tree):
    """SGLang's default, `UnifiedRadixCache` over the Rust core. Raises PeerMissing if the core does not load."""

    def __init__(self, page_size: int, policy: str = "lru") -> None:
        super().__init__()
        params = self.classes.CacheInitParams(
            disable=False,
            req_to_token_pool=None,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            eviction_policy=policy,
            tree_components=(self.classes.ComponentType.FULL,),
            tree_core_backend="rust",
        )
        try:
            self.cache = self.classes.UnifiedRadixCache(params)
        except (ImportError, OSError) as error:
            raise PeerMissing(f"SGLang's Rust tree core does not load: {error}") from error
        core = type(self.cache.tree_core).__name__
        if core != "RustUnifiedTreeCore":
            raise PeerMissing(
                f"SGLang fell back to {core}: its Rust tree core does not run with torch {torch.__version__}"
            )
