"""CUDA graphs of whole steps of an engine: insert and evict without the host. All tests need a GPU.

tests/gpu/test_streams.py has graphs of single operations, and tests/tree/test_evict_into.py the same kernels without a
graph.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from flatradix import CapacityError, RadixTree, Ragged, WaitingQueue
from tests.support.inside import index_of, names_of
from tests.support.pairs import Pair, ragged

KEYS, TOKENS = 6, 8


class Inputs(NamedTuple):
    """The tensors of a step, on one device."""

    keys: Ragged
    slots: Ragged
    wanted: torch.Tensor
    out: torch.Tensor
    table: torch.Tensor
    rows: torch.Tensor

    def fill(self, keys: list[list[int]], first: int, wanted: int) -> None:
        """Write the keys of a turn, slots from `first` on, and how many tokens to evict."""
        self.keys.values.copy_(torch.tensor([token for key in keys for token in key]))
        self.slots.values.copy_(torch.arange(first, first + KEYS * TOKENS))
        self.wanted.fill_(wanted)
        self.out.fill_(-7)


def inputs_on(device: torch.device, space: int) -> Inputs:
    def batch(dtype: torch.dtype) -> Ragged:
        values = torch.zeros(KEYS * TOKENS, dtype=dtype, device=device)
        return Ragged(values, torch.arange(KEYS + 1, device=device) * TOKENS)

    return Inputs(
        batch(torch.int64), batch(torch.int32), torch.zeros(1, dtype=torch.int64, device=device),
        torch.zeros(space, dtype=torch.int32, device=device),
        torch.zeros((KEYS, TOKENS), dtype=torch.int32, device=device), torch.arange(KEYS, device=device),
    )  # fmt: skip


def work(tree: RadixTree, given: Inputs) -> Any:
    """Do what an engine does in a step."""
    found = tree.match(given.keys, lock=True)
    freed = tree.evict(given.wanted, out=given.out)
    inserted = tree.insert(given.keys, given.slots)
    tree.write_slots(inserted, given.table, given.rows)
    tree.unlock(found)
    return found, freed, inserted


def random_keys(rng: random.Random) -> list[list[int]]:
    stem = [rng.randrange(3) for _ in range(4)]
    return [(stem if rng.random() < 0.4 else []) + [rng.randrange(4) for _ in range(TOKENS)] for _ in range(KEYS)]


@pytest.mark.parametrize("evict_by", ["node", "page"])
@pytest.mark.parametrize("page", [1, 2])
@pytest.mark.parametrize("policy", ["lru", "lfu", "mru"])
def test_many_steps(gpu: str, policy: str, page: int, evict_by: str) -> None:
    """The tree is full, so each step evicts, and pools are compacted now and then. Equal to a tree on the CPU."""
    size = 2 * KEYS * TOKENS
    pair = Pair(gpu, size, page, policy=policy, evict_by=evict_by)
    there, here = inputs_on(pair.tree.device, size), inputs_on(pair.host.device, size)
    step = pair.tree.capture(lambda: work(pair.tree, there))
    rng = random.Random(1)
    ends = set()
    for turn in range(60):
        keys = [key[:TOKENS] for key in random_keys(rng)]
        wanted = max(0, pair.host.total_tokens + KEYS * TOKENS - size)
        for given in (there, here):
            given.fill(keys, 100 * turn, wanted)
        results, expected = step(), work(pair.host, here)
        for result, other in ((results[0], expected[0]), (results[2], expected[2])):
            assert result.lengths.tolist() == other.lengths.tolist()
        assert results[2].prefix_lengths.tolist() == expected[2].prefix_lengths.tolist()
        assert [int(number) for number in results[1][1:]] == [int(number) for number in expected[1][1:]]
        assert there.out.tolist() == here.out.tolist()
        assert there.table.tolist() == here.table.tolist()
        if turn % 7 == 0:
            pair.compare()
            ends.add(index_of(pair.tree).content().first)
        if turn % 20 == 19:  # calls outside the graph, between its steps
            pair.evict(5)
            pair.insert([[9, turn, 1]], [[1, 2, 3]], namespace="x")
            pair.compare()
    pair.tree.raise_pending()
    pair.compare()
    assert len(ends) == 2, "the pools were compacted"


def test_each_step_runs_once(gpu: str) -> None:
    pair = Pair(gpu, 64)
    count = torch.zeros((), dtype=torch.int64, device=gpu)
    q = ragged([[1, 2]], pair.tree)
    runs = []

    def function() -> Any:
        runs.append(1)
        count.add_(1)
        pair.tree.unlock(pair.tree.match(q, lock=True))
        return pair.tree.insert(q, q)

    step = pair.tree.capture(function)
    seen = []
    for number in range(1, 7):
        changes = pair.tree.changes()
        result = step()
        seen.append(result)
        pair.host.unlock(pair.host.match([[1, 2]], lock=True))
        pair.host.insert([[1, 2]], [[1, 2]])
        assert count.item() == number
        assert result.lengths.tolist() == [2]
        assert pair.tree.changes() != changes
        pair.compare()
    assert len(runs) == 3
    assert seen[2] is seen[3] is seen[5]


def test_a_step_that_a_graph_cannot_hold(gpu: str) -> None:
    tree = RadixTree(64, device=gpu)
    q, out = ragged([[1], [2]], tree), torch.zeros(64, dtype=torch.int32, device=gpu)
    tree.insert(q, q)
    stream = torch.cuda.current_stream()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: tree.match([1, 2]), "cannot hold inputs in host memory"),
        (lambda: tree.match(q, namespace="a"), "cannot hold a namespace"),
        (lambda: tree.evict(1), "give evict a tensor for them, out="),
        (lambda: tree.insert(q, q, namespace="b"), "cannot hold a namespace"),
        (lambda: tree.total_tokens, "cannot hold a call that waits"),
        (lambda: (tree.match(q, lock=True), tree.match([[1]])), "cannot hold inputs in host memory"),
    ]
    for function, message in cases:
        step = tree.capture(function)
        for _ in range(2):
            step()
        before = tree.digest()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                step()
            assert torch.cuda.current_stream() == stream
            assert tree.digest() == before
        tree.check()
    good = tree.capture(lambda: tree.evict(1, out=out))
    for _ in range(4):
        good()
    tree.raise_pending()
    tree.check()


def test_a_single_key(gpu: str) -> None:
    tree = RadixTree(64, device=gpu)
    key, slots = torch.zeros(3, dtype=torch.int64, device=gpu), torch.zeros(3, dtype=torch.int32, device=gpu)
    step = tree.capture(lambda: (tree.insert(key, slots), tree.match(key)))
    for turn in range(6):
        key.copy_(torch.tensor([1, 2, turn]))
        slots.copy_(torch.arange(3) + 10 * turn)
        inserted, found = step()
        assert inserted.prefix_lengths.tolist() == [2 if turn else 0]
        assert tree.slots(found).to_list() == [[0, 1, 10 * turn + 2]]
    tree.check()


def test_errors_of_replays(gpu: str) -> None:
    """An eviction into too little space changes nothing; so the insert after it does not fit. Later steps go on."""
    tree = RadixTree(8, device=gpu)
    q, slots = ragged([[1, 2, 3, 4]], tree), ragged([[5, 6, 7, 8]], tree)
    wanted = torch.zeros(1, dtype=torch.int64, device=gpu)
    out = torch.zeros(5, dtype=torch.int32, device=gpu)
    step = tree.capture(lambda: (tree.evict(wanted, out=out), tree.insert(q, slots)))
    for _ in range(3):
        step()
    q.values.copy_(torch.tensor([5, 6, 7, 8]))
    step()
    assert tree.total_tokens == 8
    q.values.copy_(torch.tensor([9, 9, 9, 9]))
    wanted.fill_(5)
    freed, inserted = step()
    assert (int(freed.num_tokens), int(freed.num_nodes), inserted.lengths.tolist()) == (-1, -1, [-1])
    with pytest.raises(
        ValueError, match=r"evict: 8 slots do not fit into out \[5\].*\(1 later calls were refused too\)"
    ):
        tree.raise_pending()
    wanted.fill_(-1)
    step()
    with pytest.raises(ValueError, match="evict: -1 tokens; give a number >= 0"):
        tree.raise_pending()
    wanted.fill_(4)
    freed, inserted = step()
    tree.raise_pending()
    assert (int(freed.num_tokens), out[:4].tolist(), inserted.lengths.tolist()) == (4, [5, 6, 7, 8], [4])
    assert (tree.total_tokens, tree.num_nodes) == (8, 2)
    wanted.fill_(0)
    q.values.copy_(torch.tensor([7, 7, 7, 7]))
    step()
    with pytest.raises(CapacityError, match=r"evict\(4\) first"):
        _ = tree.total_tokens
    tree.check()


def test_names_that_replays_have_emptied(gpu: str) -> None:
    pair = Pair(gpu, 64)
    pair.insert([[1], [2], [3]], [[1], [2], [3]], namespace=["a", None, "b"])
    out = torch.zeros(8, dtype=torch.int32, device=gpu)
    nothing = torch.zeros(1, dtype=torch.int64, device=gpu)
    step = pair.tree.capture(lambda: pair.tree.evict(nothing, out=out))
    for _ in range(3):
        step()
    nothing.fill_(1)
    step()
    pair.host.evict(1)
    pair.insert([[4]], [[4]], namespace="c")
    pair.compare()
    assert set(names_of(pair.tree)) == set(names_of(pair.host)) == {None, "b", "c"}
    pair.match([[1], [3]], namespace=["a", "b"])
    pair.compare()


def test_wants_and_queues_after_a_capture(gpu: str) -> None:
    tree = RadixTree(64, device=gpu)
    q, out = ragged([[1, 2], [3]], tree), torch.zeros(8, dtype=torch.int32, device=gpu)
    place = tree.insert(q, q)
    step = tree.capture(lambda: tree.evict(0, out=out))
    for _ in range(4):
        step()
    with pytest.raises(RuntimeError, match="knows no soft pins: call want once before the capture"):
        tree.want(place)
    with pytest.raises(RuntimeError, match="would not keep for a waiting queue"):
        WaitingQueue(tree, keep=True)
    pinned = RadixTree(64, device=gpu)
    place = pinned.insert(q, q)
    pinned.want(place)
    one = torch.ones(1, dtype=torch.int64, device=gpu)
    pins = pinned.capture(lambda: pinned.evict(one, out=out))
    freed = [int(pins().num_tokens) for _ in range(4)]
    assert sum(freed) == 3
    pinned.check()
    queue = WaitingQueue(pinned, keep=False)
    queue.close()


def test_a_graph_of_torch_itself(gpu: str) -> None:
    """`torch.cuda.graph` holds the same calls, once their kernels are compiled: those of batches and of `compact`."""
    pair = Pair(gpu, 16)
    q, slots = ragged([[1, 2, 3, 4]], pair.tree), ragged([[1, 2, 3, 4]], pair.tree)
    out = torch.zeros(16, dtype=torch.int32, device=gpu)
    for _ in range(2):
        pair.tree.insert(q, slots)
        pair.host.insert([[1, 2, 3, 4]], [[1, 2, 3, 4]])
        pair.tree.evict(4, out=out)
        pair.host.evict(4)
        pair.tree.compact()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair.tree.evict(4, out=out)
        inserted = pair.tree.insert(q, slots)
    for turn in range(20):
        keys = [[turn, 2, 3, turn]]
        q.values.copy_(torch.tensor(keys[0]))
        graph.replay()
        pair.host.evict(4)
        pair.host.insert(keys, [[1, 2, 3, 4]])
        assert inserted.lengths.tolist() == [4]
        pair.compare()
