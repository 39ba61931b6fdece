"""`on_evict`: what the callback is told, and when. The state machines compare it with the oracle, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from flatradix import PrefixCache, RadixTree
from flatradix.inspect.nodes import nodes_of
from tests.support.depth import cuts
from tests.support.interrupts import bytecodes, interrupt_at

Victim = tuple[Any, list[int], list[int]]


class Recorder:
    """An `on_evict` that writes down the victims, and then does what `then` does."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.told: list[Victim] = []
        self.then = then

    def __call__(self, namespace: Any, tokens: np.ndarray, slots: torch.Tensor) -> None:
        assert tokens.dtype == np.int32
        self.told.append((namespace, tokens.tolist(), slots.tolist()))
        self.then()


def fill(tree: RadixTree) -> None:
    """Insert four keys. The least recently used is [9, 9]; [1, 1] is above two leaves."""
    keys = [[9, 9], [1, 1, 2, 2], [1, 1, 3, 3, 4, 4], [1, 1, 2, 2]]
    slots = [range(2), range(10, 14), range(20, 26), range(30, 34)]
    tree.insert(keys, [list(own) for own in slots], namespace=["a", "b", "b", None])


VICTIMS: list[Victim] = [
    ("a", [9, 9], [0, 1]),
    ("b", [1, 1, 2, 2], [12, 13]),
    ("b", [1, 1, 3, 3, 4, 4], [22, 23, 24, 25]),
    ("b", [1, 1], [10, 11]),
    (None, [1, 1, 2, 2], [30, 31, 32, 33]),
]


def slots_of(victims: list[Victim]) -> list[int]:
    return [slot for victim in victims for slot in victim[2]]


@pytest.mark.parametrize("slot_device", [None, "cpu"])
def test_each_victim_is_told_in_order(slot_device: str | None, device: str) -> None:
    recorder = Recorder()
    tree = RadixTree(32, 2, device, slot_device=slot_device, on_evict=recorder)
    fill(tree)
    assert tree.evict(0).num_tokens == 0
    assert recorder.told == []
    assert tree.evict(3).slots.tolist() == [0, 1, 12, 13]
    assert recorder.told == VICTIMS[:2]
    assert tree.evict(100).slots.tolist() == slots_of(VICTIMS[2:])
    assert recorder.told == VICTIMS
    tree.check()


def test_by_page_only_the_tail_is_told(device: str) -> None:
    recorder = Recorder()
    tree = RadixTree(32, 2, device, evict_by="page", on_evict=recorder)
    fill(tree)
    tree.evict(5)
    tree.evict(1)
    assert recorder.told == [*VICTIMS[:2], ("b", [1, 1, 3, 3, 4, 4], [24, 25]), ("b", [1, 1, 3, 3], [22, 23])]


def test_a_key_of_pairs_has_one_token_more(device: str) -> None:
    recorder = Recorder()
    tree = RadixTree(32, 1, device, bigram=True, evict_by="page", on_evict=recorder)
    tree.insert([[1, 2, 3, 4], [1, 2, 5]], [[0, 1, 2, 3], [10, 11, 12]])
    tree.evict(1)
    assert recorder.told == [(None, [1, 2, 3, 4], [2])]
    tree.evict(3)
    assert recorder.told[1:] == [(None, [1, 2, 3], [1]), (None, [1, 2, 5], [11]), (None, [1, 2], [0])]


def test_the_index_does_not_hold_a_victim_when_it_is_told(device: str) -> None:
    tree = RadixTree(32, 2, device, on_evict=lambda *_: calls[0]())
    fill(tree)
    refused = []

    def call_again(call: Callable[[], object]) -> None:
        with pytest.raises(RuntimeError, match="called from within another call"):
            call()
        refused.append(call)

    every = [tree.digest, tree.reset, partial(tree.match, [1, 1]), partial(tree.evict, 1), lambda: tree.total_tokens]
    every.append(partial(tree.insert, [7, 7], [8, 8]))
    calls: list[Callable[[], object]] = [lambda: [call_again(call) for call in every]]
    assert tree.evict(3).slots.tolist() == [0, 1, 12, 13]
    assert refused == every * 2
    calls[0] = lambda: None
    assert tree.total_tokens == 10
    assert tree.evict(100).slots.tolist() == slots_of(VICTIMS[2:])
    tree.check()


def test_an_exception_stops_neither_the_eviction_nor_the_telling(device: str) -> None:
    numbers = iter(range(100))

    def fail() -> None:
        raise ValueError(f"number {next(numbers)}")

    recorder = Recorder(fail)
    tree = RadixTree(32, 2, device, on_evict=recorder)
    fill(tree)
    changes = tree.changes()
    with pytest.raises(ValueError, match="number 0"):
        tree.evict(7)
    assert recorder.told == VICTIMS[:3]
    assert (tree.total_tokens, tree.changes()) == (6, changes)
    tree.check()
    assert tree.evict(0).slots.tolist() == slots_of(VICTIMS[:3])  # tells nothing again
    with pytest.raises(ValueError, match="number 3"):
        tree.evict(100)
    assert recorder.told == VICTIMS
    assert tree.evict(0).slots.tolist() == slots_of(VICTIMS[3:])
    assert tree.evict(0).num_tokens == 0


