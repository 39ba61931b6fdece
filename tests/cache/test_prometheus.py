"""The counters as Prometheus sees them."""

from __future__ import annotations

import pytest

from flatradix import PrefixCache

pytest.importorskip("prometheus_client", reason="prometheus_client is not installed")

from prometheus_client import CollectorRegistry, generate_latest

from flatradix.prometheus import export


def test_a_registry_tells_the_counters() -> None:
    cache, registry = PrefixCache(32, page_size=4), CollectorRegistry()
    exported = export(registry, e1=cache)
    cache.finish(cache.begin([list(range(9))]))
    cache.begin([list(range(9)), list(range(100))])
    assert registry.get_sample_value("flatradix_requests_total", {"cache": "e1"}) == 0, "as it was at the last update"
    exported.update()
    lines = generate_latest(registry).decode().splitlines()
    for line in (
        'flatradix_requests_total{cache="e1"} 2.0',
        'flatradix_refused_total{cache="e1"} 1.0',
        'flatradix_prompt_tokens_total{cache="e1"} 18.0',
        'flatradix_cached_tokens_total{cache="e1"} 8.0',
        'flatradix_running_requests{cache="e1"} 1.0',
        'flatradix_slots{cache="e1",where="free"} 20.0',
        'flatradix_slots{cache="e1",where="protected"} 8.0',
        'flatradix_slots{cache="e1",where="held"} 4.0',
    ):
        assert line in lines


def test_several_caches_in_one_registry() -> None:
    registry, caches = CollectorRegistry(), {"a": PrefixCache(8), "b": PrefixCache(9)}
    both = export(registry, **caches)
    for name, free in (("a", 8), ("b", 9)):
        assert registry.get_sample_value("flatradix_slots", {"cache": name, "where": "free"}) == free
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        export(registry, c=PrefixCache(8))
    registry.unregister(both)
    export(registry, c=PrefixCache(7))
    assert registry.get_sample_value("flatradix_slots", {"cache": "c", "where": "free"}) == 7
