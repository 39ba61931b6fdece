"""The measurements that need a process of their own; `bench.cpu` starts it. Prints one number."""

from __future__ import annotations

import resource
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch

PAGE = 64
EDGE, EDGES = 131072, 61
LEAF, LEAVES = 64, 1_000_000


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _tree(side: str, capacity: int) -> Any:
    if side == "theirs":
        from bench.support import sglang_trees

        tree = sglang_trees.RustTree(PAGE)
        tree.allocator.keep = False
        return tree
    from flatradix import RadixTree

    return RadixTree(capacity, PAGE, device="cpu")


def _growth(side: str, keys: int, tokens: int) -> float:
    """Resident bytes a key of that many tokens, over `keys` of them, the tree itself included."""
    key = array("q", np.random.default_rng(0).integers(0, 128_000, tokens).tobytes())
    slots = torch.arange(tokens)
    warm = _tree(side, tokens)
    warm.insert(key, slots)
    warm.evict(tokens)
    before = _resident()
    tree = _tree(side, keys * tokens)
    for number in range(keys):
        key[0], key[1] = number % 128_000, number // 128_000
        tree.insert(key, slots)
    return (_resident() - before) / keys


def _compile() -> float:
    """Seconds until every operation has run once, compiled from nothing."""
    start = time.perf_counter()
    import flatradix

    flatradix.warm_up("cpu")
    return time.perf_counter() - start


def _first_match() -> float:
    """Seconds from the import of flatradix, torch being there, to the first result."""
    start = time.perf_counter()
    from flatradix import RadixTree

    tree = RadixTree(1_000_000, device="cpu")
    assert tree.match([1, 2, 3]).length == 0
    return time.perf_counter() - start


def main(what: str, side: str = "ours") -> None:
    torch.set_num_threads(1)
    if what == "bytes-token":
        print(_growth(side, EDGES, EDGE) / EDGE)
    elif what == "bytes-node":
        print(_growth(side, LEAVES, LEAF))
    elif what == "compile":
        print(_compile())
    elif what == "first-match":
        print(_first_match())


if __name__ == "__main__":
    main(*sys.argv[1:])
