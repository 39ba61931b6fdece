"""The measurements that need a fresh process, which `bench.cpu` starts. Prints one number."""

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
    """Return the resident memory of this process, in bytes."""
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
    """Insert `keys` keys of `tokens` tokens; return the resident bytes for each key, the tree itself included."""
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
    """Return the seconds of import and warm-up. With an empty numba cache, the warm-up compiles every kernel."""
    start = time.perf_counter()
    import flatradix

    flatradix.warm_up("cpu")
    return time.perf_counter() - start


def _first_match() -> float:
    """Return the seconds from the import of flatradix to the first result; torch is imported before."""
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
