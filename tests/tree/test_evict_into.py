"""Evictions into a tensor of the caller, and evictions of which the host learns late how much they free."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatradix import RadixTree, WaitingQueue
from flatradix.device.calls import Calls
from tests.support.depth import cuts
from tests.support.devices import interpreted, settled
from tests.support.inside import index_of, names_of
from tests.support.interrupts import bytecodes, interrupt_at
from tests.support.pairs import Pair, numbered, ragged


def make(device: str, **options: Any) -> RadixTree:
    """Return a tree with three nodes of 6, 4 and 2 tokens, of which the first goes first."""
    tree = RadixTree(64, 2, device, **options)
    for first, length in ((10, 6), (20, 4), (30, 2)):
        tree.insert([list(range(first, first + length))], [list(range(first, first + length))])
    tree.raise_pending()
    return tree


def space_for(tree: RadixTree, count: int) -> torch.Tensor:
    return torch.full((count,), -7, dtype=tree.slot_dtype, device=tree.device)


def test_the_result(device: str) -> None:
    tree = make(device)
    out = space_for(tree, 12)
    result = tree.evict(7, out=out)
    assert result.slots is out
    assert out.tolist() == [10, 11, 12, 13, 14, 15, 20, 21, 22, 23, -7, -7]
    assert (result.num_tokens.item(), result.num_nodes.item()) == (10, 2)
    for number in (result.num_tokens, result.num_nodes):
        assert (number.dtype, number.shape, number.device) == (torch.int64, (), tree.device)
    assert tree.last_result is result
    assert tree.total_tokens == 2
    tree.check()


@pytest.mark.parametrize("evict_by", ["node", "page"])
def test_too_little_space(device: str, evict_by: str) -> None:
    """Nothing goes, whatever is lacking; then just enough suffices."""
    tree = make(device, evict_by=evict_by)
    wanted, needed = (9, 10) if evict_by == "page" else (7, 10)
    digest = tree.digest()
    for count in (0, 6, needed - 1):
        out = space_for(tree, count)
        with pytest.raises(ValueError, match=rf"evict: {needed} slots do not fit into out \[{count}\]: nothing was ev"):
            settled(tree, partial(tree.evict, wanted, out=out))
        assert (out == -7).all()
        assert (tree.digest(), tree.total_tokens) == (digest, 12)
    out = space_for(tree, needed)
    assert settled(tree, lambda: tree.evict(wanted, out=out)).num_tokens.item() == needed
    assert sorted(out.tolist()) == [10, 11, 12, 13, 14, 15, 20, 21, 22, 23]
    tree.check()


def test_refused_counts(cuda: str) -> None:
    tree = make(cuda)
    result = tree.evict(3, out=space_for(tree, 5))
    assert (result.num_tokens.item(), result.num_nodes.item()) == (-1, -1)
    with pytest.raises(ValueError, match="evict: 6 slots do not fit"):
        tree.raise_pending()
    assert tree.evict(3).num_tokens == 6


def test_the_number_in_a_tensor(device: str) -> None:
    tree = make(device)
    for dtype in (torch.int64, torch.int32):
        asked = torch.tensor([1], dtype=dtype, device=tree.device)
        out = space_for(tree, 6)
        assert tree.evict(asked, out=out).num_nodes.item() == 1
    assert tree.evict(torch.tensor(0, device=tree.device), out=out).num_tokens.item() == 0
    with pytest.raises(ValueError, match="evict: -5 tokens; give a number >= 0"):
        settled(tree, lambda: tree.evict(torch.tensor([-5], device=tree.device), out=out))
    assert tree.total_tokens == 2
    tree.check()


def test_bad_arguments(device: str) -> None:
    tree = make(device)
    for bad, message in (
        (torch.zeros(20, dtype=torch.int64, device=tree.device), "torch.int64 of shape \\(20,\\)"),
        (torch.zeros((4, 5), dtype=torch.int32, device=tree.device), "shape \\(4, 5\\)"),
        (torch.zeros(40, dtype=torch.int32, device=tree.device)[::2], "must be a contiguous tensor"),
        ([0] * 20, "not list"),
    ):
        with pytest.raises(ValueError, match=f"evict: out must be a contiguous tensor.*{message}|{message}"):
            tree.evict(1, out=bad)  # type: ignore[call-overload]
    for wrong in (-1, 1.5, torch.zeros(2, dtype=torch.int64, device=tree.device), torch.tensor([1.5])):
        with pytest.raises(ValueError, match="evict: "):
            tree.evict(wrong, out=space_for(tree, 20))
    assert tree.total_tokens == 12
    tree.check()


def test_out_elsewhere(gpu: str) -> None:
    tree = make(gpu)
    with pytest.raises(ValueError, match="evict: out is on cpu, but the slots are on cuda:0"):
        tree.evict(1, out=torch.zeros(20, dtype=torch.int32))
    beside = make(gpu, slot_device="cpu")
    with pytest.raises(ValueError, match="the slots are returned on cpu, and the tree is not there"):
        beside.evict(1, out=torch.zeros(20, dtype=torch.int32))


@pytest.mark.parametrize("policy", ["lru", "lfu", "mru", lambda nodes: nodes.length])
def test_policies(device: str, policy: Any) -> None:
    tree, other = make(device, policy=policy), make("cpu", policy=policy)
    for wanted in (1, 5, 100):
        out, there = space_for(tree, 12), space_for(other, 12)
        number = tree.evict(wanted, out=out).num_tokens.item()
        assert number == other.evict(wanted, out=there).num_tokens.item()
        assert out.tolist() == there.tolist()
        assert tree.digest() == other.digest()
    tree.check()


def test_namespaces_are_forgotten(device: str) -> None:
    tree = RadixTree(64, device=device)
    tree.insert([[1], [2], [3]], [[1], [2], [3]], namespace=["a", None, "b"])
    tree.evict(1, out=space_for(tree, 1))
    tree.raise_pending()
    assert names_of(tree) == [None, "b"]
    tree.insert([[4]], [[4]], namespace="c")
    assert tree.match([[1]], namespace="a").lengths.tolist() == [0]
    tree.evict(2, out=space_for(tree, 2))
    assert tree.match([[4]], namespace="c").lengths.tolist() == [1]
    assert names_of(tree) == [None, "c"]
    tree.check()


def test_the_callback(device: str) -> None:
    told: list[Any] = []
    tree = make(device, on_evict=lambda name, tokens, slots: told.append((tokens.tolist(), slots.tolist())))
    with pytest.raises(ValueError, match="evict: 6 slots do not fit"):
        tree.evict(5, out=space_for(tree, 5))
    assert not told
    out = space_for(tree, 6)
    assert tree.evict(torch.tensor([5], device=tree.device), out=out).num_tokens.item() == 6
    assert told == [([10, 11, 12, 13, 14, 15], [10, 11, 12, 13, 14, 15])]
    assert out.tolist() == told[0][1]
    tree.check()


def test_soft_pins_and_queues(device: str) -> None:
    """What is wanted goes last, and a refused eviction ends no want."""
    tree = make(device)
    tree.want(tree.match([[10, 11, 12, 13, 14, 15]], touch=False))
    queue = WaitingQueue(tree, keep=True)
    queue.add([[20, 21, 22, 23]])
    out = space_for(tree, 12)
    assert tree.evict(1, out=out).num_tokens.item() == 2
    assert out[:2].tolist() == [30, 31]
    with pytest.raises(ValueError, match="evict: 10 slots do not fit"):
        settled(tree, lambda: tree.evict(5, out=out[:9]))
    assert tree.evict(1, out=out).num_tokens.item() == 4
    assert out[:4].tolist() == [20, 21, 22, 23]
    assert queue.cached_lengths().tolist() == [0]
    queue.close()
    tree.check()
    assert tree.evict(6, out=out).num_tokens.item() == 6
    tree.check()


def test_slots_of_an_interrupted_eviction_come_first(device: str) -> None:
    tree = make(device)
    index_of(tree).settle()
    index_of(tree)._unreturned = torch.tensor([5, 6, 7], dtype=torch.int32, device=tree.device)
    for _ in range(2):
        with pytest.raises(ValueError, match="evict: 9 slots do not fit into out"):
            settled(tree, lambda: tree.evict(4, out=space_for(tree, 8)))
        with pytest.raises(ValueError, match=r"evict: 3 slots do not fit into out \[2\]"):
            settled(tree, lambda: tree.evict(3, out=space_for(tree, 2)))
    out = space_for(tree, 9)
    result = tree.evict(torch.tensor([4], device=tree.device), out=out)
    assert (result.num_tokens.item(), result.num_nodes.item()) == (9, 1)
    assert out.tolist() == [5, 6, 7, 10, 11, 12, 13, 14, 15]
    assert tree.evict(0).num_tokens == 0
    tree.check()


@pytest.mark.parametrize("evict_by", ["node", "page"])
def test_interrupted_at_many_bytecodes(device: str, evict_by: str) -> None:
    """Each slot is in the tree, in the result, or in that of the next eviction."""
    every = set(range(10, 16)) | set(range(20, 24)) | {30, 31}

    def run(tree: RadixTree, out: torch.Tensor) -> Any:
        return tree.evict(7, out=out)

    first = make(device, evict_by=evict_by)
    total = bytecodes(partial(run, first, space_for(first, 12)))
    for at in cuts(total, device, evict_by):
        tree = make(device, evict_by=evict_by)
        out, changes, last = space_for(tree, 12), tree.changes(), tree.last_result
        interrupt_at(at, partial(run, tree, out))
        done = tree.changes() != changes
        result = tree.last_result
        told = out[: int(result.num_tokens)].tolist() if done and result is not last else []  # type: ignore[union-attr]
        found = tree.evict(0).slots.tolist()
        assert not (done and found)
        left = tree.slots(tree.match([list(range(10, 16)), list(range(20, 24)), [30, 31]], touch=False)).to_list()
        assert sorted([*told, *found, *(slot for part in left for slot in part)]) == sorted(every)
        tree.check()


# Evictions that return their slots


def test_more_goes_than_the_host_expects(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launches then free nothing, and the host makes room and frees the same victims."""
    pair = Pair(cuda, 200, slot_dtype=torch.int64)
    index_of(pair.tree)._beyond = 0
    keys = [list(range(100 * number, 100 * number + 3 * number + 2)) for number in range(1, 6)]
    pair.insert(keys, numbered(keys), namespace=["a", "b", None, "a", "b"])
    for number in (1, 6, 7, 1):
        pair.evict(number)
        pair.compare()
        assert index_of(pair.tree)._beyond > 0
        index_of(pair.tree)._beyond = 0
    assert names_of(pair.tree) == names_of(pair.host)


