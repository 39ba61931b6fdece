"""The forms of a batch, and empty batches and keys."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import torch

from flatradix import RadixTree, Ragged
from flatradix.inputs import sequences


def same_queries() -> list[Any]:
    """Return one batch in every form that is accepted."""
    rows = [[1, 2, 3], [], [1, 2]]
    odd = np.array([1, 9, 2, 9, 3, 9])[::2]
    return [
        rows,
        tuple(rows),
        Ragged.from_sequences(rows),
        Ragged(torch.tensor([1, 2, 3, 1, 2], dtype=torch.int32), torch.tensor([0, 3, 3, 5])),
        Ragged(torch.tensor([1, 2, 3, 1, 2], dtype=torch.int16), torch.tensor([0, 3, 3, 5])),
        [array("q", row) for row in rows],
        [array("i", row) for row in rows],
        [array("H", row) for row in rows],
        [np.array(row, dtype=np.uint8) for row in rows],
        [torch.tensor(row, dtype=torch.int32) for row in rows],
        [odd, torch.tensor([], dtype=torch.int32), (1, 2)],
        [torch.tensor([1, 9, 2, 9, 3, 9])[::2], range(0), range(1, 3)],
        [np.array(row, dtype=">i8") for row in rows],
    ]


@pytest.mark.parametrize("q", same_queries())
def test_every_form_of_a_batch_means_the_same(q: Any, device: str) -> None:
    tree = RadixTree(16, device=device)
    tree.insert([1, 2, 7], [10, 11, 12])
    m = tree.match(q)
    assert (m.lengths.dtype, m.handles.dtype) == (torch.int32, torch.int64)
    assert m.lengths.tolist() == [2, 0, 2]
    assert tree.slots(m).to_list() == [[10, 11], [], [10, 11]]
    assert tree.insert(q, [[20, 21, 22], [], [23, 24]]).prefix_lengths.tolist() == [2, 0, 2]
    assert tree.slots(tree.match([1, 2, 3])).to_list() == [[10, 11, 22]]


@pytest.mark.parametrize("q", [[1, 2], (1, 2), range(1, 3), array("i", [1, 2]), np.array([1, 2]), torch.tensor([1, 2])])
def test_one_flat_sequence_is_a_batch_of_one(q: Any, device: str) -> None:
    tree = RadixTree(16, device=device)
    r = tree.insert(q, [5, 6])
    assert (r.prefix_length, r.length, r.lengths.tolist()) == (0, 2, [2])
    m = tree.match(q)
    assert (len(m), m.length, m.handle) == (1, 2, int(m.handles[0]))
    assert tree.slots(m).to_list() == [[5, 6]]


def test_a_batch_of_none(device: str) -> None:
    tree = RadixTree(16, device=device)
    none = Ragged.from_sequences([])
    m = tree.match(none)
    tree.lock(m)
    tree.unlock(m)
    tree.split(m)
    assert (len(m), tree.slots(m).to_list(), len(tree.insert(none, none))) == (0, [], 0)
    with pytest.raises(ValueError, match="batch of one, and this is one of 0"):
        _ = m.length


@pytest.mark.parametrize("q", [[], (), range(0), array("q"), np.array([], np.int64), [5, 6][:0], [[]]])
def test_an_empty_sequence_is_one_empty_key(q: Any, device: str) -> None:
    """As what is left of a prompt of one token without its last token."""
    tree = RadixTree(16, device=device)
    tree.insert([1, 2], [1, 2])
    m = tree.match(q, lock=True)
    assert (len(m), m.length, m.lengths.tolist(), tree.slots(m).to_list()) == (1, 0, [0], [[]])
    tree.unlock(m)
    r = tree.insert(q, [])
    assert (len(r), r.prefix_length, r.length, tree.num_nodes) == (1, 0, 0, 1)
    tree.check()


@pytest.mark.parametrize("tokens", [5, 20_000])  # 20,000 do not fit in the pinned memory of a single key
def test_a_list_is_read_once(tokens: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    reader = sequences._READERS[list]

    def counting(values: list[int]) -> Any:
        reads.append(len(values))
        return reader(values)

    monkeypatch.setitem(sequences._READERS, list, counting)
    tree = RadixTree(32, device=device)
    assert tree.match([1] * tokens).length == 0
    assert reads == [tokens]
    assert tree.match([[1] * tokens, [2]]).lengths.tolist() == [0, 0]
    assert reads == [tokens, tokens, 1]


def test_nothing_behind_a_start(device: str) -> None:
    tree = RadixTree(8, device=device)
    m = tree.insert([1, 2], [1, 2])
    assert tree.match([], start=m).lengths.tolist() == [2]
    r = tree.insert([], [], start=m)
    assert (r.prefix_lengths.tolist(), r.lengths.tolist()) == ([2], [2])


def test_inference_mode_makes_no_difference(device: str) -> None:
    """A tree that was made or used in inference mode works outside it. Most tensors made in that mode do not."""
    with torch.inference_mode():
        tree = RadixTree(16, device=device, policy="lfu")
        m = tree.insert([[1, 2, 3], [1, 4]], [[1, 2, 3], [1, 4]], namespace="a")
        single = tree.match([1, 2], namespace="a")
        tree.lock(m)
    tree.lock(single)
    tree.unlock(m)
    assert tree.evict(9).slots.tolist() == [4, 3]
    tree.unlock(single)
    tree.compact()
    with torch.inference_mode():
        tree.insert([[5], [6]], [[5], [6]])
        before = tree.digest()
    assert tree.digest() == tree.to("cpu").digest() == before
    assert tree.evict(9).num_tokens == 4
    tree.check()
