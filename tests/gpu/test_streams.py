"""Calls that do not wait, streams, CUDA graphs, and the ways to launch a kernel."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from flatradix import RadixTree, Ragged
from flatradix.layout import mail
from tests.support.devices import settled
from tests.support.inside import index_of, names_of
from tests.support.pairs import Pair, numbered, ragged, shared_prefixes, use

# Calls that do not wait


Calls = list[Callable[[], Any]]


def calls_that_do_not_wait(tree: RadixTree) -> Calls:
    """Return each operation that only enqueues, on input on the device or on short single keys."""
    keys = [[1, 2, 3, 4], [1, 2, 5], [6, 7, 8]]
    q, slots = ragged(keys, tree), ragged(numbered(keys), tree)
    table = torch.zeros((4, 8), dtype=torch.int32, device=tree.device)
    rows = torch.arange(3, device=tree.device)
    priority = torch.arange(3, device=tree.device)
    first, behind = q.values[:4], slots.values[:4] + 100  # no slot may be twice on a path
    out, wanted = torch.zeros(8, dtype=torch.int32, device=tree.device), torch.ones(1, dtype=int, device=tree.device)
    kept: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        kept[name] = value

    return [
        lambda: keep("inserted", tree.insert(q, slots, priority=priority)),
        lambda: keep("matched", tree.match(q)),
        lambda: keep("locked", tree.match(q, lock=True)),
        lambda: tree.unlock(kept["locked"]),
        lambda: tree.lock(kept["matched"]),
        lambda: tree.write_slots(kept["matched"], table, rows),
        lambda: tree.unlock(kept["matched"]),
        lambda: keep("more", tree.match(q, start=kept["inserted"], touch=False)),
        lambda: keep("single", tree.match([1, 2, 3, 9])),
        lambda: tree.lock(kept["single"]),
        lambda: tree.unlock(kept["single"]),
        lambda: keep("one", tree.match(first, lock=True)),
        lambda: tree.unlock(kept["one"]),
        lambda: tree.insert(first, behind, start=kept["one"]),
        lambda: tree.evict(1, out=out),
        lambda: tree.evict(wanted, out=out),
    ]


def calls_with_host_input(tree: RadixTree) -> Calls:
    """Return calls on batches in host memory, which go through pinned memory."""
    keys = [[1, 2, 3, 4], [1, 2, 5], [6, 7, 8]]
    long = list(range(40_000))
    table = torch.zeros((4, 8), dtype=torch.int32, device=tree.device)
    return [
        lambda: tree.insert(keys, numbered(keys), namespace=["a", None, "b"], priority=[1, 2, 3]),
        lambda: tree.insert([1, 2, 3], torch.tensor([7, 8, 9]), inserted_lengths=2),
        lambda: tree.insert(long, long),
        lambda: tree.match(keys, namespace=["a", "b", "c"]),
        lambda: tree.match(long),
        lambda: tree.match(Ragged.from_sequences(keys)),
        lambda: tree.write_slots(tree.match(keys), table, [2, 0, 1]),
    ]


def quiet(call: Callable[[], Any]) -> None:
    """Run a call; torch raises an error if the call waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("make", [calls_that_do_not_wait, calls_with_host_input])
def test_no_call_synchronises(gpu: str, make: Callable[[RadixTree], Calls]) -> None:
    tree = RadixTree(100_000, device=gpu)
    for call in make(tree):  # compiles kernels, and fills the caches of the allocators
        call()
    tree.raise_pending()
    for call in make(tree):
        quiet(call)
    tree.check()


def test_no_call_waits_for_the_device(gpu: str) -> None:
    """The device is kept busy meanwhile. This also shows waits for the mailbox, which torch does not see."""
    tree = RadixTree(1000, device=gpu)
    for _ in range(2):
        for call in calls_that_do_not_wait(tree):
            call()
    calls = calls_that_do_not_wait(tree)
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)
    busy.record()
    for number, call in enumerate(calls):
        call()
        assert not busy.query(), f"call {number} waited for the device"
    tree.check()
    assert busy.query()


