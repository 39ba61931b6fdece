"""The report of a replay: figures, samples and latencies, and their form as JSON."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import numpy as np
import torch

from flatradix.inputs import devices
from flatradix.inputs.policy import order_of
from flatradix.version import VERSION

_JSON_SAMPLES = 100


@dataclass(frozen=True)
class Settings:
    """The settings of a replay. capacity: in tokens. hold: later requests for which a request keeps its path locked.

    batch: how many requests are matched, inserted and released together.
    """

    page_size: int = 64
    capacity: int = 1_000_000
    hold: int = 32
    policy: str = "lru"
    device: str = "auto"
    batch: int = 1

    def validate(self) -> None:
        """Raise ValueError for settings that make no sense, DeviceUnavailableError for the device."""
        if self.page_size < 1:
            raise ValueError(f"page size {self.page_size}: it must be 1 token or more")
        if self.capacity < self.page_size:
            raise ValueError(f"capacity {self.capacity} is less than one page of {self.page_size} tokens")
        if self.hold < 0:
            raise ValueError(f"hold {self.hold}: a request is held for 0 later requests or more")
        if self.batch < 1:
            raise ValueError(f"batch {self.batch}: it must be 1 request or more")
        order_of(self.policy)
        devices.candidates(self.device)


@dataclass
class Report:
    """The results of a replay. Arrays with one entry a request are in the order of the requests.

    prompt_lengths, hits: int64 [N], in tokens. cached, locked: int64 [N], tokens in the tree after each request.
    latencies: int64 ns of each call, by operation. On a GPU a call counts until the device is done with it.
    seconds: the whole replay, including the time to make the prompts. warm_up_seconds: compiling before the replay.
    digest: `RadixTree.digest()` of the final tree.
    """

    settings: Settings
    device: str
    requests: int
    input_tokens: int
    hit_tokens: int
    hits_sha256: str
    evicted_tokens: int
    rejected: int
    final_tokens: int
    nodes: int
    nbytes: int
    digest: str
    seconds: float
    warm_up_seconds: float
    prompt_lengths: np.ndarray
    hits: np.ndarray
    cached: np.ndarray
    locked: np.ndarray
    latencies: dict[str, np.ndarray]
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """The share of the prompt tokens that were found in the cache."""
        return self.hit_tokens / self.input_tokens if self.input_tokens else 0.0

    def operations(self) -> dict[str, dict[str, float]]:
        """Return calls, p50_us, p99_us, max_us and total_seconds of each operation that was called."""
        return {name: summarise(times) for name, times in self.latencies.items() if len(times)}

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data. Arrays are reduced to up to 100 samples, latencies to `operations`."""
        s = self.settings
        return {
            "page": s.page_size,
            "capacity": s.capacity,
            "hold": s.hold,
            "batch": s.batch,
            "policy": s.policy,
            "device": self.device,
            "requests": self.requests,
            "input_tokens": self.input_tokens,
            "hit_tokens": self.hit_tokens,
            "hits_sha256": self.hits_sha256,
            "evicted_tokens": self.evicted_tokens,
            "rejected": self.rejected,
            "final_tokens": self.final_tokens,
            "hit_rate": self.hit_rate,
            "nodes": self.nodes,
            "bytes": self.nbytes,
            "digest": self.digest,
            "seconds": self.seconds,
            "warm_up_seconds": self.warm_up_seconds,
            "operations": self.operations(),
            "samples": self._samples(),
            "versions": self.versions,
        }

    def _samples(self) -> dict[str, list[float]]:
        last = max(0, self.requests - 1)
        places = np.unique(np.linspace(0, last, min(self.requests, _JSON_SAMPLES)).astype(np.int64))
        return {
            "request": (places + 1).tolist(),
            "hit_rate": self.cumulative_hit_rate()[places].tolist(),
            "cached_tokens": self.cached[places].tolist(),
            "locked_tokens": self.locked[places].tolist(),
        }

    def cumulative_hit_rate(self) -> np.ndarray:
        """Return float64 [N]: the hit rate of all requests up to and including each."""
        return np.cumsum(self.hits) / np.maximum(1, np.cumsum(self.prompt_lengths))

    def windowed_hit_rate(self, window: int) -> np.ndarray:
        """Return float64 [N]: the hit rate of the `window` requests up to and including each, fewer at the start."""
        return _window_sums(self.hits, window) / np.maximum(1, _window_sums(self.prompt_lengths, window))


def summarise(times: np.ndarray) -> dict[str, float]:
    """Return the number of calls and the times of one operation, from int64 [K > 0] nanoseconds."""
    p50, p99 = np.percentile(times, [50, 99]) / 1e3
    return {
        "calls": len(times),
        "p50_us": float(p50),
        "p99_us": float(p99),
        "max_us": float(times.max() / 1e3),
        "total_seconds": float(times.sum() / 1e9),
    }


def versions() -> dict[str, str]:
    """Return the versions on which the figures of a replay depend, by name."""
    found = {
        "flatradix": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("numpy", "numba", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["platform"] = f"{platform.system()} {platform.machine()}"
    return found


def _window_sums(values: np.ndarray, window: int) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    return sums[ends] - sums[np.maximum(0, ends - window)]
