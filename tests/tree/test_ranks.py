"""Ranks of a process group, each with a tree of its own: whether they agree, and the call after which they do not."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as distributed

import flatradix
from flatradix import PrefixCache, RadixTree, watch_ranks
from flatradix.ranks.journal import KEPT, Entry, Journal, watch_tree
from flatradix.ranks.parted import Rank, first_parting
from tests.support.interrupts import bytecodes, fails_at, interrupt_at

ROOT = Path(__file__).parents[2]
RANKS = 4
needs_gloo = pytest.mark.skipif(
    not distributed.is_available() or not distributed.is_gloo_available(), reason="torch is built without gloo"
)


def run_ranks(folder: Path, programs: str, devices: list[str]) -> dict[str, list[Any]]:
    """Run programs of tests/support/rank_program.py on ranks; return by program what each rank returned."""
    command = [sys.executable, "-m", "tests.support.rank_program"]
    running = []
    for rank, device in enumerate(devices):
        own = [str(rank), str(len(devices)), str(folder / "meet"), str(folder / f"out{rank}"), programs, device]
        environment = {**os.environ, "TRITON_INTERPRET": "1"} if device == "cuda" else os.environ
        running.append(subprocess.Popen([*command, *own], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        ended = [(process.communicate(timeout=600)[1], process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(code == 0 for _, code in ended), "\n".join(text for text, _ in ended)
    found = [json.loads((folder / f"out{rank}").read_text()) for rank in range(len(devices))]
    return {name: [one[name] for one in found] for name in programs.split(",")}


PROGRAMS = "agree,all_wrongs,contents,caches,long_ago,failing"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each of four ranks on the CPU was told, by program. One group for all: processes take long to start."""
    return run_ranks(tmp_path_factory.mktemp("ranks"), PROGRAMS, ["cpu"] * RANKS)


def the_same(found: list[Any]) -> Any:
    assert all(one == found[0] for one in found), found
    return found[0]


@needs_gloo
def test_equal_calls_agree(told: dict[str, list[Any]]) -> None:
    assert the_same(told["agree"]) > 20


@needs_gloo
@pytest.mark.parametrize(
    ("wrong", "call", "operation", "reason"),
    [
        ("another length", 4, "insert", "after call 4, insert: evictable tokens: 6 on rank 0, but 7 on rank 2"),
        ("a shared prefix", 4, "insert", "insert: evictable tokens: 6 on rank 0, but 7 on rank 2"),
        ("another call", 4, "insert", "after call 4, insert on rank 0, but evict on rank 2"),
        ("another batch", 4, "insert", "insert: of 1 on rank 0, but of 2 on rank 2"),
        ("no call", 4, "insert", "after call 4, insert on rank 0, but match on rank 2"),
    ],
)
def test_the_first_call_is_named(
    told: dict[str, list[Any]], wrong: str, call: int, operation: str, reason: str
) -> None:
    found = the_same([one[wrong] for one in told["all_wrongs"]])
    assert found[:2] == [call, operation]
    assert reason in found[2]


@needs_gloo
def test_contents_of_equal_size(told: dict[str, list[Any]]) -> None:
    found = the_same(told["contents"])
    assert found["sizes"] is None
    assert found["digests"][:2] == [None, None]
    assert "the trees of ranks 0 and 2 differ: digests" in found["digests"][2]
    assert "the 1 recorded calls agree" in found["digests"][2]
    assert "the trees of ranks 0 and 3 differ" in found["not watched"][2]
    assert "watch_ranks finds the call" in found["not watched"][2]
    assert found["deep"][:2] == [4, "insert"]
    assert "the digest at" in found["deep"][2]


@needs_gloo
def test_caches(told: dict[str, list[Any]]) -> None:
    call, operation, message = the_same(told["caches"])
    assert (call, operation) == (32, "finish")
    assert "finish on rank 0, but abort on rank 2" in message


@needs_gloo
def test_long_ago(told: dict[str, list[Any]]) -> None:
    call, operation, message = the_same(told["long_ago"])
    assert (call, operation) == (5002 - KEPT + 1, None)
    assert "compare more often" in message


@needs_gloo
def test_an_error_of_one_rank_lets_no_other_wait(told: dict[str, list[Any]]) -> None:
    assert told["failing"][1] == "a token"
    others = the_same([told["failing"][rank] for rank in (0, 2, 3)])
    assert others[2].startswith("rank 1 has an error to raise")


