"""Each CPU kernel is compiled once, for one set of types, in whatever form the arguments come."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import flatradix
from flatradix import RadixTree


def signatures() -> dict[str, int]:
    """Return how many versions of each CPU kernel this process has compiled or loaded."""
    cpu = pytest.importorskip("flatradix.kernels.cpu")
    kernels = {name: getattr(cpu, name) for name in cpu.__all__}
    return {name: len(kernel.signatures) for name, kernel in kernels.items() if hasattr(kernel, "signatures")}


def use_everything(tree: RadixTree, tmp_path: Path) -> None:
    one = tree.insert(np.arange(8, dtype=np.int32), torch.arange(8), namespace="a", priority=np.int64(3))
    tree.insert(range(8), range(8), priority=True, inserted_lengths=np.int32(2))
    last = [7, 9] if tree.bigram else [9, 9]
    tree.insert([last], [[11, 12]], start=one)
    m = tree.match([[0, 1, 2, 3], [0, 1], []], touch=1, lock=np.False_)
    odd = SimpleNamespace(handles=m.handles[::2], lengths=m.lengths.long()[::2])
    tree.lock(odd)
    tree.slots(odd)
    tree.match([last, last], start=odd) if not tree.bigram else None
    tree.unlock(odd)
    tree.lock(tree.match(torch.arange(16)[::2], lock=1))
    tree.check()
    tree.digest()
    tree.save(tmp_path / "tree")
    RadixTree.load(tmp_path / "tree", policy=tree.policy if callable(tree.policy) else None)
    tree.evict(np.int32(1))
    tree.evict(torch.tensor(1))
    tree.compact()
    tree.reset()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bigram": True},
        {"page_size": 2, "policy": "mru"},
        {"policy": lambda nodes: nodes.length, "slot_device": "cpu"},
        {"slot_dtype": torch.int64, "policy": "lfu"},
    ],
)
def test_nothing_is_compiled_after_the_warm_up(options: dict, tmp_path: Path) -> None:
    flatradix.warm_up("cpu")
    before = signatures()
    assert {name: count for name, count in before.items() if count != 1} == {}, "warm_up leaves something out"
    use_everything(RadixTree(64, device="cpu", **options), tmp_path)
    assert signatures() == before


def test_machine_code_that_starts_kernels_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to start")
    from flatradix.device import warm_up
    from flatradix.kernels import native

    monkeypatch.setattr(warm_up, "_operations", lambda tokens: iter([lambda tree: None]))
    monkeypatch.setattr(warm_up, "RadixTree", lambda *arguments, **options: RadixTree(64, device="cpu"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    warm_up.warm_up_device(torch.device("cuda", 0), 1, False)
    fixed = {name: function for name in native.__all__ if hasattr(function := getattr(native, name), "prepare")}
    assert set(fixed.values()) == set(native.FUNCTIONS)
    assert {name: len(function.dispatcher.signatures) for name, function in fixed.items()} == dict.fromkeys(fixed, 1)
    assert {name for name, function in fixed.items() if function.call == function._first} == set()
