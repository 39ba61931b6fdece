"""The step of examples/graph_step.py: slots are never lost and never twice, and the table says what the tree does."""

from __future__ import annotations

import pytest
import torch

from examples.graph_step import Engine, main, random_prompts
from flatradix.inspect.nodes import nodes_of
from tests.support.devices import interpreted


def test_every_slot_is_somewhere(device: str) -> None:
    torch.manual_seed(1)
    engine = Engine(device, prompts=3, tokens=4, capacity=30)
    tree, free = engine.tree, engine.free
    stems = torch.arange(4, dtype=torch.int32).reshape(2, 2)
    for turn in range(5 if interpreted(device) else 40):
        prompts = random_prompts(engine, stems)
        if turn % 3 == 0:
            prompts[4:8] = prompts[:4]  # the same new part twice
        engine.prompts.values.copy_(prompts)
        engine.step()
        tree.raise_pending()
        assert int(free.count) + tree.total_tokens == 30
        assert tree.protected_tokens == 0
        found = tree.match(engine.prompts, touch=False)
        assert found.lengths.tolist() == [4, 4, 4]
        assert tree.slots(found).to_list() == engine.table.tolist()
        held = [slot for node in nodes_of(tree.content()) for slot in node.slots]
        assert sorted(held + free.slots[: int(free.count)].tolist()) == list(range(30))
        tree.check()


def test_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    main("cpu", 4)
    assert "4 steps of 64 x 512 tokens on cpu" in capsys.readouterr().out
