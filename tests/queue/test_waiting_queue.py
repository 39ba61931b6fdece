"""The waiting queue by hand-made examples: queries, bad input, orders, plans, and what is left in memory."""

from __future__ import annotations

import io
import random
import re
import time
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flatradix import QueryError, RadixTree, Ragged, WaitingQueue
from tests.support.devices import settled
from tests.support.forms import FORMS, poison
from tests.support.oracle import Oracle
from tests.support.pairs import numbered, shared_prefixes
from tests.support.waiting import WaitingOracle

NAMED = ("fcfs", "lpm", "dfs-weight", "hrrn", "shortest-prefill", "aged", "k-lpm")


def tree_with(device: str, *keys: list[int], max_tokens: int = 64, **options: Any) -> RadixTree:
    """Return a tree with the keys. Token j of key i has the slot 1000 * i + j."""
    tree = RadixTree(max_tokens, device=device, **options)
    if keys:
        tree.insert(list(keys), numbered(keys))
    return tree


def order(queue: WaitingQueue, policy: Any = "fcfs", now: float = 0.0, **options: Any) -> list[int]:
    return queue.order(policy, now=now, **options).tolist()


def state(queue: WaitingQueue) -> tuple:
    """Return all that a refused call must leave as it was."""
    columns = (queue.ids(), queue.lengths(), queue.cached_lengths(), queue.shared_lengths())
    return (len(queue), *(column.tolist() for column in columns), queue.tree.digest())


# Prompts


def test_an_empty_queue(device: str) -> None:
    queue = WaitingQueue(tree_with(device, [1, 2]))
    assert len(queue) == 0
    assert 0 not in queue
    queue.remove([])
    queue.remove(torch.tensor([], dtype=torch.int64))
    assert queue.add(Ragged(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))).tolist() == []
    for found in (queue.ids(), *(queue.order(policy, defer_shared=True) for policy in NAMED), queue.plan().ids):
        assert (found.dtype, found.tolist()) == (torch.int64, [])
    for found in (queue.lengths(), queue.cached_lengths(), queue.shared_lengths(), queue.plan("lpm").cached_lengths):
        assert (found.dtype, found.tolist()) == (torch.int32, [])
    assert queue.plan(skip=True).new_tokens == 0
    assert order(queue, lambda columns: columns.length) == []


def test_prompts_without_a_whole_page(device: str) -> None:
    queue = WaitingQueue(tree_with(device, [1, 2, 3, 4], page_size=2))
    assert queue.add([[], [1], [1, 2, 3], [5], [5]]).tolist() == [0, 1, 2, 3, 4]
    assert queue.lengths().tolist() == [0, 1, 3, 1, 1]
    assert queue.cached_lengths().tolist() == [0, 0, 2, 0, 0]
    assert queue.shared_lengths().tolist() == [0] * 5
    # The empty prompt has nothing to compute: hrrn takes it first. Without time, all others are equal.
    queue_orders = {policy: order(queue, policy) for policy in NAMED}
    assert queue_orders == {
        "fcfs": [0, 1, 2, 3, 4],
        "lpm": [2, 0, 1, 3, 4],
        "dfs-weight": [2, 0, 1, 3, 4],
        "hrrn": [0, 1, 2, 3, 4],
        "shortest-prefill": [0, 1, 2, 3, 4],
        "aged": [2, 0, 1, 3, 4],
        "k-lpm": [2, 0, 1, 3, 4],
    }
    assert queue.plan().new_tokens == 0 + 1 + 1 + 1 + 1
    queue.remove([0])
    assert queue.ids().tolist() == [1, 2, 3, 4]


def test_an_empty_prompt_is_one_prompt(device: str) -> None:
    queue = WaitingQueue(tree_with(device))
    assert queue.add([]).tolist() == [0]
    assert queue.lengths().tolist() == [0]
    assert queue.plan().ids.tolist() == [0]


