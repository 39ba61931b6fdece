"""Digests, and trees that are saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flatradix
from flatradix import RadixTree
from flatradix.layout import numbers
from flatradix.results import Places
from tests.support.devices import interpreted, settled
from tests.support.inside import index_of


def test_digest_sees_what_matters(device: str) -> None:
    def build(**change: Any) -> str:
        tree = RadixTree(64, device=device, policy=change.pop("policy", "lru"))
        tree.insert([1, 2, 3], change.pop("slots", [7, 8, 9]), namespace=change.pop("namespace", None))
        tree.insert(
            [1, 2, change.pop("token", 4)], [0, 0, 5], priority=change.pop("priority", 0),
            namespace=change.pop("namespace_2", None), inserted_lengths=change.pop("inserted", 0),
        )  # fmt: skip
        if change.pop("lock", False):
            tree.lock(tree.match([1, 2, 3], touch=False))
        if change.pop("touch", False):
            tree.match([1, 2, 3])
        assert not change
        return tree.digest()

    changes: list[dict[str, Any]] = [
        {}, {"slots": [7, 8, 10]}, {"slots": [8, 7, 9]}, {"namespace": "a"}, {"namespace": b"a"}, {"namespace": ""},
        {"token": 5}, {"priority": 1}, {"inserted": 2}, {"lock": True}, {"touch": True}, {"namespace_2": "a"},
    ]  # fmt: skip
    digests = [build(**change) for change in changes]
    assert len(set(digests)) == len(digests)
    assert [build(**change) for change in changes] == digests
    assert build(policy="lfu") == digests[0]


def test_digest_does_not_see_rows_or_places(device: str) -> None:
    plain = RadixTree(64, device=device)
    moved = RadixTree(64, device=device)
    for i in range(3 if interpreted(device) else 10):
        moved.insert([50 + i, 1], [0, 0], namespace=str(i))
    moved.reset()
    index_of(moved)._state.numbers[numbers.CLOCK] = 0
    for tree in (plain, moved):
        tree.insert([[1, 2, 3], [1, 2, 4], [1, 5]], [[1, 2, 3], [1, 2, 4], [1, 5]], namespace="n")
    assert plain.digest() == moved.digest()


@pytest.mark.parametrize("policy", ["lfu", "mru"])
def test_snapshot(tmp_path: Path, policy: str, device: str) -> None:
    tree = RadixTree(64, page_size=2, device=device, policy=policy)
    tree.insert([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8]], [[1, 2, 3, 4], [1, 2, 5, 6], [7, 8]], namespace=["a", "a", b"b"])
    m = tree.match([[1, 2, 9, 9]], namespace="a", lock=True)
    tree.evict(2)
    tree.save(tmp_path / "tree")
    loaded = RadixTree.load(tmp_path / "tree", device=device)
    loaded.check()
    assert loaded.digest() == tree.digest()
    assert loaded.match([1, 2, 3, 4], namespace="a").length == tree.match([1, 2, 3, 4], namespace="a").length
    loaded.unlock(m)
    tree.unlock(m)
    assert loaded.evict(99).slots.tolist() == tree.evict(99).slots.tolist()


def test_snapshot_that_is_none(tmp_path: Path, device: str) -> None:
    path = tmp_path / "tree"
    path.write_bytes(b"not a tree")
    with pytest.raises(ValueError, match="no tree that flatradix saved, or is damaged"):
        RadixTree.load(path)
    torch.save({"format": "flatradix tree 3"}, path)
    with pytest.raises(ValueError, match=r"no tree that this version.*flatradix\.inspect\.convert"):
        RadixTree.load(path)
    with pytest.raises(FileNotFoundError):
        RadixTree.load(tmp_path / "nowhere")
    tree = RadixTree(8, device=device, policy=lambda nodes: nodes.tick)
    tree.save(path)
    with pytest.raises(ValueError, match="give it again"):
        RadixTree.load(path)
    assert RadixTree.load(path, policy=lambda nodes: -nodes.tick).max_tokens == 8


def test_a_handle_from_after_the_save_is_stale_in_the_loaded_tree(tmp_path: Path, device: str) -> None:
    tree = RadixTree(8, device=device)
    tree.insert([1, 2], [1, 2])
    tree.evict(2)
    tree.save(tmp_path / "tree")
    loaded = RadixTree.load(tmp_path / "tree", device=device)
    later = tree.insert([3, 4], [3, 4])
    with pytest.raises(flatradix.StaleHandleError):
        settled(loaded, lambda: loaded.lock(later))
    loaded.check()


def on(tree: RadixTree, places: Places) -> Places:
    """Return places as tensors on the device of a tree."""
    return Places(places.lengths.to(tree.device), places.handles.to(tree.device))


def futures_of(tree: RadixTree, path: Path, device: str) -> list[RadixTree]:
    """Return the tree, two trees loaded from its file, and its copy on the CPU if it is on a GPU."""
    tree.save(path)
    copies = [] if tree.to("cpu") is tree else [tree.to("cpu")]
    return [tree, *(RadixTree.load(path, device=device) for _ in range(2)), *copies]


@pytest.mark.parametrize("way", ["evict", "reset", "insert", "load again"])
def test_handles_do_not_cross_between_futures(tmp_path: Path, device: str, way: str) -> None:
    """A node that is new in one future of a tree is no node in another, though both use the same row."""
    tree = RadixTree(16, device=device)
    tree.insert([[1, 2], [3, 4]], [[1, 2], [3, 4]])
    tree.evict(2)
    futures = futures_of(tree, tmp_path / "tree", device)
    if way == "load again":
        futures[1].save(tmp_path / "tree")
        futures[1] = RadixTree.load(tmp_path / "tree", device=device)
    later = []
    for i, future in enumerate(futures):
        if way != "insert":
            future.evict(9) if way == "evict" else future.reset()
        later.append([future.insert([10 * i + j, j], [i, j]) for j in range(4)])
    assert len({place.handle for places in later for place in places}) == 4 * len(futures)
    for i, places in enumerate(later):
        for other, future in enumerate(futures):
            for place in places:
                assert future.alive(on(future, place)).tolist() == [other == i]


def test_a_handle_from_before_the_save_is_good_until_its_node_goes(tmp_path: Path, device: str) -> None:
    tree = RadixTree(16, device=device)
    tree.insert([9], [9])
    tree.evict(1)
    held = tree.insert([[1, 2], [1, 3]], [[1, 2], [1, 3]])
    for future in futures_of(tree, tmp_path / "tree", device):
        for again in futures_of(future, tmp_path / "again", device):
            there = on(again, held)
            assert again.slots(there).to_list() == [[1, 2], [1, 3]]
            again.evict(1)
            assert again.alive(there).tolist() == [False, True]
            again.insert([1, 2], [1, 5])
            assert again.alive(there).tolist() == [False, True]
            again.reset()
            assert again.alive(there).tolist() == [False, False]
    assert tree.to(device) is tree


@pytest.mark.parametrize("name", [None, "", b"", "\ud800", b"\xff\x00", "tenant"])
def test_snapshot_of_any_namespace(name: str | bytes | None, tmp_path: Path, device: str) -> None:
    tree = RadixTree(8, device=device)
    tree.insert([1, 2], [1, 2], namespace=name)
    tree.save(tmp_path / "tree")
    assert RadixTree.load(tmp_path / "tree", device=device).match([1, 2], namespace=name).length == 2


def test_a_tree_is_neither_pickled_nor_copied(device: str) -> None:
    import copy
    import pickle

    tree = RadixTree(8, device=device)
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"use save\(\) and RadixTree.load"):
            call(tree)
