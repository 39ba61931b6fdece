"""Long keys by anchors: results equal those of walks, whatever the anchors say."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis.stateful import run_state_machine_as_test

from flatradix import QueryError, RadixTree, Ragged
from flatradix.kernels.gpu import long
from flatradix.layout import scratch
from flatradix.layout.queries import Values
from tests.support.devices import interpreted, settled
from tests.support.inside import arrays_of
from tests.tree.test_machine import Machine

# Chunks that a program handles at once, and bits of a tag that are compared: all, or so few that anchors are wrong.
SETTINGS = pytest.mark.parametrize(("group", "tag"), [(1, 0xFFFFFFFF), (4, 0xFFFFFFFF), (4, 1)])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every key be long, with a chunk every four tokens."""
    monkeypatch.setattr(long, "LEAST_TOKENS", 0)
    monkeypatch.setattr(long, "TOKENS_A_CHUNK", 4)


@SETTINGS
@pytest.mark.parametrize(("page_size", "bigram"), [(1, False), (2, True), (16, False)])
def test_random_programs(
    cuda: str, short: None, group: int, tag: int, page_size: int, bigram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long, "TAG_MASK", tag)
    monkeypatch.setattr(long, "group_of", lambda chunks, programs: (group, 2 if group > 1 else 4))
    run_state_machine_as_test(lambda: Machine(cuda, page_size, bigram))  # type: ignore[arg-type]


class Pair:
    """The same tree on both devices, and keys of up to 60 tokens that share prefixes."""

    def __init__(self, cuda: str, page: int, bigram: bool, seed: int) -> None:
        self.random = Random(seed)
        self.trees = [RadixTree(600, page, device, bigram=bigram) for device in ("cpu", cuda)]
        self.keys: list[list[int]] = [[]]
        self.held: list[list[object]] = []

    def key(self) -> list[int]:
        old = self.random.choice(self.keys)
        kept = old[: self.random.choice((len(old), self.random.randint(0, len(old))))]
        key = kept + [self.random.randrange(4) for _ in range(self.random.randrange(12))]
        self.keys.append(key[:60])
        return self.keys[-1]

    def match(self) -> None:
        keys = [self.key() for _ in range(self.random.choice((1, 3)))]
        how = {"touch": self.random.random() < 0.7, "lock": self.random.random() < 0.3}
        name = self.random.choice((None, "a"))
        if len(keys) == 1:
            found = [tree.match(keys[0], name, **how) for tree in self.trees]  # a GPU reads it from pinned memory
        else:
            found = [tree.match(keys, [name] * len(keys), **how) for tree in self.trees]
        assert found[0].lengths.tolist() == found[1].lengths.tolist()
        if how["lock"]:
            self.held.append(found)

    def insert(self) -> None:
        key = self.key()
        name = self.random.choice((None, "a"))
        slots = torch.arange(len(key))
        if self.trees[0].total_tokens + len(key) <= self.trees[0].max_tokens:
            found = [tree.insert(key, slots, name) for tree in self.trees]
            assert found[0].prefix_length == found[1].prefix_length

    def unlock(self) -> None:
        if self.held:
            for tree, places in zip(self.trees, self.held.pop(self.random.randrange(len(self.held))), strict=True):
                tree.unlock(places)

    def evict(self) -> None:
        count = self.random.randrange(100)
        freed = [tree.evict(count).slots.tolist() for tree in self.trees]
        assert freed[0] == freed[1]

    def run(self, steps: int) -> None:
        acts = (self.match, self.match, self.match, self.insert, self.insert, self.unlock, self.evict)
        for _ in range(steps):
            self.random.choice(acts)()
            assert self.trees[0].digest() == self.trees[1].digest()
        self.trees[1].check()


@SETTINGS
@pytest.mark.parametrize(("page_size", "bigram"), [(1, False), (1, True), (3, False)])
def test_deep_paths(
    cuda: str, short: None, group: int, tag: int, page_size: int, bigram: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long, "TAG_MASK", tag)
    monkeypatch.setattr(long, "group_of", lambda chunks, programs: (group, 2 if group > 1 else 4))
    for seed in range(1 if interpreted(cuda) else 30):
        Pair(cuda, page_size, bigram, seed).run(20 if interpreted(cuda) else 150)


def statuses(tree: RadixTree, chunks: int) -> list[int]:
    """Return what the last long match knew of the chunks of its first key."""
    return (arrays_of(tree).scratch.words[1, :chunks] & 0xFFFFFFFF).tolist()


def path_of(tree: RadixTree, edges: int, tokens: int) -> np.ndarray:
    key = np.arange(edges * tokens)
    for end in range(tokens, len(key) + 1, tokens):
        tree.insert(key[:end], key[:end].copy())
    return key