def test_a_tree_may_go_while_its_calls_are_under_way(gpu: str) -> None:
    """Pinned memory that its kernels still write to is not reused before they finish."""
    tree = RadixTree(64, device=gpu)
    for _ in range(3):
        tree.insert([[1, 2]], [[1, 2]])
        tree.match([1, 2])
    tree.raise_pending()
    torch.cuda._sleep(1_000_000_000)
    tree.insert([[1, 2, 3]], [[1, 2, 3]])
    tree.match([1, 2])
    del tree
    others = [torch.full((mail.SIZE,), 7, pin_memory=True) for _ in range(8)]
    torch.cuda.synchronize()
    assert all((other == 7).all() for other in others)


def test_pinned_batches_are_read_where_they_are(gpu: str) -> None:
    tree = RadixTree(64, device=gpu)
    q = Ragged(torch.tensor([1, 2, 3, 1, 2]).pin_memory(), torch.tensor([0, 3, 5]).pin_memory())
    single = torch.tensor([1, 2, 3, 4]).pin_memory()
    for _ in range(3):
        assert tree.insert(q, q).lengths.tolist() == [3, 2]
        assert tree.match(q).lengths.tolist() == [3, 2]
        assert tree.match(single).length == 3
    tree.check()


# Streams and graphs


def test_two_streams(gpu: str) -> None:
    pair = Pair(gpu, 4000)
    one, other = torch.cuda.Stream(), torch.cuda.Stream()
    one.wait_stream(torch.cuda.current_stream())
    for turn in range(50):
        keys = shared_prefixes(20, turn)
        with torch.cuda.stream(one):
            inserted = pair.tree.insert(keys, numbered(keys))
        other.wait_event(one.record_event())
        with torch.cuda.stream(other):
            locked = pair.tree.match(keys, lock=True)
            single = pair.tree.match(keys[0] or [7])
        one.wait_event(other.record_event())
        with torch.cuda.stream(one):
            if turn % 2:
                pair.tree.unlock(locked)
            freed = pair.tree.evict(30).slots.tolist()
        host = pair.host.insert(keys, numbered(keys))
        host_locked = pair.host.match(keys, lock=True)
        assert single.length == pair.host.match(keys[0] or [7]).length
        if turn % 2:
            pair.host.unlock(host_locked)
        assert freed == pair.host.evict(30).slots.tolist()
        assert inserted.lengths.tolist() == host.lengths.tolist()
        assert locked.lengths.tolist() == host_locked.lengths.tolist()
        assert pair.tree.protected_tokens == pair.host.protected_tokens
    torch.cuda.current_stream().wait_stream(one)
    torch.cuda.current_stream().wait_stream(other)
    pair.compare()


def fixed_shape(seed: int, count: int) -> list[list[int]]:
    """Return random keys of 6 tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(3) for _ in range(6)] for _ in range(count)]


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call. An error of the call is raised, not one about the capture that it leaves."""
    graph, failed, result = torch.cuda.CUDAGraph(), [], None
    with contextlib.suppress(RuntimeError), torch.cuda.graph(graph):
        try:
            result = call()
        except Exception as error:
            failed.append(error)
    if failed:
        raise failed[0]
    return graph, result


@pytest.mark.parametrize("count", [4, 40])  # locks of more than 8 places take two launches, one of them cooperative
@pytest.mark.parametrize("at_once", [False, True])
def test_graphs(gpu: str, at_once: bool, count: int) -> None:
    """Match, lock and unlock are captured once, and replayed after the tensors got new contents."""
    pair = Pair(gpu, 1000)
    for seed in range(5):
        pair.insert(fixed_shape(seed, count), numbered(fixed_shape(seed, count)))
    q = ragged(fixed_shape(0, count), pair.tree)

    def enter(tree: RadixTree, keys: Any) -> Any:
        found = tree.match(keys, lock=at_once)
        if not at_once:
            tree.lock(found)
        return found

    pair.tree.unlock(enter(pair.tree, q))  # compiles
    pair.host.unlock(enter(pair.host, fixed_shape(0, count)))
    entering, found = captured(lambda: enter(pair.tree, q))
    leaving, _ = captured(lambda: pair.tree.unlock(found))
    for seed in (3, 1, 11, 4, 12):
        keys = fixed_shape(seed, count)
        q.values.copy_(torch.tensor([token for key in keys for token in key]))
        host = enter(pair.host, keys)
        entering.replay()
        assert pair.tree.protected_tokens == pair.host.protected_tokens > 0
        assert found.lengths.tolist() == host.lengths.tolist()
        pair.compare()
        assert pair.tree.slots(found).to_list() == pair.host.slots(host).to_list()
        pair.host.unlock(host)
        leaving.replay()
        assert pair.tree.protected_tokens == 0
        pair.compare()
        pair.insert([[*keys[0], seed]], numbered([[*keys[0], seed]]))
        pair.evict(3)
    q.values[6] = -1
    entering.replay()
    with pytest.raises(ValueError, match="match: query 1: the token at position 0"):
        pair.tree.raise_pending()
    pair.compare()