def test_one_prompt_twice(device: str) -> None:
    tree = tree_with(device, [1, 2])
    queue = WaitingQueue(tree)
    queue.add([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert queue.cached_lengths().tolist() == [2, 2]
    assert queue.shared_lengths().tolist() == [0, 2]
    queue.remove(0)
    assert queue.ids().tolist() == [1]
    assert queue.shared_lengths().tolist() == [0]
    assert queue.add([1, 2, 3, 4]).tolist() == [2]
    assert queue.shared_lengths().tolist() == [0, 2]
    tree.insert([1, 2, 3, 4], [5, 6, 7, 8])
    assert queue.cached_lengths().tolist() == [4, 4]
    assert queue.shared_lengths().tolist() == [0, 0]


def test_the_oldest_of_many_that_share_leaves(device: str) -> None:
    queue = WaitingQueue(tree_with(device))
    queue.add([[1, 2, 3], [1, 2, 3, 4], [1, 2], [1, 2, 3, 5], [1, 2, 3, 4, 5]])
    assert queue.shared_lengths().tolist() == [0, 3, 2, 3, 4]
    queue.remove([0])
    assert queue.shared_lengths().tolist() == [0, 2, 3, 4]
    queue.remove([1])
    assert queue.shared_lengths().tolist() == [0, 2, 3]
    queue.remove([2])
    assert queue.shared_lengths().tolist() == [0, 3]
    queue.remove([3])
    assert queue.shared_lengths().tolist() == [0]
    queue.add([1, 2, 3, 4, 5])
    assert queue.shared_lengths().tolist() == [0, 5]


@pytest.mark.interpreted
def test_namespaces_share_nothing(device: str) -> None:
    tree = RadixTree(64, device=device)
    tree.insert([[1, 2], [1, 2, 3]], [[0, 1], [2, 3, 4]], namespace=["a", b"a"])
    queue = WaitingQueue(tree)
    queue.add([[1, 2, 3, 4]] * 4, namespace=[None, "a", b"a", ""])
    queue.add([1, 2, 3, 4], namespace="a")
    assert queue.cached_lengths().tolist() == [0, 2, 3, 0, 2]
    assert queue.shared_lengths().tolist() == [0, 0, 0, 0, 2]
    tree.evict(64)  # the tree forgets both names
    assert queue.cached_lengths().tolist() == [0] * 5
    tree.insert([[1], [1, 2, 3, 4]], [[0], [2, 3, 4, 5]], namespace=["", "a"])  # and gives their codes again
    assert queue.cached_lengths().tolist() == [0, 4, 0, 1, 4]


def test_bigrams(device: str) -> None:
    queue = WaitingQueue(tree_with(device, [1, 2, 3, 4], bigram=True))  # the units (1, 2), (2, 3), (3, 4)
    queue.add([[1, 2, 3, 9], [1, 2, 3, 9, 8], [1], [], [7, 7]])
    assert queue.lengths().tolist() == [4, 5, 1, 0, 2]
    assert queue.cached_lengths().tolist() == [2, 2, 0, 0, 0]
    assert queue.shared_lengths().tolist() == [0, 1, 0, 0, 0]
    assert queue.plan().new_tokens == 2 + 3 + 1 + 0 + 2


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_prompts(form: Callable[..., Any], device: str) -> None:
    prompts = [[1, 2, 3], [], [1, 2, 4]]
    queue = WaitingQueue(tree_with(device, [1, 2]))
    given = form(prompts, queue.tree.device)
    ids = queue.add(given)
    poison(given)
    poison(ids)
    found = [queue.ids(), queue.lengths(), queue.cached_lengths(), queue.shared_lengths(), queue.order("lpm")]
    assert [column.tolist() for column in found] == [[0, 1, 2], [3, 0, 3], [2, 0, 2], [0, 0, 0], [0, 2, 1]]
    for column in found:
        poison(column)
    assert queue.add(array("q", [1, 2, 3])).tolist() == [3]
    assert queue.shared_lengths().tolist() == [0, 0, 0, 1]
    assert queue.ids().tolist() == [0, 1, 2, 3]


def test_forms_of_ids(device: str) -> None:
    queue = WaitingQueue(tree_with(device))
    queue.add([[1]] * 13)
    forms = ([0], (1,), {2}, range(3, 4), iter([4]), np.array([5]), np.int64(6), torch.tensor([7]), torch.tensor(8), 9)
    for number, ids in enumerate(forms):
        queue.remove(ids)
        assert queue.ids().tolist() == list(range(number + 1, 13))
    queue.remove({10: "keys"}.keys())
    queue.remove(torch.tensor([11], dtype=torch.int32))
    assert queue.ids().tolist() == [12]


def test_default_arrivals_are_the_time(device: str) -> None:
    queue = WaitingQueue(tree_with(device))
    before = time.monotonic()
    queue.add([[1], [2]])
    queue.add([3], arrival=before - 1000)
    after = time.monotonic()
    seen = []
    queue.order(lambda columns: seen.append(columns) or columns.arrival)  # type: ignore[func-returns-value]
    (columns,) = seen
    assert all(before <= arrival <= after for arrival in columns.arrival.tolist()[:2])
    assert all(0 <= waited <= time.monotonic() - before for waited in columns.waited.tolist()[:2])
    assert columns.waited[2] >= 1000
    assert queue.order("aged").tolist() == [2, 0, 1]


# Growth


def test_pools_grow() -> None:
    """Thousands of prompts in all pools, some of them long, and every second one leaves."""
    tree = RadixTree(20_000, device="cpu", page_size=2)
    cached = shared_prefixes(300, seed=1, page=2)
    tree.insert(cached, numbered(cached))
    prompts = [*shared_prefixes(1500, seed=1, page=2), [3] * 50_000, [3] * 50_001, list(range(30_000))]
    queue = WaitingQueue(tree)
    for at in range(0, len(prompts), 100):
        queue.add(prompts[at : at + 100])
    assert_columns(queue, prompts)
    queue.remove(list(range(0, len(prompts), 2)))
    assert_columns(queue, prompts[1::2])
    tree.insert(prompts[1:400:2], numbered(prompts[1:400:2]))
    assert_columns(queue, prompts[1::2])


@pytest.mark.parametrize("page_size", [1, 16])
def test_crowds_come_and_go(page_size: int) -> None:
    """Hundreds of prompts come and leave in random order, while the tree changes."""
    rng = random.Random(page_size)
    stems = shared_prefixes(300, seed=5, page=page_size)
    tree = RadixTree(400 * page_size, page_size, "cpu")
    queue = WaitingQueue(tree, keep=True)
    waiting: dict[int, list[int]] = {}
    for _ in range(25):
        prompts = [rng.choice(stems) + [rng.randrange(3)] * rng.choice((0, 1, page_size)) for _ in range(60)]
        waiting.update(zip(queue.add(prompts, arrival=0).tolist(), prompts, strict=True))
        cached = rng.choices(stems, k=3)
        tree.evict(sum(map(len, cached)))
        tree.insert(cached, numbered(cached))
        leaving = rng.sample(list(waiting), rng.choice((1, 30, 100, len(waiting) - 1)) % len(waiting))
        queue.remove(leaving)
        for id in leaving:
            del waiting[id]
        queue.order("lpm")
        assert queue.ids().tolist() == list(waiting)
        assert_columns(queue, list(waiting.values()))
        tree.check()


def assert_columns(queue: WaitingQueue, prompts: list[list[int]]) -> None:
    """Compare with a match of each prompt, and with the pages of all older prompts."""
    tree, page = queue.tree, queue.tree.page_size
    assert queue.lengths().tolist() == [len(prompt) for prompt in prompts]
    cached = tree.match(prompts, touch=False).lengths.tolist()
    assert queue.cached_lengths().tolist() == cached
    known: set[Any] = set()
    shared = []
    for prompt, already in zip(prompts, cached, strict=True):
        prefix, ends = 0, []
        for end in range(page, len(prompt) + 1, page):
            prefix = hash((prefix, *prompt[end - page : end]))
            ends.append(prefix)
        longest = next((at for at, end in enumerate(ends) if end not in known), len(ends)) * page
        shared.append(max(0, longest - already))
        known.update(ends)
    assert queue.shared_lengths().tolist() == shared


def test_adds_and_removes_leave_nothing_behind() -> None:
    tree = tree_with("cpu", [1, 2, 3])
    queue = WaitingQueue(tree, keep=True)
    rng = random.Random(0)

    def turn(number: int) -> None:
        keys = torch.randint(0, 3, (2000, 6))
        names = [f"{number} {i % 50}" if i % 3 else None for i in range(2000)]
        prompts = Ragged(keys.reshape(-1), torch.arange(0, 12_001, 6))
        ids = queue.add(prompts, namespace=names, arrival=0).tolist()
        assert len(queue) == 2000
        queue.order("lpm")
        rng.shuffle(ids)
        queue.remove(ids[:1000])
        queue.shared_lengths()
        queue.remove(ids[1000:])
        assert len(queue) == 0

    for number in range(5):
        turn(number)
    before = queue.nbytes
    for number in range(5, 200):
        turn(number)
    assert queue.nbytes == before
    tree.check()
    assert tree.evict(3).slots.tolist() == [0, 1, 2]


def test_a_moving_window_of_prompts_leaves_nothing_behind() -> None:
    """Prompts come and go one by one, so the queue is never empty, and its oldest prompt always shares."""
    tree = tree_with("cpu", [1, 2, 3])
    queue = WaitingQueue(tree)
    sizes = []
    for number in range(20_000):
        queue.add([1, 2, 3, number % 7, number], namespace=f"tenant {number % 100}", arrival=0)
        if number >= 50:
            queue.remove(number - 50)
        if number in (2000, 19_999):
            sizes.append(queue.nbytes)
            assert queue.ids().tolist() == list(range(number - 49, number + 1))
            assert queue.shared_lengths().tolist() == [0] * 50
    assert sizes[1] == sizes[0]


# Bad input


def refuses(queue: WaitingQueue, call: Callable[[], Any], message: str, error: type[Exception] = ValueError) -> None:
    before = state(queue)
    with pytest.raises(error, match=message) as raised:
        settled(queue.tree, call)
    assert state(queue) == before
    named = re.search(r"\bquery (\d+)\b", str(raised.value))
    assert (named is None) or getattr(raised.value, "query", None) == int(named[1])


@pytest.fixture
def busy(device: str) -> WaitingQueue:
    """A queue with three prompts, the ids 1, 2 and 3."""
    tree = tree_with(device, [1, 2, 3, 4], [5, 6], page_size=2)
    queue = WaitingQueue(tree, keep=True)
    queue.add([[9, 9], [1, 2, 3, 4, 5], [5, 6, 7, 8], [5, 6, 7, 8]], arrival=0.0)
    queue.remove([0])
    return queue


BAD_IDS = [
    ([1, 99], "remove: query 1: .*id 99 .*`ids`"),
    ([0], "query 0: .*id 0 "),
    ([1, 2, 1], "query 2: id 1 .*once"),
    (torch.tensor([2, 2]), "query 1: id 2 .*once"),
    (99, "query 0: .*id 99 "),
    (-1, "query 0: .*id -1 "),
    ([1, 2**40], "query 1: "),
]


@pytest.mark.parametrize(("ids", "message"), BAD_IDS)
def test_ids_that_do_not_wait(busy: WaitingQueue, ids: Any, message: str) -> None:
    refuses(busy, lambda: busy.remove(ids), message, QueryError)
    busy.remove([1, 2, 3])
    assert len(busy) == 0


@pytest.mark.parametrize("ids", [1.0, [1.0], "1", ["1"], None, torch.tensor([1.0]), [[1], 2], [True], object()])
def test_ids_that_are_no_numbers(busy: WaitingQueue, ids: Any) -> None:
    refuses(busy, lambda: busy.remove(ids), "ids must be integers")


BAD_PROMPTS = [
    ({"prompts": [[1, 2], [1, 2, 3, -1]]}, "query 1: .*position 3"),
    ({"prompts": [array("q", [1, 2]), array("q", [2**31, 0])]}, "query 1: .*position 0"),
    ({"prompts": torch.tensor([1, 2, 3, 4, -5])}, "query 0: .*position 4"),  # also behind the last whole page
    ({"prompts": [[1, 2], [1, "2"]]}, "query 1: '2' of type str"),
    ({"prompts": [1, 2, 3.5]}, "3.5 of type float"),
    ({"prompts": 5}, "a int is no sequence"),
    ({"prompts": [[1, 2], 7]}, "query 1: a int is no sequence"),
    ({"prompts": [1, 2], "namespace": 7.0}, "namespace is a float"),
    ({"prompts": [[1, 2], [3]], "namespace": ["a", 1.5]}, "namespace of query 1 is a float"),
    ({"prompts": [[1, 2], [3]], "namespace": ["a"]}, "1 namespaces for 2 queries"),
    ({"prompts": [1, 2], "priority": 1.5}, "priority must be an integer"),
    ({"prompts": [[1, 2], [3]], "priority": [1]}, "priority must be"),
    ({"prompts": [[1, 2], [3]], "priority": [1, "2"]}, "priority must be"),
    ({"prompts": [1], "priority": 2**70}, "priority"),
    ({"prompts": [1], "arrival": float("nan")}, "arrival must be .*finite"),
    ({"prompts": [[1], [2]], "arrival": [0.0, float("inf")]}, "arrival must be .*finite"),
    ({"prompts": [[1], [2]], "arrival": [1.0, 2.0, 3.0]}, "arrival .*one a prompt"),
    ({"prompts": [1], "arrival": "now"}, "arrival"),
]


@pytest.mark.parametrize(("given", "message"), BAD_PROMPTS)
def test_bad_prompts(busy: WaitingQueue, given: dict[str, Any], message: str) -> None:
    refuses(busy, lambda: busy.add(**given), message)
    last = busy.ids().tolist()[-1]
    assert busy.add([5, 6, 7, 8]).item() > last
    assert busy.shared_lengths().tolist() == [0, 0, 2, 2]


def test_a_refused_batch_leaves_no_prompt_behind(busy: WaitingQueue) -> None:
    """The good prompts before the bad one were stored already: nobody may share with them."""
    refuses(busy, lambda: busy.add([[30, 31], [30, 31, 32, 33], [-1]], namespace="new"), "query 2", QueryError)
    busy.add([30, 31, 32, 33], namespace="new")
    assert busy.shared_lengths().tolist() == [0, 0, 2, 0]


BAD_ORDERS = [
    ({"policy": "lifo"}, "'lifo' is unknown: one of fcfs, lpm, .*function"),
    ({"policy": None}, "None is unknown: one of fcfs"),
    ({"policy": "aged", "patience": 0}, "patience must be above 0"),
    ({"policy": "aged", "patience": -1.0}, "patience must be above 0"),
    ({"policy": "aged", "patience": float("nan")}, "patience must be above 0"),
    ({"policy": "k-lpm", "every": 0}, "every must be at least 1"),
    ({"policy": lambda columns: columns.length * float("nan")}, "returned NaN for waiting prompt 0"),
    ({"policy": lambda columns: columns.length[1:]}, r"returned \(2,\)"),
    ({"policy": lambda columns: 7}, "returned int"),
    ({"policy": lambda columns: columns.length.to(torch.complex64)}, "complex64"),
]


@pytest.mark.parametrize(("options", "message"), BAD_ORDERS)
def test_bad_orders(busy: WaitingQueue, options: dict[str, Any], message: str) -> None:
    busy.order(lambda columns: torch.tensor([3, 1, 2]))  # the order 2, 3, 1
    refuses(busy, lambda: busy.order(**options), message)
    assert busy.tree.evict(1).slots.tolist() == [0, 1, 2, 3]  # of prompt 1, which was last in the good order


def test_an_order_by_a_function_that_raises(busy: WaitingQueue) -> None:
    def broken(columns: Any) -> Any:
        raise KeyError("mine")

    refuses(busy, lambda: busy.order(broken), "mine", KeyError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "lifo"}, "'lifo' is unknown"),
        ({"order": [1, 99]}, "plan: query 1: .*id 99 "),
        ({"order": torch.tensor([0])}, "plan: query 0: .*id 0 "),
        ({"order": [1.5]}, "ids must be integers"),
    ],
)
def test_bad_plans(busy: WaitingQueue, options: dict[str, Any], message: str) -> None:
    refuses(busy, lambda: busy.plan(**options), message)


