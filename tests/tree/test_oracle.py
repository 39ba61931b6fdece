"""Worked examples that fix the oracle: each expected value was derived by hand from the written semantics."""

from __future__ import annotations

import pytest

from flatradix.errors import CapacityError, StaleHandleError
from tests.support.oracle import ROOT, Namespace, Oracle, Place, Row, dump


def insert(oracle: Oracle, *keys: list[int], base: int = 0, namespace: Namespace = None, priority: int = 0) -> list:
    """Insert a batch; token j of key i gets the slot base + 100 * i + j."""
    slots = [[base + 100 * i + j for j in range(len(key))] for i, key in enumerate(keys)]
    return oracle.insert(keys, slots, [namespace] * len(keys), [priority] * len(keys))


def match(oracle: Oracle, *keys: list[int], touch: bool = True, lock: bool = False) -> list[Place]:
    return oracle.match(keys, [None] * len(keys), touch=touch, lock=lock)


def table(oracle: Oracle, *fields: str) -> list[tuple]:
    return [tuple(getattr(row, name) for name in fields) for row in dump(oracle)]


def test_insert_splits_where_keys_branch() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2, 3])
    (result,) = insert(oracle, [1, 2, 4], base=1000)
    assert (result.prefix_length, result.place.length) == (2, 3)
    # The second insert has tick t = 4. The upper part is created and used at 4; the lower part gets t - 1 = 3.
    assert table(oracle, "path", "length", "slots", "tick", "created", "hit_count") == [
        ((1, 2), 2, (0, 1), 4, 4, 2),
        ((1, 2, 3), 1, (2,), 3, 2, 1),
        ((1, 2, 4), 1, (1002,), 4, 4, 1),
    ]


def test_insert_of_a_prefix_splits_without_a_leaf() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2, 3])
    (result,) = insert(oracle, [1, 2])
    assert result.prefix_length == result.place.length == 2
    assert table(oracle, "path", "tick", "created", "hit_count") == [((1, 2), 4, 4, 2), ((1, 2, 3), 3, 2, 1)]
    assert oracle.total_tokens == 3


def test_the_lowest_index_of_a_batch_owns_what_is_shared() -> None:
    oracle = Oracle(100)
    results = insert(oracle, [1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 6])
    assert [result.prefix_length for result in results] == [0, 2, 3]
    # Ticks 2, 4, 6. Queries 1 and 2 split off [1, 2] and [4]; the last query uses both. [3] and [5] are lower parts.
    assert table(oracle, "path", "slots", "tick", "created", "hit_count") == [
        ((1, 2), (0, 1), 6, 4, 3),
        ((1, 2, 3), (2,), 3, 2, 1),
        ((1, 2, 4), (102,), 6, 6, 2),
        ((1, 2, 4, 5), (103,), 5, 4, 1),
        ((1, 2, 4, 6), (203,), 6, 6, 1),
    ]


def test_match_touches_the_path_and_changes_no_shape() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2, 3], [1, 2, 4])  # ticks 2, 4
    before = dump(oracle)
    assert [place.length for place in match(oracle, [1, 2, 3], [7], [], touch=False)] == [3, 0, 0]
    assert dump(oracle) == before
    places = match(oracle, [7], [1, 9], [])  # ticks 6, 8, 10: a miss takes a tick, too
    assert [place.length for place in places] == [0, 1, 0]
    assert table(oracle, "path", "tick") == [((1, 2), 8), ((1, 2, 3), 3), ((1, 2, 4), 4)]
    insert(oracle, [8])
    assert oracle.clock == 12
    assert oracle.slots(places) == [[], [0], []]


def test_a_lock_splits_and_keeps_the_tick() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2, 3, 4], priority=5)
    (place,) = match(oracle, [1, 2, 9], touch=False)
    (locked,) = oracle.lock([place])
    assert dump(oracle) == [
        Row("None", (1, 2), 2, (0, 1), 1, 1, 2, 3, 5, 1, 1),
        Row("None", (1, 2, 3, 4), 2, (2, 3), 0, 0, 2, 2, 5, 1, 0),
    ]
    assert (oracle.protected_tokens, oracle.evictable_tokens) == (2, 2)
    with pytest.raises(ValueError):
        oracle.unlock([locked, locked])  # one lock for two unlocks: none is done
    assert oracle.protected_tokens == 2
    assert oracle.slots([place, locked]) == [[0, 1], [0, 1]]
    oracle.unlock([place])  # the old handle names the lower part, its length the end of the upper part
    assert oracle.protected_tokens == 0


