"""The interpreter session of the README runs, and says what it says there."""

from __future__ import annotations

import doctest
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_interpreter_session() -> None:
    session = README.read_text().split("```python\n>>>")[1].split("```")[0]
    test = doctest.DocTestParser().get_doctest(">>>" + session, {}, "README.md", str(README), 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted >= 8
    assert result.failed == 0


def test_the_life_of_a_request() -> None:
    """The block under "How to embed it", with an allocator."""
    import flatradix

    block = README.read_text().split("```python\nm = tree.match")[1].split("```")[0]
    code = compile("m = tree.match" + block.replace("\n...\n", "\n"), "README.md", "exec")

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