# Orders


@pytest.fixture
def ranked(device: str) -> WaitingQueue:
    """A queue whose prompts have the cached lengths 0, 1, 4, 4, 2, 0 and the lengths 2, 5, 4, 8, 4, 3.

    They arrived at 0, 10, 20, 30, 40, 50. Prompt 5 shares two tokens with prompt 0.
    """
    tree = tree_with(device, [1, 2, 3, 4], [1, 2, 5])
    queue = WaitingQueue(tree)
    queue.add([[9, 9], [1, 8, 8, 8, 8], [1, 2, 3, 4], [1, 2, 3, 4, 7, 7, 7, 7], [1, 2, 6, 6], [9, 9, 9]],
              arrival=[0, 10, 20, 30, 40, 50])  # fmt: skip
    assert queue.cached_lengths().tolist() == [0, 1, 4, 4, 2, 0]
    assert queue.shared_lengths().tolist() == [0, 0, 0, 0, 0, 2]
    return queue


def test_orders(ranked: WaitingQueue) -> None:
    assert order(ranked) == [0, 1, 2, 3, 4, 5]
    assert order(ranked, "lpm") == [2, 3, 4, 1, 0, 5]
    assert order(ranked, "shortest-prefill") == [2, 0, 4, 5, 1, 3]  # to compute: 2, 4, 1 (at least), 4, 2, 3
    # Waited at 60: 60, 50, 40, 30, 20, 10. For each token to compute: 30, 12.5, first of all, 7.5, 10, 3.3.
    assert order(ranked, "hrrn", now=60) == [2, 0, 1, 4, 3, 5]
    # Cached shares: 0, 0.2, 1, 0.5, 0.5, 0.
    assert order(ranked, "aged", now=60, patience=1000) == [2, 3, 4, 1, 0, 5]
    assert order(ranked, "aged", now=60, patience=40) == [2, 0, 1, 3, 4, 5]  # 1.5, 1.45, 2, 1.25, 1, 0.25
    assert order(ranked, "aged", now=60, patience=1) == [0, 1, 2, 3, 4, 5]


