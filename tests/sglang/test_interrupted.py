"""Interrupted calls of the SGLang backend: no slot is lost or freed twice, and each lock has a holder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from flatradix.errors import QueryError
from flatradix.inspect.nodes import nodes_of
from tests.support.depth import cuts
from tests.support.devices import interpreted
from tests.support.interrupts import bytecodes, fails_at, interrupt_at, skip_if_slow
from tests.support.sglang_engine import Plan, load_or_skip
from tests.support.sglang_home import Home

SGLANG = load_or_skip()
PAGE = 4
PLAN = Plan(page_size=PAGE, events=True)
FOLDER = "integrations/sglang"


class Scene:
    """Two requests with equal prompts, one of them cached, and further cached tokens that no request holds."""

    def __init__(self, device: str) -> None:
        self.home = home = Home(PLAN, device)
        self.cache = home.cache
        home.store(range(50, 70))
        home.store(range(80, 88))
        self.requests = [home.request(range(20), range(100, 112)) for _ in range(2)]
        self.first, self.second = self.requests
        self.cache.checkpoint(self.first, up_to=16)
        self.cache.checkpoint(self.first, up_to=24)
        self.node = home.match(range(50, 60)).last_device_node
        self.kept = self.cache.lock(home.match(range(80, 84)).last_device_node)
        self.cache.take_events()

    def row(self, req: Any) -> Any:
        return self.home.pool.req_to_token[req.kv.req_pool_idx]


ACTS: dict[str, Callable[[Scene], Any]] = {
    "match": lambda s: s.home.match(range(18)),
    "lock": lambda s: s.cache.lock(s.node),
    "inc_lock_ref": lambda s: s.cache.inc_lock_ref(s.node),
    "unlock": lambda s: s.cache.unlock(s.kept),
    "dec_lock_ref": lambda s: s.cache.dec_lock_ref(s.kept.node),
    "checkpoint": lambda s: s.cache.checkpoint(s.first, up_to=32),
    "checkpoint of what is there": lambda s: s.cache.checkpoint(s.second, up_to=28),
    "evict": lambda s: s.cache.evict(SGLANG.base.EvictParams(num_tokens=6)),
    "indices": lambda s: s.cache.path_device_indices(s.node),
}
LOCKS = {"lock": 1, "inc_lock_ref": 1, "unlock": -1, "dec_lock_ref": -1}  # locks that the caller has gained


def judge(scene: Scene, locks: int) -> None:
    """Check that each slot is cached, free or a request's own, and each lock belongs to a request or the caller."""
    home, tree = scene.home, scene.cache.tree
    tree.check()
    home.allocator.free(tree.evict(0).slots)  # as the next eviction does
    nodes = nodes_of(tree.content())
    free = [first * PAGE + at for first in home.allocator.get_all_free_pages().tolist() for at in range(PAGE)]
    own = [
        slot
        for req in scene.requests
        for slot in scene.row(req)[req.kv.cache_protected_len : req.kv.kv_allocated_len].tolist()
    ]
    counts = Counter([*free, *own, *(slot for node in nodes for slot in node.slots)])
    assert max(counts.values()) == 1
    assert len(counts) == home.allocator.size
    held = sum(req.lock.node.length > 0 for req in scene.requests)
    assert sum(node.own_locks for node in nodes) == held + 1 + locks
    for req in scene.requests:
        cached = scene.cache.path_device_indices(req.lock.node).tolist()
        assert scene.row(req)[: len(cached)].tolist() == cached
        assert len(cached) == req.kv.cache_protected_len
        scene.cache.checkpoint(req, up_to=32)  # the request can go on
        scene.cache.unlock(req.lock)
    tree.check()


@pytest.mark.parametrize("name", ACTS)
def test_at_many_bytecodes(name: str, device: str) -> None:
    """Bytecodes of the backend, except the last three, at which the call returns, and bytecodes of the tree."""
    for folder in (FOLDER, "")[: 1 if interpreted(device) else 2]:
        total = bytecodes(partial(ACTS[name], Scene(device)), folder) - 3
        for at in cuts(total, device, name):
            scene = Scene(device)
            cut = interrupt_at(at, partial(ACTS[name], scene), folder).where
            assert cut or device == "cuda"  # waits for the GPU vary, and with them the number of bytecodes
            judge(scene, 0)


@pytest.mark.parametrize("name", ACTS)
def test_at_every_allocation(name: str, device: str) -> None:
    skip_if_slow(device)
    for at in range(1000):
        scene = Scene(device)
        failed = fails_at(at, partial(ACTS[name], scene))
        judge(scene, 0 if failed else LOCKS.get(name, 0))
        if not failed:
            break


def test_a_refused_call_is_not_undone(device: str) -> None:
    """It has changed nothing. An index on a GPU knows that late."""
    scene = Scene(device)
    scene.cache.unlock(scene.kept)
    before = scene.cache.protected_size()
    for _ in range(2):
        with pytest.raises(QueryError, match="no lock ends"):
            scene.cache.dec_lock_ref(scene.kept.node)
    scene.cache.tree.raise_pending()
    assert scene.cache.protected_size() == before
    scene.cache.tree.check()