def test_locks_of_one_batch_come_in_order() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2, 3, 4])
    places = match(oracle, [1, 2, 3], [1], [1, 2, 3], [5], lock=True)
    assert [place.length for place in places] == [3, 1, 3, 0]
    # The locks come at clock 4, 6, 8, the splits at 5 and 7. The second split cuts the upper part of the first.
    assert table(oracle, "path", "lock_ref", "own_locks", "tick", "created") == [
        ((1,), 3, 1, 8, 7),
        ((1, 2, 3), 2, 2, 8, 5),
        ((1, 2, 3, 4), 0, 0, 4, 2),
    ]
    assert places[3] == ROOT


def test_locking_the_root_does_nothing() -> None:
    oracle = Oracle(100)
    assert oracle.lock([ROOT]) == [ROOT]
    oracle.unlock([ROOT, ROOT])


def test_lru_evicts_leaves_then_their_parents() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2, 3], [1, 2, 4], [5])
    assert oracle.evict(0) == ([], 0, 0)
    match(oracle, [1, 2, 3])
    # [4] has tick 4, [5] 6, [3] and [1, 2] 8. [1, 2] may go only after [3].
    assert oracle.evict(2) == ([102, 200], 2, 2)
    assert oracle.evict(2) == ([2, 0, 1], 3, 2)
    assert oracle.evict(9) == ([], 0, 0)


def test_equal_ticks_go_the_deeper_first() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2, 3])
    oracle.unlock(oracle.lock(match(oracle, [1])))
    assert table(oracle, "path", "tick") == [((1,), 4), ((1, 2, 3), 4)]
    assert oracle.evict(1) == ([1, 2], 2, 1)


def test_evict_leaves_what_is_locked() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2, 3], [4])
    locked = match(oracle, [1, 2, 3], lock=True)
    assert oracle.evict(9).slots == [100]
    oracle.unlock(locked)
    assert oracle.evict(9).slots == [0, 1, 2]
    with pytest.raises(StaleHandleError):
        oracle.unlock(locked)


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("lru", [20, 30, 10]),
        ("mru", [10, 30, 20]),
        ("lfu", [20, 10, 30]),
        ("slru", [20, 10, 30]),
        ("fifo", [10, 20, 30]),
        ("filo", [30, 20, 10]),
        ("priority", [10, 30, 20]),
        (lambda node: -node.units[0], [30, 20, 10]),
    ],
)
def test_policies(policy: object, order: list[int]) -> None:
    oracle = Oracle(100, policy=policy)  # type: ignore[arg-type]
    for key, priority in ((1, 1), (2, 3), (3, 2), (3, 0)):
        oracle.insert([[key]], [[10 * key]], [None], [priority])
    match(oracle, [1])
    # (tick, created, priority, hits) of key 1: (10, 2, 1, 1), of key 2: (4, 4, 3, 1), of key 3: (8, 6, 2, 2)
    assert oracle.evict(3).slots == order


def test_hits_within_inserted_length_do_not_count() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2])
    oracle.insert([[1, 2, 3]], [[0, 0, 7]], [None], [0], inserted_lengths=[2])
    assert table(oracle, "path", "hit_count") == [((1, 2), 1), ((1, 2, 3), 1)]


def test_pages() -> None:
    oracle = Oracle(100, page_size=2)
    assert insert(oracle, [1])[0] == (0, ROOT)
    insert(oracle, [1, 2, 3, 4, 5])
    (result,) = insert(oracle, [1, 2, 3, 9], base=50)
    assert (result.prefix_length, result.place.length) == (2, 4)
    # Two children of [1, 2] begin with the same token: their whole first pages tell them apart.
    assert table(oracle, "path", "slots") == [
        ((1, 2), (0, 1)),
        ((1, 2, 3, 4), (2, 3)),
        ((1, 2, 3, 9), (52, 53)),
    ]
    assert [place.length for place in match(oracle, [1, 2, 3], [1, 3], [1, 2, 3, 4, 5, 6])] == [2, 0, 4]