def test_what_a_signal_interrupts_is_told_by_the_next_eviction(device: str) -> None:
    def interrupt() -> None:
        if len(recorder.told) == 2:
            raise KeyboardInterrupt

    recorder = Recorder(interrupt)
    tree = RadixTree(32, 2, device, on_evict=recorder)
    fill(tree)
    with pytest.raises(KeyboardInterrupt):
        tree.evict(7)
    tree.insert([5, 5, 6, 6], [50, 51, 52, 53])
    result = tree.evict(10)
    assert result.slots.tolist() == slots_of(VICTIMS[:4])
    assert recorder.told == [*VICTIMS[:2], *VICTIMS[1:4]]
    assert tree.evict(1).slots.tolist() == [30, 31, 32, 33]
    assert recorder.told[-1] == VICTIMS[4]
    tree.check()


def test_a_reset_tells_nothing(device: str) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    recorder = Recorder(interrupt)
    tree = RadixTree(32, 2, device, on_evict=recorder)
    fill(tree)
    with pytest.raises(KeyboardInterrupt):
        tree.evict(7)
    tree.reset()
    assert tree.evict(100).num_tokens == 0
    assert recorder.told == VICTIMS[:1]


def test_copies_have_the_callback_and_files_get_one(device: str, tmp_path: Any) -> None:
    recorder, other = Recorder(), Recorder()
    tree = RadixTree(32, 2, device, on_evict=recorder)
    fill(tree)
    tree.save(tmp_path / "tree")
    tree.to("cpu").evict(1)
    assert recorder.told == VICTIMS[:1]
    RadixTree.load(tmp_path / "tree", device, on_evict=other).evict(1)
    assert RadixTree.load(tmp_path / "tree", device).evict(1).slots.tolist() == [0, 1]
    assert other.told == recorder.told == VICTIMS[:1]


def test_the_callback_must_be_callable() -> None:
    for make in (RadixTree, PrefixCache):
        with pytest.raises(ValueError, match="on_evict must be a function or None, not 'print'"):
            make(8, on_evict="print")  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["node", "page"])
@pytest.mark.parametrize("slot_device", [None, "cpu"])
def test_interrupted_at_many_bytecodes(slot_device: str | None, by: str, device: str) -> None:
    """Each victim is told once, or again if the interruption came between; no slot is lost."""

    def scene() -> tuple[RadixTree, Recorder]:
        recorder = Recorder()
        tree = RadixTree(32, 2, device, slot_device=slot_device, evict_by=by, on_evict=recorder)
        fill(tree)
        return tree, recorder

    tree, recorder = scene()
    total = bytecodes(partial(tree.evict, 6))
    victims = list(recorder.told)
    for at in cuts(total, device, f"evict {slot_device} {by}"):
        tree, recorder = scene()
        changes = tree.changes()
        interrupt_at(at, partial(tree.evict, 6))
        done = tree.changes() != changes
        tree.check()
        told = tree.last_result
        untold = tree.evict(0).slots.tolist()
        freed = (told.slots.tolist() if done else []) + untold  # type: ignore[union-attr]
        assert freed in ([], slots_of(victims))
        again = recorder.told
        doubles = [number for number in range(1, len(again)) if again[number] == again[number - 1]]
        assert len(doubles) <= 1
        assert [one for number, one in enumerate(again) if number not in doubles] == (victims if freed else [])
        left = [slot for node in nodes_of(tree.content()) for slot in node.slots]
        assert sorted(left + freed) == sorted(slots_of(VICTIMS))


def test_a_prefix_cache_tells_what_it_evicts(where: dict[str, str]) -> None:
    recorder = Recorder()
    cache = PrefixCache(8, 2, on_evict=recorder, **where)
    first = cache.begin([[1, 2, 3, 4]])
    kept = first[0].slots.tolist()
    cache.finish(first)
    second = cache.begin([[5, 6, 7, 8, 9, 9]])
    assert recorder.told == [(None, [1, 2, 3, 4], kept[2:])]
    assert set(kept[2:]) <= set(second[0].slots.tolist())
    cache.check()


def test_a_callback_cannot_call_its_prefix_cache(where: dict[str, str]) -> None:
    def call_again() -> None:
        for call in (cache.counts, cache.reset, lambda: cache.begin([[1]]), lambda: cache.tree.total_tokens):
            with pytest.raises(RuntimeError, match="called from within another call"):
                call()

    recorder = Recorder(call_again)
    cache = PrefixCache(8, 2, on_evict=recorder, **where)
    cache.finish(cache.begin([[1, 2, 3, 4]]))
    assert cache.begin([[5, 6, 7, 8, 9, 9]])[0].state == "running"
    assert len(recorder.told) == 1
    cache.check()


def test_a_callback_that_raises_leaves_a_prefix_cache_whole(where: dict[str, str]) -> None:
    def fail() -> None:
        raise OSError("no space")

    recorder = Recorder(fail)
    cache = PrefixCache(8, 2, on_evict=recorder, **where)
    cache.finish(cache.begin([[1, 2, 3, 4]]))
    with pytest.raises(OSError, match="no space"):
        cache.begin([[5, 6, 7, 8, 9, 9]])
    assert len(cache.running) == 0
    cache.check()
    assert cache.free_slots == 6
    assert len(recorder.told) == 1
    assert cache.begin([[5, 6, 7, 8, 9, 9]])[0].state == "running"
    cache.check()
