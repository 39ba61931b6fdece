"""Prometheus metrics of a PrefixCache. Needs prometheus_client (pip install 'flatradix[prometheus]')."""

from __future__ import annotations

from collections.abc import Mapping

try:
    from prometheus_client.core import REGISTRY, CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError("flatradix.prometheus needs prometheus_client: pip install 'flatradix[prometheus]'") from error

from flatradix.cache.counts import Counts
from flatradix.cache.prefix_cache import PrefixCache

COUNTERS = {
    "requests": "Requests that were begun, refused ones left out",
    "refused": "Requests that did not fit",
    "prompt_tokens": "Tokens of the prompts of all requests",
    "cached_tokens": "Tokens of those prompts that were cached",
    "evicted_tokens": "Tokens that were evicted",
    "duplicate_tokens": "Tokens computed that another request had committed meanwhile",
    "shared_tokens": "Tokens of prompts that share the slots of another prompt that began with them",
}
SLOTS = ("free", "evictable", "protected", "held")


class CacheCollector(Collector):
    """The counters of caches as of the last `update`.

    Prometheus collects from its own thread, but a cache serves one thread at a time. So the thread that uses the caches
    calls `update`, as often as the counters should be fresh.
    """

    def __init__(self, caches: Mapping[str, PrefixCache]) -> None:
        self._caches = dict(caches)
        self.update()

    def update(self) -> None:
        """Read the counters of all caches. With an index on a GPU this waits for the device."""
        self._counts = {name: cache.counts() for name, cache in self._caches.items()}

    def describe(self) -> list[Metric]:
        """Return the metrics without values. A registry uses them to find duplicates."""
        return _metrics({})

    def collect(self) -> list[Metric]:
        return _metrics(self._counts)


def _metrics(counts: Mapping[str, Counts]) -> list[Metric]:
    running = GaugeMetricFamily("flatradix_running_requests", "Requests that hold slots", labels=["cache"])
    slots = GaugeMetricFamily("flatradix_slots", "KV slots, by where they are", labels=["cache", "where"])
    counters = {
        name: CounterMetricFamily(f"flatradix_{name}", text, labels=["cache"]) for name, text in COUNTERS.items()
    }
    for cache, found in counts.items():
        running.add_metric([cache], found.running)
        for where in SLOTS:
            slots.add_metric([cache, where], getattr(found, where))
        for name, counter in counters.items():
            counter.add_metric([cache], getattr(found, name))
    return [running, slots, *counters.values()]


def export(registry: CollectorRegistry = REGISTRY, **caches: PrefixCache) -> CacheCollector:
    """Register the counters of caches for export: `export(main=cache)` gives them the label cache="main".

    Call `update` of the returned collector from time to time, from the thread that uses the caches.

    Metrics: flatradix_{requests,refused,prompt_tokens,cached_tokens,evicted_tokens,duplicate_tokens,
    shared_tokens}_total, flatradix_running_requests, flatradix_slots{where="free" | "evictable" | "protected" |
    "held"}. To export other caches, first pass the collector to `registry.unregister`. Raises ValueError if the
    registry has these metrics.
    """
    collector = CacheCollector(caches)
    registry.register(collector)
    return collector
