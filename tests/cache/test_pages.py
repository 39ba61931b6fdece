"""PrefixCache beside a cache of hashed blocks, as vLLM and nano-vllm have: it finds at least as much."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from random import Random

import pytest

from flatradix import PrefixCache


class BlockCache:
    """Blocks by the hash of their prefix. A block that no request uses waits in the order of its last use."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.unnamed = blocks  # blocks that hold nothing
        self.idle: OrderedDict[int, None] = OrderedDict()  # the next to be taken first

    def names(self, tokens: list[int]) -> Iterator[int]:
        """Return the names of the full blocks: each depends on all tokens up to its end."""
        name = 0
        for end in range(self.size, len(tokens) + 1, self.size):
            name = hash((name, tuple(tokens[end - self.size : end])))
            yield name

    def take(self, blocks: int) -> None:
        for _ in range(blocks):
            if self.unnamed:
                self.unnamed -= 1
            else:
                self.idle.popitem(last=False)

    def serve(self, prompt: list[int], output: list[int]) -> int:
        """Run a request; return how many tokens of its prompt were cached. The last is always computed."""
        found = []
        for name in self.names(prompt[:-1]):
            if name not in self.idle:
                break
            found.append(name)
        for name in found:
            del self.idle[name]
        every = prompt + output
        self.take(-(-len(every) // self.size) - len(found))
        names = list(self.names(every[:-1]))  # the KV of the last token is never computed
        doubles = [name for name in names if self.idle.pop(name, 1) is None]
        self.unnamed += len(doubles) + -(-len(every) // self.size) - len(names)
        for name in reversed(names):  # the end of the request goes first
            self.idle[name] = None
        return len(found) * self.size


def conversations(count: int, tokens: int, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield prompts and outputs: conversations that go on, all behind one of three instructions."""
    random = Random(seed)

    def words(most: int) -> list[int]:
        return [random.randrange(50_000) for _ in range(random.randint(1, most))]

    instructions = [words(tokens // 4) for _ in range(3)]
    live: list[list[int]] = []
    for _ in range(count):
        if len(live) < 12 or random.random() < 0.2:
            live.append(random.choice(instructions) + words(tokens // 8))
        chosen = random.randrange(max(0, len(live) - 12), len(live))
        output = words(tokens // 8)
        yield list(live[chosen]), output
        live[chosen] += output + words(tokens // 8)
        if len(live[chosen]) > 2 * tokens:
            del live[chosen]


@pytest.mark.parametrize(("blocks", "size"), [(200, 256), (1500, 16)])
def test_as_many_hits_as_a_block_cache(blocks: int, size: int) -> None:
    ours = {by: PrefixCache(blocks * size, size, 1, blocks * size, evict_by=by) for by in ("page", "node")}
    rival = BlockCache(blocks, size)
    theirs = 0
    for prompt, output in conversations(400, blocks * size // 4, seed=blocks):
        theirs += rival.serve(prompt, output)
        for cache in ours.values():
            (request,) = cache.begin([prompt])
            cache.extend([request], len(output))
            cache.finish([request], request.num_tokens + len(output) - 1, [output])
    hits = {by: cache.counts().cached_tokens for by, cache in ours.items()}
    assert hits["page"] >= theirs > hits["node"] > 0
    assert ours["page"].counts().evicted_tokens > blocks * size
    for cache in ours.values():
        cache.check()