@needs_gloo
@pytest.mark.gpu
def test_ranks_on_both_devices(cuda: str, tmp_path: Path) -> None:
    found = the_same(run_ranks(tmp_path, "mixed", ["cpu", cuda])["mixed"])
    assert found[:2] == [4, "insert"]
    assert "rank 0 made it, and rank 1 did not" in found[2]


# The journal


def entry(count: int, *known: int, name: int = 0) -> Entry:
    known = (*known, *[-1] * (5 - len(known)))
    return Entry(name, count, known, hash((name, count)), hash((name, count, known)))


def test_the_first_of_several_partings() -> None:
    same = [entry(1, 10), entry(2, 20), entry(3, 30)]
    late = [*same[:2], entry(3, 31)]
    early = [same[0], entry(2, 21), late[2]]
    ranks = [Rank(number, 1, 3, 0, entries) for number, entries in enumerate((same, late, early))]
    parting = first_parting(ranks)
    assert parting is not None
    assert (parting.call, parting.operation) == (2, "match")
    assert "20 on rank 0, but 21 on rank 2" in parting.what
    blind = [Rank(3, 0, 3, 0, [entry(1), entry(2), entry(3)])]
    assert first_parting([ranks[0], *blind]) is None
    blind = [Rank(3, 0, 3, 0, [entry(1), entry(9), entry(3)])]
    assert first_parting([ranks[0], *blind]) == (2, "after call 2, match: of 2 on rank 0, but of 9 on rank 3", "match")


def test_refused_targets() -> None:
    with pytest.raises(ValueError, match="takes a RadixTree or a cache that has one, not a list"):
        watch_ranks([])
    tree = RadixTree(8, device="cpu")
    watch_ranks(tree)
    with pytest.raises(ValueError, match="watched already"):
        watch_ranks(tree)


@pytest.mark.parametrize(
    "make", [partial(RadixTree, 64, device="cpu"), partial(PrefixCache, 64)], ids=["tree", "cache"]
)
def test_what_is_watched_works_and_goes(make: Any) -> None:
    target = make()
    watch_ranks(target)
    gone = weakref.ref(target)
    call = target.match if isinstance(target, RadixTree) else target.begin
    assert call.__doc__
    assert len(call([[1, 2]])) == 1
    del target, call
    gc.collect()
    assert gone() is None


class Watched:
    """A tree with a lock and some tokens, and its journal."""

    def __init__(self) -> None:
        self.tree = RadixTree(64, device="cpu")
        self.journal = Journal(self.tree.index, deep=False)
        watch_tree(self.tree, self.journal)
        self.tree.insert([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5]])
        self.held = self.tree.match([1, 2], lock=True)
        self.places = self.tree.match([[1, 2, 3], [4]])


ACTS = {
    "insert": lambda one: one.tree.insert([7, 8], [7, 8]),
    "insert batch": lambda one: one.tree.insert([[7, 8], [1, 9]], [[7, 8], [9, 10]]),
    "evict": lambda one: one.tree.evict(2),
    "match lock": lambda one: one.tree.match([4, 5], lock=True),
    "lock": lambda one: one.tree.lock(one.places),
    "unlock": lambda one: one.tree.unlock(one.held),
    "reset": lambda one: one.tree.reset(),
}


@pytest.mark.parametrize("name", ACTS)
def test_an_interrupted_call_is_recorded_if_it_took_effect(name: str) -> None:
    """A call that took effect is recorded as if nothing had interrupted it; one that was undone is not."""
    act: Any = ACTS[name]
    whole = Watched()
    before = whole.journal.number
    total = bytecodes(partial(act, Watched()))
    act(whole)
    cuts = [partial(interrupt_at, at) for at in range(total)] + [partial(fails_at, at) for at in range(20)]
    for cut in cuts:
        one = Watched()
        changes = one.tree.changes()
        cut(partial(act, one))
        if one.tree.changes() == changes:
            assert one.journal.number == before, cut
        else:
            assert one.journal.hashes == whole.journal.hashes, cut


@pytest.mark.parametrize("deep", [False, True])
def test_numbers_beyond_64_bits(deep: bool) -> None:
    tree = RadixTree(64, device="cpu")
    watch_ranks(tree, deep)
    tree.want(tree.insert([1, 2, 3], [4, 5, 6]), until=1)
    assert tree.expire(2**63) == 1
    assert tree.evict(2**70).slots.tolist() == [4, 5, 6]


def test_names() -> None:
    assert flatradix.assert_ranks_agree.__module__ == "flatradix.ranks.agree"