def test_a_graph_needs_scratch_for_its_batch(gpu: str) -> None:
    tree = RadixTree(10_000, device=gpu)
    q = ragged([[1]] * 2000, tree)
    settled(tree, lambda: tree.match(ragged([[1]] * 10, tree)))
    with pytest.raises(RuntimeError, match="run a batch of 2000 once before a CUDA graph is captured with it"):
        captured(lambda: tree.match(q))
    settled(tree, lambda: tree.match(q))
    graph, found = captured(lambda: tree.match(q))
    tree.insert([1], [1])
    graph.replay()
    assert tree.total_tokens == 1
    assert found.lengths.tolist() == [1] * 2000


def test_a_single_key_in_a_graph(gpu: str) -> None:
    tree = RadixTree(64, device=gpu)
    tree.insert([1, 2, 3, 4], [1, 2, 3, 4])
    key = torch.tensor([1, 2, 9], device=tree.device)
    settled(tree, lambda: tree.match([[1]]))
    settled(tree, lambda: tree.match(ragged([[1]], tree)))
    graph, found = captured(lambda: tree.match(key))
    for tokens, length in (([1, 2, 9], 2), ([7, 7, 7], 0), ([1, 2, 3], 3)):
        key.copy_(torch.tensor(tokens))
        graph.replay()
        tree.raise_pending()
        assert found.lengths.tolist() == [length]


def test_what_a_graph_cannot_hold(gpu: str) -> None:
    tree = RadixTree(64, device=gpu)
    q = ragged([[1], [2]], tree)
    beside = RadixTree(64, device="cpu", slot_device=gpu)
    place = beside.insert([1, 2], [3, 4])
    table = torch.zeros((1, 2), dtype=torch.int32, device=gpu)
    there = torch.arange(3, device=gpu)
    grows = RadixTree(device=gpu)
    told = RadixTree(64, device=gpu, on_evict=print)
    out = torch.zeros(64, dtype=torch.int32, device=gpu)
    on_the_cpu = "cannot hold a call of a tree on the CPU"
    for call, message in (
        (lambda: tree.match([1, 2]), "cannot hold inputs in host memory"),
        (lambda: tree.match([[1], [2]]), "cannot hold inputs in host memory"),
        (lambda: tree.match(q, namespace="a"), "cannot hold a namespace"),
        (lambda: tree.match([torch.tensor([1]), there]), "cannot hold inputs in host memory"),
        (lambda: tree.insert(q, q, namespace="a"), "cannot hold a namespace"),
        (lambda: tree.insert([1, 2], there[:2]), "cannot hold inputs in host memory"),
        (lambda: tree.insert(q, [[1], [2]]), "cannot hold inputs in host memory"),
        (lambda: grows.insert(q, q), "a tree without max_tokens, as that may grow"),
        (lambda: tree.evict(1), "give evict a tensor for them, out="),
        (lambda: told.evict(1, out=out), "a tree with on_evict"),
        (lambda: tree.total_tokens, "cannot hold a call that waits for the device"),
        (tree.raise_pending, "cannot hold a call that waits for the device"),
        (lambda: tree.slots(q), "cannot hold a call that waits for the device"),
        (tree.reset, "cannot hold a reset"),
        (lambda: beside.slots(place), on_the_cpu),
        (lambda: beside.write_slots(place, table, [0]), on_the_cpu),
        (lambda: beside.write_slots(place, table, there[:1]), on_the_cpu),
        (lambda: beside.insert([1, 2, 3], there), on_the_cpu),
        (lambda: beside.insert([1, 2, 3], [1, 2, 3]), on_the_cpu),
        (lambda: beside.evict(1), on_the_cpu),
        (lambda: beside.evict(1, out=out), on_the_cpu),
    ):
        with pytest.raises(RuntimeError, match=message):
            captured(call)
    assert tree.insert(q, q).lengths.tolist() == [1, 1]
    tree.check()
    assert beside.slots(beside.match([1, 2, 3])).to_list() == [[3, 4]]
    beside.check()


