"""Rows: wall-clock time, from Python, of the calls of a scheduler."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from bench.support.gpu_harness import (
    Measured,
    Row,
    Setup,
    Shape,
    assert_lengths,
    cached_sets,
    insert_edges,
    random_keys,
    slots_for,
    wall_seconds,
)
from flatradix import RadixTree, Ragged

KEYS = 16
INSERTS = 256


def _single_keys(setup: Setup, shape: Shape) -> tuple[RadixTree, list[np.ndarray]]:
    """Return a tree, and keys that it caches, as int64 arrays in host memory."""
    keys = random_keys(setup.device, 2 if setup.tiny else KEYS, shape.tokens)
    tree = setup.tree(2 * keys.numel())
    insert_edges(tree, keys, shape.edges)
    singles = list(keys.cpu().numpy().astype(np.int64))
    for key in singles:
        assert tree.match(key).length == shape.tokens
    return tree, singles


def _match_one(tokens: int, edges: int, setup: Setup) -> Measured:
    tree, keys = _single_keys(setup, setup.shape(1, tokens, edges))
    calls = [lambda key=key: tree.match(key).length for key in keys]
    return Measured(wall_seconds(setup, calls), None)


def _match_resident(copied: bool, setup: Setup) -> Measured:
    """Measure matches to lengths on the host. copied: by torch, from the device."""
    tree, _, queries = cached_sets(setup, setup.shape(1024, 4096, 8))
    if copied:
        return Measured(wall_seconds(setup, [lambda q=q: tree.match(q).lengths.cpu() for q in queries]), None)
    return Measured(wall_seconds(setup, [lambda q=q: tree.match(q).host_lengths for q in queries]), None)


def _pinned(setup: Setup, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().pin_memory() if setup.on_gpu else tensor.cpu()


def _match_pinned(setup: Setup) -> Measured:
    """Measure matches of queries in pinned memory. The floor is the transfer alone."""
    shape = setup.shape(1024, 4096, 8)
    tree, _, resident = cached_sets(setup, shape)
    queries = [Ragged(_pinned(setup, q.values), _pinned(setup, q.offsets)) for q in resident]
    for query in queries:
        assert_lengths(tree.match(query).lengths, shape.tokens)

    def transfer(query: Ragged) -> None:
        kept = [part.to(setup.device, non_blocking=True) for part in (query.values, query.offsets)]
        if setup.on_gpu:
            torch.cuda.synchronize()
        del kept

    alone = wall_seconds(setup, [partial(transfer, q) for q in queries])
    taken = wall_seconds(setup, [lambda q=q: tree.match(q).host_lengths for q in queries])
    return Measured(taken, alone, f"{taken / alone:.2f} x the transfer alone")


def _lock_one(done: bool, setup: Setup) -> Measured:
    tree, keys = _single_keys(setup, setup.shape(1, 4096, 8))
    place = tree.match(keys[0])
    tree.lock(place)
    assert tree.protected_tokens == place.length
    tree.unlock(place)
    assert tree.protected_tokens == 0

    def lock_and_unlock() -> None:
        tree.lock(place)
        tree.unlock(place)
        if done:
            tree.raise_pending()

    return Measured(wall_seconds(setup, [lock_and_unlock], tree.raise_pending), None)


def _insert_one(setup: Setup) -> Measured:
    """Measure inserts after a locked path, with tokens in host memory and slots on the device."""
    context, tail = setup.shape(1, 4096, 8), setup.shape(1, 512, 1).tokens
    count = 3 if setup.tiny else INSERTS
    tree = setup.tree(2 * (context.tokens + count * tail))
    key = random_keys(setup.device, 1, context.tokens)
    insert_edges(tree, key, context.edges)
    start = tree.match(key[0].cpu().numpy().astype(np.int64), lock=True)
    tails = random_keys(setup.device, count, tail, seed=2)
    slots = slots_for(tails, context.tokens)
    new = [(one, own) for one, own in zip(tails.cpu().numpy().astype(np.int64), slots, strict=True)]
    first = tree.insert(*new[0], start=start)
    assert (first.prefix_length, first.length) == (context.tokens, context.tokens + tail)
    calls = [lambda pair=pair: tree.insert(*pair, start=start).prefix_length for pair in new[1:]]
    taken = wall_seconds(setup, calls, once=True)
    stored = tree.total_tokens - context.tokens - tail
    assert stored > 0
    assert stored % tail == 0
    return Measured(taken, None)


def _total_tokens(after_match: bool, setup: Setup) -> Measured:
    shape = setup.shape(1, 4096, 8)
    tree, keys = _single_keys(setup, shape)
    assert tree.total_tokens == len(keys) * shape.tokens
    if after_match:
        return Measured(
            wall_seconds(setup, [lambda key=key: (tree.match(key), tree.total_tokens) for key in keys]), None
        )
    return Measured(wall_seconds(setup, [lambda: tree.total_tokens], lambda: tree.match(keys[0]).length), None)


def _row(name: str, work: str, target: float | None, measure: object, relative: bool = False) -> Row:
    return Row(name, work, target, measure, "wall", relative)  # type: ignore[arg-type]


ROWS = [
    _row("wall-match-1x128", "match 1 x 128, numpy int64, to its length", 11, partial(_match_one, 128, 1)),
    _row("wall-match-1x4096", "match 1 x 4096, 8 edges, numpy int64, to its length", 20, partial(_match_one, 4096, 8)),
    _row(
        "wall-match-resident", "match 1024 x 4096 on the device, to host_lengths", 32, partial(_match_resident, False)
    ),
    _row(
        "wall-match-copied", "match 1024 x 4096 on the device, to lengths.cpu()", None, partial(_match_resident, True)
    ),
    _row("wall-match-pinned", "match 1024 x 4096 in pinned memory, the same", 1.3, _match_pinned, True),
    _row("wall-lock", "lock and unlock of one path of 8 edges, enqueued", 8, partial(_lock_one, False)),
    _row("wall-lock-done", "lock and unlock of one path of 8 edges, done", None, partial(_lock_one, True)),
    _row("wall-insert", "insert 512 tokens behind 4096 with start=, to prefix_length", 45, _insert_one),
    _row("wall-total", "read total_tokens, nothing pending", None, partial(_total_tokens, False)),
    _row("wall-match-total", "match 1 x 4096, then read total_tokens", None, partial(_total_tokens, True)),
]