def test_bigrams() -> None:
    oracle = Oracle(100, bigram=True)
    assert insert(oracle, [1])[0] == (0, ROOT)
    (first,) = insert(oracle, [1, 2, 1, 2])
    assert first.place.length == 3
    assert table(oracle, "path", "slots") == [(((1, 2), (2, 1), (1, 2)), (0, 1, 2))]
    assert [place.length for place in match(oracle, [1, 2, 3], [1], [1, 2, 1])] == [1, 0, 2]
    # The start ends with the pair (1, 2), so the next tokens begin with 2. The last slot is ignored.
    with pytest.raises(ValueError):
        oracle.match([[1, 5]], [None], starts=[first.place])
    (longer,) = oracle.insert([[2, 5, 6]], [[70, 71, 72]], [None], [0], starts=[first.place])
    assert (longer.prefix_length, longer.place.length) == (3, 5)
    assert oracle.slots([longer.place]) == [[0, 1, 2, 70, 71]]


def test_start_means_the_whole_key() -> None:
    oracle = Oracle(100)
    insert(oracle, [1, 2, 3, 4], namespace="a")
    (place,) = oracle.match([[1, 2, 3]], ["a"], touch=False)
    with pytest.raises(ValueError):
        oracle.match([[4]], ["b"], starts=[place])
    (found,) = oracle.match([[4, 5]], [None], starts=[place])
    assert found.length == 4
    (result,) = oracle.insert([[4, 5, 6]], [[0, 61, 62]], ["a"], [0], starts=[place])
    assert (result.prefix_length, result.place.length) == (4, 6)
    assert oracle.slots([result.place]) == [[0, 1, 2, 3, 61, 62]]
    assert table(oracle, "path", "tick") == [((1, 2, 3, 4), 6), ((1, 2, 3, 4, 5, 6), 6)]
    branch = oracle.insert([[9]], [[99]], [None], [0], starts=[place])[0]
    assert branch.prefix_length == 3
    assert oracle.slots([branch.place, place]) == [[0, 1, 2, 99], [0, 1, 2]]


def test_namespaces_share_nothing() -> None:
    oracle = Oracle(100)
    for number, name in enumerate((None, "", "a", b"a")):
        insert(oracle, [1, 2], base=10 * number, namespace=name)
    assert oracle.num_nodes == 4
    assert oracle.slots(oracle.match([[1, 2]] * 2, ["a", b"a"])) == [[20, 21], [30, 31]]


def test_capacity_counts_shared_pages_once_and_changes_nothing() -> None:
    oracle = Oracle(5)
    insert(oracle, [1])
    with pytest.raises(CapacityError) as caught:
        insert(oracle, [1, 2, 3], [1, 2, 4], [5], [6])
    assert (caught.value.needed, caught.value.free) == (5, 4)
    assert (oracle.total_tokens, oracle.clock) == (1, 2)
    insert(oracle, [1, 2, 3], [1, 2, 4], [5])
    assert oracle.total_tokens == 5


def test_a_match_checks_only_what_it_reads() -> None:
    oracle = Oracle(100, page_size=2)
    insert(oracle, [1, 2])
    assert match(oracle, [1, 2, 3, 4, -1, 5], [1, 2, -1])[0].length == 2
    for wrong in ([1, 2, 3, -1], [2**31, 2]):
        with pytest.raises(ValueError):
            match(oracle, wrong)
    with pytest.raises(ValueError):
        insert(oracle, [1, 2, -1])


def test_handles_survive_splits_above_them_and_die_with_their_node() -> None:
    oracle = Oracle(100)
    (held,) = insert(oracle, [1, 2, 3, 4])
    half = match(oracle, [1, 2], touch=False)
    insert(oracle, [1, 9])
    assert oracle.slots([held.place, *half]) == [[0, 1, 2, 3], [0, 1]]
    assert oracle.evict(1).slots == [1, 2, 3]
    with pytest.raises(StaleHandleError):
        oracle.slots(half)  # its node was the lower part
    oracle.reset()
    assert (oracle.total_tokens, oracle.clock) == (0, 4)
    assert oracle.slots([ROOT]) == [[]]