# Launching


def test_each_call_may_be_the_first_of_its_thread(gpu: str) -> None:
    """A new thread has no current CUDA context. Launches are direct here, so Triton does not make one current."""
    tree = RadixTree(64, device=gpu)
    slots = torch.arange(3, device=tree.device)
    table, rows = torch.zeros((1, 8), dtype=torch.int32, device=tree.device), torch.zeros(1, dtype=int, device=gpu)
    for _ in range(3):
        place = tree.insert([1, 2, 3], slots)
        tree.lock(place)
        tree.unlock(place)
        tree.write_slots(place, table, rows)
        tree.match([1, 2, 3])
    with ThreadPoolExecutor(1) as thread:
        thread.submit(tree.lock, place).result()
    for call in (
        lambda: tree.unlock(place),
        lambda: tree.write_slots(place, table, rows),
        lambda: tree.match([1, 2, 3]),
        lambda: tree.insert([1, 2, 3], slots),
        lambda: tree.evict(1),
    ):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(call).result()
    assert tree.total_tokens == 0
    tree.check()


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_insert_leaves_nothing_behind(cuda: str, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its launches in turn is the interrupted one."""
    from flatradix.kernels.gpu.launch import Kernel

    launch, launches = Kernel.__call__, []

    def interrupt(*arguments: Any) -> None:
        launches.append(arguments[0])
        if len(launches) > done:
            raise KeyboardInterrupt
        launch(*arguments)

    pair = Pair(cuda, 64)
    keys = [[1, 2, 3], [1, 2, 4], [1, 5]]
    pair.insert([[1, 2, 3, 6]], [[1, 2, 3, 6]])
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "__call__", interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            pair.tree.insert([*keys, [-1]], numbered([*keys, [-1]]), namespace=["new", None, None, None])
    if len(launches) <= done:
        pytest.skip(f"an insert has {len(launches)} launches")
    pair.compare()
    assert len(names_of(pair.tree)) == 1
    use(pair, keys)


def test_a_launch_that_never_was(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that waits for its numbers gets an error instead of waiting forever."""
    from flatradix.kernels.gpu.launch import Kernel

    tree = RadixTree(64, device=cuda)
    tree.insert([[1, 2]], [[1, 2]])
    index_of(tree)._arrays.direct.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Kernel, "__call__", lambda *arguments: None)
        result = tree.match([1, 2])
        for wait in (tree.raise_pending, lambda: result.length):
            with pytest.raises(RuntimeError, match="has not told its numbers: its launch failed or was interrupted"):
                wait()
    assert tree.match([1, 2]).length == 2
    tree.check()


@pytest.mark.parametrize("missing", ["_launcher", "_direct_launch"])
def test_the_public_ways_to_launch_do_the_same(gpu: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flatradix.kernels.gpu import launch

    def variants() -> list[launch.Variant]:
        return [variant for kernel in launch.Kernel.all_kernels for variant in kernel.variants]

    keys = shared_prefixes(200)
    for variant in variants():
        monkeypatch.setattr(variant, "compiled", {})
    pair = Pair(gpu, 4000)
    for _ in range(2):
        use(pair, keys)
    assert index_of(pair.tree)._arrays.direct, "nothing is launched directly: Triton or the driver has changed"
    monkeypatch.setattr(launch, missing, lambda *arguments: None)
    for variant in variants():
        monkeypatch.setattr(variant, "compiled", {})
    pair = Pair(gpu, 4000)
    for _ in range(2):
        use(pair, keys)
    assert not index_of(pair.tree)._arrays.direct
    assert any(variant.compiled for variant in variants()) == (missing != "_launcher")