def test_k_lpm(ranked: WaitingQueue) -> None:
    assert order(ranked, "k-lpm", every=1) == [0, 1, 2, 3, 4, 5]
    assert order(ranked, "k-lpm", every=2) == [2, 0, 3, 1, 4, 5]
    assert order(ranked, "k-lpm", every=3) == [2, 3, 0, 4, 1, 5]
    assert order(ranked, "k-lpm") == [2, 3, 4, 0, 1, 5]
    assert order(ranked, "k-lpm", every=100) == order(ranked, "lpm")


def test_dfs_weight(device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9], [7, 8, 0])
    tree.insert([1, 2], [50, 51], namespace="a")
    queue = WaitingQueue(tree)
    queue.add([[7, 8, 9], [1, 2, 3, 4], [7], [1, 2, 5, 9], [1, 2, 5], [2], [1, 2], [7, 8, 0]])
    queue.add([[1], [1, 2]], namespace="a")
    # [1, 2] has 4 prompts: below [5, 6] end 3 and 4, inside the edge, below [3, 4] ends 1, at the node ends 6.
    # [7, 8] has 3: [9] and [0] have one each, so the older goes first; 2 ends inside the edge [7, 8]. "a" has 2.
    assert order(queue, "dfs-weight") == [3, 4, 1, 6, 0, 7, 2, 8, 9, 5]
    queue.remove([3, 4])  # now 7, 8 has the most
    assert order(queue, "dfs-weight") == [0, 7, 2, 1, 6, 8, 9, 5]
    queue.remove([2])  # all three branches of the root have two: the one with the oldest prompt goes first
    assert order(queue, "dfs-weight") == [0, 7, 1, 6, 8, 9, 5]
    queue.remove([0, 7])
    assert order(queue, "dfs-weight") == [1, 6, 8, 9, 5]


