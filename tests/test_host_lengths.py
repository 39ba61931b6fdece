"""Lengths in host memory: those of the result, however they come there."""

from __future__ import annotations

import pytest
import torch

from flatradix import RadixTree, Ragged, meta
from flatradix.host_tree import HostTree

BATCH = [[1, 2, 3, 4], [1, 2, 9], [], [7], [5, 6]]
LENGTHS = [3, 2, 0, 0, 2]


@pytest.fixture
def tree(device: str) -> RadixTree:
    tree = RadixTree(64, device=device)
    tree.insert([[1, 2, 3], [5, 6]], [[1, 2, 3], [4, 5]])
    return tree


def test_they_are_those_of_the_result(tree: RadixTree) -> None:
    for batch in (BATCH, BATCH[:1], [], Ragged.from_sequences(BATCH).to(tree.device)):
        for how in ({}, {"lock": True}, {"touch": False}):
            found = tree.match(batch, **how)
            lengths = found.host_lengths()
            assert (lengths.dtype, lengths.device.type) == (torch.int32, "cpu")
            assert lengths.tolist() == LENGTHS[: len(batch)] == found.lengths.tolist()
    assert tree.match([1, 2]).host_lengths().tolist() == [2]
    assert tree.match(torch.tensor([1, 2], device=tree.device)).host_lengths().tolist() == [2]
    assert tree.insert([[1, 2, 3, 4]], [[1, 2, 3, 4]]).host_lengths().tolist() == [4]


def test_many_batches_one_after_another(tree: RadixTree, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that share words with later ones, that have too many, and that end where the words do."""
    monkeypatch.setattr(meta, "LENGTHS", 8)
    sizes = [3, 3, 2, 8, 1, 5, 2, 4, 9, 5, 5, 4]
    found = [tree.match((2 * BATCH)[:size]) for size in sizes]
    for _ in range(2):
        for size, one in zip(sizes, found, strict=True):
            assert one.host_lengths().tolist() == (2 * LENGTHS)[:size]


def test_a_refused_batch_has_none(tree: RadixTree) -> None:
    before = tree.match(BATCH)
    if isinstance(tree, HostTree):
        with pytest.raises(ValueError, match="query 1"):
            tree.match([[1, 2], [-1]])
    else:
        refused = tree.match([[1, 2], [-1]])
        after = tree.match(BATCH)
        for told in (False, True):
            with pytest.raises(ValueError, match="was refused"):
                refused.host_lengths()
            assert before.host_lengths().tolist() == after.host_lengths().tolist() == LENGTHS
            if not told:
                with pytest.raises(ValueError, match="query 1"):
                    tree.raise_pending()
    assert before.host_lengths().tolist() == LENGTHS == tree.match(BATCH).host_lengths().tolist()
