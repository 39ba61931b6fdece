"""The measurements that need a process of their own; `bench/cpu.py` starts it. Prints one number."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

PAGE = 64
EDGE, EDGES = 131072, 61
LEAF, LEAVES = 64, 1_000_000


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _growth(side: str, keys: int, tokens: int) -> float:
    """Resident bytes a key of that many tokens, over `keys` of them, in a tree that has been used before."""
    tree: Any
    if side == "theirs":
        from bench.peers import sglang

        tree = sglang.RustTree(PAGE)
        tree.allocator.keep = False
    else:
        from flatradix import RadixTree

        tree = RadixTree(keys * tokens, PAGE, device="cpu")
    key = array("q", np.random.default_rng(0).integers(0, 128_000, tokens).tobytes())
    slots = torch.arange(tokens)
    tree.insert(key, slots)
    tree.evict(tokens)
    before = _resident()
    for number in range(keys):
        key[0], key[1] = number % 128_000, number // 128_000
        tree.insert(key, slots)
    return (_resident() - before) / keys


def _use(tree: Any, folder: str) -> None:
    """Every public operation, with one query and with several, of narrow and of wide tokens."""
    wide, narrow = torch.arange(8), torch.arange(100, 108, dtype=torch.int32)
    for key in (wide, narrow):
        one = tree.insert(key, key, namespace="a")
        tree.lock(one)
        tree.unlock(one)
        tail = key[-1:].repeat(4) if tree.bigram else key[:4]
        tree.insert(tail, tail, start=one)
        tree.match(key[:5], lock=True)
        both = tree.insert([key, key[:4]], [key, key[:4]], priority=[1, 2])
        tree.lock(both)
        tree.unlock(both)
        tree.slots(tree.match([key, key[:3]], touch=False))
        tree.match([tail], start=one)
    tree.digest()
    tree.check()
    tree.save(f"{folder}/tree")
    type(tree).load(f"{folder}/tree", device="cpu", policy=tree.policy if callable(tree.policy) else None)
    tree.evict(8)
    tree.reset()


def _fragment(tree: Any) -> None:
    """Leave no free range long enough for the last insert, so that the pool is compacted. `tree` holds 4096 tokens."""
    for number in range(0, 4096, 4):
        held = tree.insert([number] * 4, range(4))
        if number % 8:
            tree.lock(held)
    tree.evict(4096)
    tree.insert([1] * 2048, range(2048))


def _compile() -> float:
    """Seconds until every operation has run once, compiled from nothing."""
    start = time.perf_counter()
    from flatradix import RadixTree

    with tempfile.TemporaryDirectory() as folder:
        for policy in ("lru", "mru"):
            _use(RadixTree(4096, device="cpu", policy=policy), folder)
        _use(RadixTree(4096, device="cpu", bigram=True), folder)
        _use(RadixTree(4096, device="cpu", slot_dtype=torch.int64), folder)
        _fragment(RadixTree(4096, device="cpu"))
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