def test_priorities_come_first(device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4])
    queue = WaitingQueue(tree)
    queue.add([[1, 2], [9], [1, 2, 3], [9, 8], [1]], priority=[-(2**63), 2**63 - 1, 0, 2**63 - 1, 0], arrival=0)
    for policy in NAMED:
        found = order(queue, policy)
        assert sorted(found[:2]) == [1, 3], policy
        assert sorted(found[2:4]) == [2, 4], policy
        assert found[4] == 0, policy
    assert order(queue, "lpm") == [1, 3, 2, 4, 0]
    assert order(queue, lambda columns: -columns.length) == [3, 1, 2, 4, 0]
    assert order(queue, defer_shared=True) == [1, 3, 2, 4, 0]  # 3 shares with 1
    queue.add([7], priority=2**63 - 1)
    assert order(queue, defer_shared=True) == [1, 5, 3, 2, 4, 0]


def test_what_is_shared_can_wait(ranked: WaitingQueue) -> None:
    ranked.add([[9, 9, 9, 9], [1, 2, 6, 6]], arrival=60)
    assert ranked.shared_lengths().tolist() == [0, 0, 0, 0, 0, 2, 3, 2]
    assert order(ranked, defer_shared=True) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert order(ranked, "lpm", defer_shared=True) == [2, 3, 4, 1, 0, 7, 5, 6]
    assert order(ranked, "shortest-prefill", defer_shared=True) == [2, 0, 4, 1, 3, 7, 5, 6]
    ranked.remove(0)
    ranked.tree.insert([1, 2, 6, 6], [70, 71, 72, 73])
    assert order(ranked, "lpm", defer_shared=True) == [2, 3, 4, 7, 1, 5, 6]


def test_a_function_sees_columns(ranked: WaitingQueue) -> None:
    seen = []

    def cheap(columns: Any) -> Any:
        seen.append(columns)
        return (columns.length - columns.cached - columns.shared).to(torch.float32) / 2

    assert order(ranked, cheap, now=60) == [2, 5, 0, 4, 1, 3]
    (columns,) = seen
    assert columns.cached.tolist() == [0, 1, 4, 4, 2, 0]
    assert columns.length.tolist() == [2, 5, 4, 8, 4, 3]
    assert columns.shared.tolist() == [0, 0, 0, 0, 0, 2]
    assert columns.waited.tolist() == [60, 50, 40, 30, 20, 10]
    assert columns.priority.tolist() == [0] * 6
    assert columns.arrival.tolist() == [0, 10, 20, 30, 40, 50]
    for column in columns:
        column.fill_(-1)  # a function's columns are its own
    assert ranked.cached_lengths().tolist() == [0, 1, 4, 4, 2, 0]
    assert order(ranked, lambda columns: torch.zeros(6)) == [0, 1, 2, 3, 4, 5]
    assert order(ranked, lambda columns: -columns.arrival) == [5, 4, 3, 2, 1, 0]