def test_victims_that_torch_orders(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ordering them takes too many comparisons. Into a tensor, the kernel orders them all the same."""
    monkeypatch.setattr(import_module("flatradix.kernels.gpu.evict"), "COMPARISONS", 0)
    pair = Pair(cuda, 200)
    keys = [[number] for number in range(30)]
    pair.insert(keys, numbered(keys))
    pair.evict(12)
    pair.compare()
    out, there = space_for(pair.tree, 12), space_for(pair.host, 12)
    pair.tree.evict(12, out=out)
    pair.host.evict(12, out=there)
    assert out.tolist() == there.tolist()
    pair.compare()


def test_both_launches_at_once(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code launches both kernels, with what each is called with."""
    if not interpreted(cuda):
        pytest.skip("on a GPU, all other tests launch directly")
    from tests.support.fake_driver import interpret_launches

    driver = interpret_launches(monkeypatch)
    pair = Pair(cuda, 64)
    for turn in range(4):
        keys = [[turn, 1, 2], [turn, 3]]
        pair.insert(keys, numbered(keys))
        pair.evict(2)
        out, there = space_for(pair.tree, 8), space_for(pair.host, 8)
        results = pair.tree.evict(torch.tensor([1]), out=out), pair.host.evict(1, out=there)
        assert out.tolist() == there.tolist()
        assert results[0].num_tokens.item() == results[1].num_tokens.item()
        pair.compare()
    assert len(driver.launches) > 20


# What a CUDA graph launches, run here without one


def test_a_rehearsed_step(cuda: str) -> None:
    """Match, lock, evict, insert with a compaction, write_slots and unlock, from tensors on the device alone."""
    pair = Pair(cuda, 12, page_size=2)
    index = index_of(pair.tree)
    key = torch.zeros(4, dtype=torch.int64, device=pair.tree.device)
    slots = torch.zeros(4, dtype=torch.int32, device=pair.tree.device)
    short = torch.zeros(1, dtype=torch.int64, device=pair.tree.device)
    out, table = space_for(pair.tree, 8), torch.zeros((1, 8), dtype=torch.int32, device=pair.tree.device)
    rows = torch.zeros(1, dtype=torch.int64, device=pair.tree.device)

    def step(tree: RadixTree, given: Any) -> Any:
        found = tree.match(given.key, lock=True)
        freed = tree.evict(given.short, out=given.out)
        inserted = tree.insert(given.key, given.slots)
        tree.write_slots(inserted, given.table, given.rows)
        tree.unlock(found)
        return freed, inserted

    given = SimpleNamespace(key=key, slots=slots, short=short, out=out, table=table, rows=rows)
    ends = {index.content().first}
    for turn in range(6):
        short.fill_(max(0, pair.host.total_tokens + 4 - 12))
        key.copy_(torch.tensor([turn % 3, 1, turn, 2]))
        slots.copy_(torch.arange(4) + 10 * turn)
        host = SimpleNamespace(**{name: value.cpu().clone() for name, value in vars(given).items()})
        freed, inserted = index.rehearse(lambda: step(pair.tree, given))
        freed_there, inserted_there = step(pair.host, host)
        assert inserted.lengths.tolist() == inserted_there.lengths.tolist()
        assert int(freed.num_tokens) == int(freed_there.num_tokens)
        assert out.tolist() == host.out.tolist()
        assert table.tolist() == host.table.tolist()
        pair.compare()
        ends.add(index.content().first)
    assert len(ends) == 2, "the pools were compacted"


def test_recorded_launches(cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph would hold is recorded instead, and run again and again without the calls: replays."""
    if not interpreted(cuda):
        pytest.skip("tests/gpu/test_graphs.py does this with graphs")
    from flatradix.kernels.gpu.launch import Kernel

    launch, launches = Kernel.__call__, []
    pair = Pair(cuda, 12, page_size=2)
    q, slots = ragged([[0] * 4], pair.tree), ragged([[0] * 4], pair.tree)
    wanted, out = torch.zeros(1, dtype=torch.int64), space_for(pair.tree, 8)
    pair.insert([[5, 5]], [[8, 9]], namespace="a")
    with monkeypatch.context() as patch:
        patch.setattr(Calls, "is_capturing", lambda calls: True)
        patch.setattr(Kernel, "__call__", lambda *arguments: launches.append(arguments))
        found = pair.tree.match(q, lock=True)
        freed = pair.tree.evict(wanted, out=out)
        inserted = pair.tree.insert(q, slots)
        pair.tree.unlock(found)
        with pytest.raises(RuntimeError, match="out="):
            pair.tree.evict(1)
        with pytest.raises(RuntimeError, match="waits for the device"):
            pair.tree.raise_pending()
    pair.compare()
    for turn in range(6):
        keys = [[turn % 4, 1, turn, 2]]
        wanted.fill_(max(0, pair.host.total_tokens + 4 - 12))
        q.values.copy_(torch.tensor(keys[0]))
        slots.values.copy_(torch.arange(4) + 10 * turn)
        for arguments in launches:
            launch(*arguments)
        locked = pair.host.match(keys, lock=True)
        there = pair.host.evict(int(wanted), out=space_for(pair.host, 8))
        added = pair.host.insert(keys, [[10 * turn + at for at in range(4)]])
        pair.host.unlock(locked)
        assert int(freed.num_tokens) == int(there.num_tokens)
        assert out[: int(freed.num_tokens)].tolist() == there.slots[: int(there.num_tokens)].tolist()
        assert (inserted.lengths.tolist(), found.lengths.tolist()) == (added.lengths.tolist(), locked.lengths.tolist())
        pair.compare()
        if turn == 3:  # calls between the replays
            pair.evict(3)
            pair.insert([[7, 7]], [[1, 2]])
    assert names_of(pair.tree) == [None]
    wanted.fill_(-3)
    for arguments in launches:
        launch(*arguments)
    with pytest.raises(ValueError, match="evict: -3 tokens"):
        pair.tree.raise_pending()
    pair.tree.check()


def test_capture_without_a_gpu(device: str) -> None:
    tree = make(device)
    out, calls = space_for(tree, 12), []

    def work() -> Any:
        calls.append(len(calls))
        return tree.evict(1, out=out)

    if tree.device.type != "cpu":
        pytest.skip("tests/gpu/test_graphs.py has the tests of graphs")
    step = tree.capture(work)
    assert [int(step().num_tokens) for _ in range(4)] == [6, 4, 2, 0]
    assert calls == [0, 1, 2, 3]
