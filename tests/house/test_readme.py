"""The code of the README and of docs/tree.md, queue.md, events.md and engine.md runs, and does what they say."""

from __future__ import annotations

import doctest
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.prefix_engine import RememberingCache

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def test_interpreter_session() -> None:
    session = README.read_text().split("```python\n>>>")[1].split("```")[0]
    test = doctest.DocTestParser().get_doctest(">>>" + session, {}, "README.md", str(README), 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted >= 8
    assert result.failed == 0


@pytest.mark.parametrize("name", ["queue", "events"])
def test_the_session_of_a_page(name: str) -> None:
    """The first block of docs/queue.md, and of docs/events.md."""
    result = doctest.testfile(str(ROOT / f"docs/{name}.md"), module_relative=False)
    assert result.attempted > 5
    assert result.failed == 0


def test_the_life_of_a_request() -> None:
    """The block of docs/tree.md, with an allocator."""
    import flatradix

    block = (ROOT / "docs/tree.md").read_text().split("```python\nm = tree.match")[1].split("```")[0]
    code = compile("m = tree.match" + block.replace("\n...\n", "\n"), "docs/tree.md", "exec")

    class Allocator:
        def __init__(self) -> None:
            self.slots = list(range(8))

        def take(self, count: int) -> list[int]:
            taken, self.slots = self.slots[:count], self.slots[count:]
            assert len(taken) == count
            return taken

        def free(self, slots: object) -> None:
            self.slots += [int(slot) for slot in slots]  # type: ignore[attr-defined]

    tree = flatradix.RadixTree(8, device="cpu")
    allocator = Allocator()
    for prompt in ([1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 7, 7, 7, 7, 7, 7], [1, 2, 3]):
        exec(code, {"tree": tree, "prompt": prompt, "allocator": allocator})
        tree.check()
        assert len(allocator.slots) + tree.total_tokens == 8
        assert tree.protected_tokens == 0


@pytest.mark.parametrize("num_slots", [200, 24])
def test_the_engine_of_the_docs(num_slots: int) -> None:
    """The first block of docs/engine.md, with a model that stores tokens as KV and derives the next token from them."""
    block = (ROOT / "docs/engine.md").read_text().split("```python\n")[1].split("```")[0]
    cache = RememberingCache(num_slots, page_size=4, max_requests=8, max_length=64)
    construction, code = block.split("\n\n", 1)
    assert construction.startswith("cache = flatradix.PrefixCache(num_slots, page_size=16")
    memory: dict[int, int] = {}
    computed = 0

    def model(tokens: list[int], at: int, slots: torch.Tensor) -> int:
        nonlocal computed
        computed += len(tokens)
        memory.update(zip(slots[at:].tolist(), list(tokens), strict=True))
        return sum(memory[slot] * place for place, slot in enumerate(slots.tolist(), 1)) % 50

    def alone(prompt: list[int]) -> list[int]:
        told = list(prompt)
        for _ in range(5):
            told.append(sum(token * place for place, token in enumerate(told, 1)) % 50)
        return told[len(prompt) :]

    prompts = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 9], [8, 8]]
    outputs: defaultdict[Any, list[int]] = defaultdict(list)
    names = {"cache": cache, "prompts": prompts, "namespaces": None, "chunk": 3, "max_tokens": 5}
    exec(code, {**names, "outputs": outputs, "newest": {}, "model": model})
    cache.check()
    assert cache.counts().running == 0
    for request, output in outputs.items():
        told = alone(cache.prompts[request])
        assert output == told[: len(output)]
        assert num_slots < 200 or len(output) == 5
    assert len(outputs) == 3
    # All requests begin together, so no request hits. KV is computed for all tokens of an output but the last.
    assert num_slots < 200 or computed == sum(map(len, prompts)) + 3 * 4