def test_who_waited_longer_than_patience_is_first(device: str) -> None:
    """However much of the others is cached."""
    queue, rng = WaitingQueue(tree_with(device, [1] * 20)), random.Random(3)
    arrivals = [rng.uniform(0, 100) for _ in range(60)]
    queue.add([[1] * rng.randint(0, 20) + [2] * rng.randint(0, 3) for _ in arrivals], arrival=arrivals)
    found = order(queue, "aged", now=100, patience=25)
    assert found != sorted(range(60), key=arrivals.__getitem__)
    for at, later in enumerate(found):
        assert all(arrivals[earlier] <= arrivals[later] + 25 for earlier in found[:at])


@pytest.mark.parametrize("every", [1, 2, 4, 7])
def test_the_oldest_is_admitted_within_some_turns(every: int, device: str) -> None:
    """Whoever has n older prompts before it gets the turn (n + 1) * every at the latest."""
    queue = WaitingQueue(tree_with(device, [1] * 30))
    queue.add([[1] * number for number in range(30)])  # the older, the less is cached
    found = order(queue, "k-lpm", every=every)
    assert sorted(found) == list(range(30))
    for older in range(30):
        assert found.index(older) < (older + 1) * every
    assert found[every - 1] == 0
    assert (found == list(range(30))) == (every == 1)


# Plans


def test_a_plan_counts_what_its_requests_protect(device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4], [1, 2, 5, 6], [7, 7], max_tokens=10)  # 8 tokens are cached, 2 are free
    queue = WaitingQueue(tree)
    queue.add([[1, 2, 3, 4, 9], [1, 2, 5, 6, 9, 9], [7, 7, 9], [8] * 9])
    assert plan(queue) == ([0, 1], [4, 4], 3)  # with 2, 8 tokens are protected: 4 are needed, 2 are there
    assert plan(queue, skip=True) == ([0, 1], [4, 4], 3)
    assert plan(queue, order=[0, 2, 1], skip=True) == ([0, 2], [4, 2], 2)
    assert plan(queue, order=[3]) == ([3], [0], 9)
    assert plan(queue, order=[3, 0]) == ([3], [0], 9)  # 10 are needed, 6 are there
    assert plan(queue, order=[3, 0], free_tokens=6) == ([3, 0], [0, 4], 10)
    assert plan(queue, free_tokens=3) == ([0, 1], [4, 4], 3)
    assert plan(queue, free_tokens=4) == ([0, 1, 2], [4, 4, 2], 4)
    assert plan(queue, free_tokens=0) == ([0], [4], 1)
    assert plan(queue, free_tokens=-3) == ([0], [4], 1)  # 4 stay evictable
    assert plan(queue, free_tokens=-4) == ([], [], 0)


def test_a_plan_locks_inside_an_edge(device: str) -> None:
    """A lock there protects the upper part of the edge only."""
    tree = tree_with(device, [1, 2, 3, 4, 5, 6], max_tokens=6)
    queue = WaitingQueue(tree)
    queue.add([[1, 2, 9, 9, 9, 9], [1, 2, 3, 9]])
    assert plan(queue) == ([0], [2], 4)
    assert plan(queue, order=[1, 0]) == ([1], [3], 1)
    assert plan(queue, order=[1, 0], free_tokens=2) == ([1, 0], [3, 2], 5)
    assert plan(queue, order=[1, 0], free_tokens=1) == ([1], [3], 1)
    assert tree.num_nodes == 1


def test_a_plan_counts_locks_that_are_held(device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4], [5, 6], max_tokens=6)
    tree.lock(tree.match([1, 2]))
    queue = WaitingQueue(tree)
    queue.add([[1, 2, 3, 9, 9], [5, 9], [7] * 4])
    assert plan(queue, order=[2]) == ([2], [0], 4)
    assert plan(queue, order=[0]) == ([0], [3], 2)
    assert plan(queue, order=[0, 1], skip=True) == ([0], [3], 2)


def test_limits_of_a_plan(device: str) -> None:
    queue = WaitingQueue(tree_with(device, [1, 2]))
    queue.add([[1, 2, 3], [5] * 6, [1, 2], [6] * 3])
    assert plan(queue) == ([0, 1, 2, 3], [2, 0, 2, 0], 10)
    assert plan(queue, token_budget=10) == ([0, 1, 2, 3], [2, 0, 2, 0], 10)
    assert plan(queue, token_budget=9) == ([0, 1, 2], [2, 0, 2], 7)
    assert plan(queue, token_budget=6) == ([0], [2], 1)
    assert plan(queue, token_budget=6, skip=True) == ([0, 2, 3], [2, 2, 0], 4)
    assert plan(queue, token_budget=0) == ([], [], 0)
    assert plan(queue, token_budget=0, skip=True) == ([2], [2], 0)
    assert plan(queue, max_requests=2) == ([0, 1], [2, 0], 7)
    assert plan(queue, max_requests=0) == ([], [], 0)
    assert plan(queue, max_requests=2, skip=True) == ([0, 1], [2, 0], 7)
    assert plan(queue, reserve=2) == ([0, 1, 2, 3], [2, 0, 2, 0], 18)
    assert plan(queue, reserve=2, token_budget=10, skip=True) == ([0, 2, 3], [2, 2, 0], 10)
    assert plan(queue, order="lpm", max_requests=3) == ([0, 2, 1], [2, 2, 0], 7)
    assert plan(queue, order=torch.tensor([3, 0])) == ([3, 0], [0, 2], 4)
    assert plan(queue, order=torch.tensor([], dtype=torch.int64)) == ([], [], 0)


