"""A router that follows KV events."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Router:
    """A router's index: the hash of each block, and how often the block is cached.

    Outside Dynamo's format SGLang does not hash the extra key: a prompt has equal hashes under different extra keys.
    """

    def __init__(self) -> None:
        self.blocks: Counter[int] = Counter()
        self.cleared = 0

    def follow(self, events: list[Any]) -> None:
        for event in events:
            kind = type(event).__name__
            if kind == "AllBlocksCleared":
                self.blocks.clear()
                self.cleared += 1
            elif kind == "BlockRemoved":
                assert all(self.blocks[block] > 0 for block in event.block_hashes)
                self.blocks -= Counter(event.block_hashes)
            else:
                assert event.parent_block_hash is None or self.blocks[event.parent_block_hash] > 0
                self.blocks += Counter(event.block_hashes)


def blocks(events: list[Any]) -> list[Any]:
    """Return the events block by block: SGLang's own trees differ in how they group neighbouring blocks."""
    found: list[Any] = []
    for event in events:
        kind = type(event).__name__
        if kind == "BlockRemoved":
            found.extend((kind, block, event.medium) for block in event.block_hashes)
        elif kind == "BlockStored":
            size, parent = event.block_size, event.parent_block_hash
            for number, block in enumerate(event.block_hashes):
                tokens = event.token_ids[number * size : (number + 1) * size]
                found.append((kind, block, parent, tokens, size, event.medium, event.cache_salt, event.lora_name))
                parent = block
        else:
            found.append(kind)
    return found