def test_a_match_notes_what_the_next_one_finds(cuda: str, short: None) -> None:
    tree = RadixTree(100, device=cuda)
    key = path_of(tree, 6, 5)
    arrays_of(tree).scratch.anchors.zero_()
    assert tree.match([key]).lengths.tolist() == [30]
    assert statuses(tree, 7) == [long.UNANCHORED.value] * 7
    assert tree.match([key]).lengths.tolist() == [30]
    found = statuses(tree, 7)
    assert long.WRONG.value not in found
    assert found.count(long.UNANCHORED.value) < 4  # anchors that fall together may be lost
    other = key.copy()
    other[17] = 99
    assert tree.match([other]).lengths.tolist() == [17]
    assert statuses(tree, 7) == [*found[:4], *[long.UNANCHORED.value] * 3]


def test_old_words_are_not_taken_for_new_ones(cuda: str, short: None) -> None:
    tree = RadixTree(100, device=cuda)
    key = path_of(tree, 4, 5)
    scratched = arrays_of(tree).scratch
    for _ in range(3):
        assert tree.match([key]).lengths.tolist() == [20]
        scratched.counters[scratch.EPOCH] = scratch.EPOCH_MASK - 1
        assert tree.match([key]).lengths.tolist() == [20]
        assert int(scratched.counters[scratch.EPOCH]) == 0
        assert not scratched.words.any()


def test_anchors_that_come_while_another_key_looks(cuda: str, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key A is a prefix of B. A notes its anchors between two looks of B, as programs on a GPU may."""
    if not interpreted(cuda):
        pytest.skip("only an interpreter can hold a note back")
    trees = [RadixTree(200, device=device) for device in ("cpu", cuda)]
    key = np.arange(40)
    for tree in trees:
        for end in range(5, 41, 5):
            tree.insert(key[:end], key[:end].copy())
    arrays_of(trees[1]).scratch.anchors.zero_()
    note, look = long.note_anchors, long._look_at
    late: list[tuple[Any, ...]] = []
    looks = iter(range(1000))

    def hold(*arguments: Any) -> None:
        note(*arguments) if late else late.append(arguments)

    def look_after_the_note(*arguments: Any) -> None:
        if next(looks) == 12 // 4 + 2:
            note(*late[0])
        look(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(long, "group_of", lambda chunks, programs: (1, 4))
        patch.setattr(long, "note_anchors", hold)
        patch.setattr(long, "_look_at", look_after_the_note)
        places = [tree.match([key[:12], key], lock=True) for tree in trees]
    assert next(looks) > 12 // 4 + 3
    assert places[0].lengths.tolist() == places[1].lengths.tolist()
    for _ in range(2):
        assert trees[0].digest() == trees[1].digest()
        trees[1].check()
        for tree, found in zip(trees, places, strict=True):
            tree.unlock(found) if tree.protected_tokens else tree.match(key)


def test_offsets_that_fall_make_no_key_share_words(cuda: str, short: None) -> None:
    tree = RadixTree(200, device=cuda)
    key = path_of(tree, 8, 5)
    values = torch.from_numpy(np.tile(key, 3).astype(np.int32)).to(tree.device)
    before = tree.digest()
    q = Ragged.trusted(values, torch.tensor([0, 40, 20, 120], device=tree.device))
    with pytest.raises(QueryError, match="offsets fall"):  # where kernels are interpreted, the host sees them
        settled(tree, lambda: tree.match(q, lock=True))
    assert tree.digest() == before
    tree.check()


@pytest.mark.parametrize("page_size", [3, 5, 7, 11, 16])
def test_the_end_of_a_long_key_on_the_host_is_brought_from_any_chunk(cuda: str, page_size: int) -> None:
    """Chunks of 510, 511 or 506 tokens begin where no load of 16 bytes may."""
    tree = RadixTree(20_000, page_size, device=cuda)
    key = np.random.default_rng(page_size).integers(0, 100, 9_800, dtype=np.int32)
    tree.insert(key, key.copy())
    for count in range(8192, 9_800, 512 if interpreted(cuda) else 37):
        assert tree.match(key[:count]).length == count // page_size * page_size


@pytest.mark.parametrize("page_size", [257, 400, 600])
def test_words_suffice_for_pages_that_do_not_divide_a_chunk(
    cuda: str, page_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = RadixTree(page_size, page_size, device=cuda)
    chunk = page_size if page_size > 256 else 512
    monkeypatch.setattr(scratch, "CHUNK_WORDS", 100)
    keys = Values(0, False, 1, 64 * 99 * chunk // 64, 1, None, None)
    assert long.shares_of(arrays_of(tree), keys) is not None
    assert long.shares_of(arrays_of(tree), keys._replace(total=100 * chunk)) is None