def test_a_plan_counts_what_its_requests_share_once(device: str) -> None:
    queue = WaitingQueue(tree_with(device, [1, 1], page_size=2))
    queue.add([[1, 1, 2, 2, 3], [1, 1, 2, 2, 3, 3, 4], [1, 1, 2, 2, 3, 3, 5], [1, 1, 2, 9]])
    assert plan(queue) == ([0, 1, 2, 3], [2, 2, 2, 2], 3 + 5 + 5 + 2)
    assert plan(queue, share=True) == ([0, 1, 2, 3], [2, 2, 2, 2], 3 + 3 + 1 + 2)
    assert plan(queue, share=True, order=[2, 1, 0]) == ([2, 1, 0], [2, 2, 2], 5 + 1 + 1)
    assert plan(queue, share=True, reserve=1) == ([0, 1, 2, 3], [2, 2, 2, 2], 4 + 4 + 2 + 3)
    queue.remove(0)
    assert plan(queue, share=True) == ([1, 2, 3], [2, 2, 2], 5 + 1 + 2)
    queue.shared_lengths()  # merges edges of the prompt tree
    assert plan(queue, share=True) == ([1, 2, 3], [2, 2, 2], 5 + 1 + 2)


def test_a_prompt_that_is_not_admitted_shares_nothing(device: str) -> None:
    queue = WaitingQueue(tree_with(device, [1, 1], page_size=2))
    queue.add([[7] * 9, [7] * 5, [7] * 7, [7] * 5], namespace=["a", "a", "a", "b"])
    assert plan(queue, share=True, skip=True, token_budget=8) == ([1, 2], [0, 0], 5 + 3)
    assert plan(queue, share=True, token_budget=12) == ([0, 1, 2], [0, 0, 0], 9 + 1 + 1)
    assert plan(queue, share=True) == ([0, 1, 2, 3], [0] * 4, 9 + 1 + 1 + 5)


def plan(queue: WaitingQueue, order: Any = "fcfs", **options: Any) -> tuple[list[int], list[int], int]:
    before = queue.tree.digest()
    found = queue.plan(order, **options)
    assert queue.tree.digest() == before
    result = found.ids.tolist(), found.cached_lengths.tolist(), found.new_tokens
    poison(found.ids)
    poison(found.cached_lengths)
    return result


def test_a_plan_does_not_decide_what_is_kept(device: str) -> None:
    tree = tree_with(device, [1, 2], [3, 4])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1, 2], [3]], arrival=0)
    queue.order(lambda columns: -columns.length.flip(0))  # the order 1, 0
    queue.plan("lpm")  # would be the order 0, 1
    assert tree.evict(1).slots.tolist() == [0, 1]


# The tree changes


