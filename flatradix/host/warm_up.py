"""Warm-up of a tree in host memory: compiles its kernels, or reads them from disk."""

from __future__ import annotations

import io

import numpy as np
import torch

from flatradix.cache.columns import Columns
from flatradix.errors import QueryError
from flatradix.inputs.sequences import address_of
from flatradix.kernels import cpu
from flatradix.layout.growth import FIRST_TOKENS
from flatradix.layout.state import allocate_host
from flatradix.layout.waiting import allocate_waiting
from flatradix.tree import RadixTree


def warm_up_host(slot_device: str | torch.device | None) -> None:
    """Run every operation once on a small tree. Trees on a CPU use the same compiled kernels whatever their options."""
    tree = RadixTree(16, page_size=2, device="cpu")
    one = tree.insert([1, 2, 3, 4], [0, 1, 2, 3])
    found = tree.match([1, 2, 9])
    tree.lock(found)
    tree.slots(found)
    tree.unlock(found)
    tree.insert([5, 6], [4, 5], start=one)
    several = tree.insert([[1, 2], [7, 8]], [[0, 1], [6, 7]])
    tree.lock(several)
    tree.split(tree.match([[1, 2], [7, 8]]))
    tree.slots(several)
    tree.write_slots(several, torch.zeros((2, 2), dtype=torch.int32, device="cpu"), [0, 1])
    tree.unlock(several)
    tree.drop(several)
    tree.evict(2)
    tree.digest()
    file = io.BytesIO()
    tree.save(file)
    file.seek(0)
    RadixTree.load(file, device="cpu").reset()
    grow(RadixTree(page_size=2, device="cpu"))
    _take_back()
    use_queue(RadixTree(16, page_size=2, device="cpu"))
    use_cache("cpu", "cpu", 2)
    _use_slots_apart(RadixTree(16, page_size=2, device="cpu", slot_device=slot_device or "cpu"))


def grow(tree: RadixTree) -> None:
    """Insert more than fits into the first arrays of a tree without `max_tokens`."""
    key = np.zeros(2 * FIRST_TOKENS, np.int64)
    tree.insert(key, key)


def use_queue(tree: RadixTree) -> None:
    """Run every operation of a waiting queue beside an empty tree."""
    from flatradix.queue.orders import NAMES
    from flatradix.queue.waiting_queue import WaitingQueue

    queue = WaitingQueue(tree, keep=True)
    key = list(range(2 * tree.page_size + tree.bigram))
    places = tree.insert([key], [key], "a")
    tree.alive(places)
    tree.rematch([key], places)
    tree.want(places)
    tree.unwant(places)
    queue.add(key)
    queue.add([key] * 70, ["a"] * 70, priority=[0, *[1] * 69])  # more than the first arrays hold
    queue.add(np.zeros(5000, np.int64))  # and than the first pool
    for policy in NAMES:
        queue.order(policy, defer_shared=True)
    queue.order("lpm")
    queue.turns()
    queue.plan()
    queue.plan(queue.ids())
    tree.evict(1)
    queue.remove(0)
    queue.remove(queue.ids()[:2])
    queue.shared_lengths()
    try:
        queue.add([-1])
    except QueryError:  # the kernel that finds the bad token
        queue.close()


def use_cache(device: str | torch.device, kv_device: str | torch.device, page: int) -> None:
    """Run every operation of a PrefixCache, with and without namespaces, on one request and on several."""
    from flatradix.cache.prefix_cache import PrefixCache

    cache = PrefixCache(32 * page, page, max_requests=8, max_length=8 * page, kv_device=kv_device, device=device)
    stem = list(range(2 * page))
    prompts = [[*stem, 1], [*stem, 2], [*stem[:page], *[7] * page, 3]]
    for names in (None, ["a", "b", "a"]):
        for count in (1, 3):
            requests = cache.begin(prompts[:count], names[:count] if names else None)
            cache.commit(requests[:1], page)  # then the requests have committed different lengths
            cache.commit(requests)
            cache.extend(requests)
            cache.finish(requests)
    shared = cache.begin([[9] * (2 * page + 1)] * 2, share=True)
    cache.probe(prompts)
    cache.commit(shared)
    cache.step(shared, [1, 2], page)
    cache.abort(cache.fork(shared[0], 1)[0])
    cache.finish(shared, touch=True)
    twins = cache.begin([[8] * (2 * page + 1)] * 2)  # both compute the same
    cache.commit(twins)
    cache.abort(twins)
    cache.begin([[6 + at] * (8 * page) for at in range(4)])  # evicts
    cache.counts()
    cache.tree.compact()


def _take_back() -> None:
    """Run the kernels that only an interrupted call, a queue beside a GPU, and a cache on a GPU need."""
    queue = allocate_waiting(0)  # named, so that it outlives the call
    addresses = cpu.waiting_table(queue)
    cpu.clear_todo(address_of(addresses))
    state = allocate_host(2, 1, False, 0)  # named, so that it outlives the call
    table = cpu.address_table(state)
    nothing = np.empty(0, np.int32)
    no_rows = nothing.astype(np.int64)
    cpu.take_back_insert(address_of(table), nothing, nothing, no_rows)
    columns = Columns(1, 1, 1)
    columns.complete()
    cpu.start_requests(columns.address, *[no_rows] * 6)
    cpu.begin_commit(columns.address, no_rows, no_rows, no_rows, np.empty((4, 0), np.int64))
    cpu.end_commit(columns.address, no_rows, no_rows)
    cpu.end_requests(columns.address, no_rows)
    cpu.count_changes.call(columns.address, *[no_rows] * 3)
    cpu.pack_changes.call(columns.address, *[no_rows] * 3, address_of(no_rows), address_of(nothing))
    cpu.write_pages(address_of(table), columns.address, no_rows, nothing, no_rows)


def _use_slots_apart(tree: RadixTree) -> None:
    places = tree.insert([[1, 2], [3, 4]], [[0, 1], [2, 3]])
    table = torch.zeros((2, 2), dtype=torch.int32, device=tree.slot_device)
    tree.slots(places)
    tree.path_slots(tree.match([1, 2]))
    tree.write_slots(places, table, [0, 1])
    tree.compact()
    tree.evict(2)