def test_a_queue_follows_locks_splits_inserts_and_evictions(device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4])
    queue = WaitingQueue(tree)
    queue.add([[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [1, 9]])
    assert queue.cached_lengths().tolist() == [4, 3, 1]
    m = tree.match([1, 2], lock=True)  # splits the edge
    assert order(queue, "dfs-weight") == [0, 1, 2]
    tree.insert([1, 2, 3, 9, 9], [10, 11, 12, 13, 14])
    assert queue.cached_lengths().tolist() == [4, 4, 1]
    tree.insert([1, 2, 3, 4, 5], [20, 21, 22, 23, 24])
    assert queue.cached_lengths().tolist() == [5, 4, 1]
    tree.evict(64)
    assert queue.cached_lengths().tolist() == [2, 2, 1]
    tree.unlock(m)
    tree.evict(64)
    assert queue.cached_lengths().tolist() == [0, 0, 0]


def test_more_changes_than_a_queue_remembers() -> None:
    tree = RadixTree(100_000, device="cpu")
    queue = WaitingQueue(tree, keep=True)
    prompts = [[number, number + 1] for number in range(0, 50_000, 500)]
    queue.add([*prompts, [7, 7, 7]], arrival=0)
    for rounds in range(2):
        keys = [[number, number + 1 - rounds] for number in range(40_000)]
        tree.insert(keys, keys)
        assert queue.cached_lengths().tolist() == tree.match([*prompts, [7, 7, 7]], touch=False).lengths.tolist()
        tree.insert([7, 7, 7], [1, 2, 3])  # a small change after the many
        assert queue.cached_lengths().tolist()[-1] == 3
        tree.evict(100_000)
        assert queue.cached_lengths().tolist() == [0] * 101
    for number in range(40_000):  # many small changes
        tree.insert([number], [number])
        if number % 50 == 49:
            tree.evict(50)
    tree.insert([0, 1, 2], [1, 2, 3])
    assert queue.cached_lengths().tolist() == [2] + [0] * 100
    tree.check()


@pytest.mark.interpreted
def test_reset(device: str) -> None:
    tree = tree_with(device, [1, 2, 3], [4, 5])
    queue = WaitingQueue(tree, keep=True)
    queue.add([[1, 2, 9], [4]])
    assert queue.cached_lengths().tolist() == [2, 1]
    tree.reset()
    assert queue.cached_lengths().tolist() == [0, 0]
    tree.insert([[1], [4, 5], [6]], [[1], [2, 3], [4]])
    assert queue.cached_lengths().tolist() == [1, 1]
    tree.reset()
    tree.insert([[1, 2], [6]], [[1, 2], [4]])
    assert queue.cached_lengths().tolist() == [2, 0]
    tree.match([6])
    assert tree.evict(1).slots.tolist() == [4]
    tree.check()


def test_files_and_copies_know_no_queue(device: str) -> None:
    tree = tree_with(device, [1, 2], [3, 4])
    queue = WaitingQueue(tree, keep=True)
    queue.add([1, 2, 3])
    tree.want(tree.match([1], touch=False))  # soft pins are not saved either
    file = io.BytesIO()
    tree.save(file)
    file.seek(0)
    loaded = RadixTree.load(file, device)
    assert loaded.digest() == tree.digest()
    loaded.check()
    other = WaitingQueue(loaded, keep=True)
    assert loaded.evict(1).slots.tolist() == [1]  # the least recently used
    assert loaded.evict(1).slots.tolist() == [0]
    assert other.ids().tolist() == []
    assert tree.evict(1).slots.tolist() == [1000, 1001]
    assert queue.cached_lengths().tolist() == [2]
    tree.check()


def test_a_loaded_tree_goes_on_with_a_queue(device: str) -> None:
    file = io.BytesIO()
    tree_with(device, [1, 2], [1, 3], [4]).save(file)
    file.seek(0)
    loaded = RadixTree.load(file, device)
    queue = WaitingQueue(loaded, keep=True)
    queue.add([[1, 3, 5], [4, 4]])
    assert queue.cached_lengths().tolist() == [2, 1]
    assert loaded.evict(1).slots.tolist() == [1]
    assert queue.cached_lengths().tolist() == [2, 1]


# The last token


@pytest.mark.interpreted
def test_the_last_token_is_left_to_compute(device: str) -> None:
    tree = tree_with(device, [1, 2, 3, 4], page_size=2)
    queue = WaitingQueue(tree, compute_last=True)
    queue.add([[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2], [], [7, 7, 7, 7], [7, 7, 7, 7]])
    assert queue.lengths().tolist() == [4, 5, 2, 0, 4, 4]
    assert queue.cached_lengths().tolist() == [2, 4, 0, 0, 0, 0]
    assert queue.shared_lengths().tolist() == [0, 0, 0, 0, 0, 2]
    assert queue.plan(max_requests=3).new_tokens == 2 + 1 + 2


# Against the oracle


@pytest.mark.parametrize("page_size", [16, 64])
def test_long_pages(page_size: int, device: str) -> None:
    """Prompts that differ only late in a page."""
    first, second, third = ([1] * (page_size - 1) + [end] for end in (1, 2, 3))
    keys = [first + second, first + third + third, second]
    prompts = [first + second + third, first + second + third + [5], first + second[:-1], [*second, 4], third * 2,
               [*third, *third[:-1], 9], first + third + first, [*third, 8], third[1:], second]  # fmt: skip
    tree, oracle = (
        tree_with(device, *keys, max_tokens=8 * page_size, page_size=page_size),
        Oracle(8 * page_size, page_size),
    )
    oracle.insert(keys, numbered(keys), [None] * 3, [0] * 3)
    queue, waiting = WaitingQueue(tree, keep=True), WaitingOracle(oracle, keep=True)
    queue.add(prompts, arrival=0)
    waiting.add(prompts, [None] * 10, [0] * 10, [0.0] * 10)
    pages = [2, 2, 1, 1, 0, 0, 2, 0, 0, 1]
    assert queue.cached_lengths().tolist() == [page_size * count for count in pages]
    pages = [0, 1, 0, 0, 0, 1, 0, 1, 0, 0]
    assert queue.shared_lengths().tolist() == [page_size * count for count in pages]
    for policy in ("dfs-weight", "lpm"):
        assert order(queue, policy) == waiting.order(policy)
        assert plan(queue, policy, skip=True) == waiting.plan(policy, skip=True)
    while oracle.num_nodes:
        assert tree.evict(page_size).slots.tolist() == oracle.evict(page_size).slots
        assert queue.cached_lengths().tolist() == waiting.cached_lengths()


BAD_LIMITS = [
    ({"token_budget": -1}, "token_budget must be an integer of at least 0"),
    ({"token_budget": 1.5}, "token_budget"),
    ({"max_requests": -1}, "max_requests"),
    ({"free_tokens": "3"}, "free_tokens"),  # a negative number is fine
    ({"reserve": -5}, "reserve"),
]


@pytest.mark.parametrize(("given", "message"), BAD_LIMITS)
def test_bad_limits(busy: WaitingQueue, given: dict[str, Any], message: str) -> None:
    refuses(busy, lambda: busy.plan(**given), message)
    assert busy.plan(free_tokens=2**70, token_budget=2**70, max_requests=2**70).ids.tolist() == [1, 2, 3]


def test_bad_arguments_of_an_empty_queue(device: str) -> None:
    queue = WaitingQueue(tree_with(device))
    for given, message in (({"every": 1.5}, "every"), ({"now": float("nan")}, "now"), ({"patience": "3"}, "patience")):
        with pytest.raises(ValueError, match=message):
            queue.order("k-lpm", **given)
    with pytest.raises(ValueError, match="RadixTree"):
        WaitingQueue(5)  # type: ignore[arg-type]
    assert 2**70 not in queue
    assert np.int64(0) not in queue
    queue.add([1])
    assert np.int64(0) in queue


def test_turns_are_the_last_order_and_what_came_since(device: str) -> None:
    queue = WaitingQueue(tree_with(device, [1, 2]))
    queue.add([[9], [1, 2], [1]])
    assert queue.turns().tolist() == [0, 1, 2]
    queue.order("lpm")
    queue.add([1, 2])
    queue.remove(2)
    queue.plan("fcfs")
    assert queue.turns().tolist() == [1, 0, 3]
