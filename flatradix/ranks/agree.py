"""watch_ranks and assert_ranks_agree: whether all ranks of a process group keep the same tree, and since when not."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as distributed

from flatradix.errors import RanksDifferError
from flatradix.layout.journal import ENTRY, KEPT
from flatradix.ranks.journal import Entry, Journal, signed, watch_cache, watch_tree
from flatradix.ranks.parted import Rank, first_parting
from flatradix.tree import RadixTree

_journals: WeakKeyDictionary[Any, Journal] = WeakKeyDictionary()


class Summary(NamedTuple):
    """What a rank tells first: int64 each. failed: 1 if an error of an earlier call is still to be raised.

    watched: 1 with a journal. knows: 0 if its entries hold the calls alone, 1 if also numbers, 2 if also digests.
    """

    failed: int
    watched: int
    knows: int
    number: int
    by_calls: int
    by_numbers: int
    evictable: int
    protected: int
    nodes: int
    first_digits: int
    last_digits: int


def watch_ranks(target: Any, deep: bool = False) -> None:
    """Record the calls of a tree or of a cache from now on, so that `assert_ranks_agree` can name one.

    target: a RadixTree, a PrefixCache, or the cache of the SGLang backend. On all ranks, watch the same target at the
        same point, when the trees are equal. Of a cache, its own calls are recorded, not those of its tree.
    deep: also record the digest of the tree after each call, which costs O(cached tokens) and waits for a GPU. It finds
        the call after which contents differ that have equal sizes.

    Each call that may change the tree is recorded: its name, its number of queries, and with an index on the CPU the
    clock and the sizes of the tree after it. That takes 0.2 us (bench/RESULTS.md) and never waits for a GPU. Calls that
    only read, and runs of a CUDA graph, are not recorded. The last 4096 calls are kept, in 0.3 MB. Functions that were
    taken from the target before (`evict = tree.evict`) are not watched.

    Raises ValueError for another target, or one that is watched already.
    """
    tree = target if isinstance(target, RadixTree) else getattr(target, "tree", None)
    if not isinstance(tree, RadixTree):
        raise ValueError(f"watch_ranks takes a RadixTree or a cache that has one, not a {type(target).__name__}")
    if target in _journals:
        raise ValueError("this object is watched already")
    tree.raise_pending()
    journal = Journal(tree.index, deep)
    (watch_tree if tree is target else watch_cache)(target, journal)
    _journals[target] = journal


def assert_ranks_agree(target: Any, group: Any = None, digest: bool = False) -> None:
    """Raise RanksDifferError on all ranks unless their trees agree. A collective call: all ranks of the group make it.

    target: as for `watch_ranks`. group: a process group of torch.distributed; None is the default group. digest: also
    compare the digests of the trees, O(cached tokens).

    Compares sizes, and what `watch_ranks` has recorded: the calls between all ranks, and the numbers after each call
    between ranks with the index on the CPU. Without `watch_ranks`, only the trees as they are now can be compared. One
    all_gather of 88 bytes; where ranks differ, a second one of what was recorded. With an index on a GPU it waits for
    the device. A call that raised and has changed nothing does not count; of a cache, no call that raised. Where a GPU
    refused a call whose error was not raised yet, that rank raises this error, and the others raise RanksDifferError.

    The error names the first call after which the ranks differ. If calls and sizes agree and the digests do not, the
    call is not known: watch with `deep`.
    """
    tree: RadixTree = target if isinstance(target, RadixTree) else target.tree
    journal = _journals.get(target)
    pending = _pending(tree)
    told = _gathered(_summary(tree, journal, digest, pending is not None), group)
    ranks = [Summary(*numbers) for numbers in told.tolist()]
    if pending is not None:
        raise pending
    for rank, other in enumerate(ranks):
        if other.failed:
            raise RanksDifferError(f"rank {rank} has an error to raise of an earlier call, and no other rank has")
    if _is_parted(ranks):
        _name_the_call(journal, ranks, group)
    names = {"evictable": "evictable tokens", "protected": "protected tokens", "nodes": "nodes"}
    if all(rank.first_digits or rank.last_digits for rank in ranks):
        names |= {"first_digits": "digests", "last_digits": "digests"}
    for field, name in names.items():
        _compare_now(ranks, field, name)


def _pending(tree: RadixTree) -> Exception | None:
    """Return the error of an earlier call of a GPU, if one is still to be raised: other ranks wait for this one."""
    try:
        tree.raise_pending()
    except Exception as error:
        return error
    return None


def _summary(tree: RadixTree, journal: Journal | None, digest: bool, failed: bool) -> Summary:
    if failed:
        return Summary(1, *[0] * (len(Summary._fields) - 1))
    digits = tree.digest() if digest else "0" * 32
    sizes = tree.evictable_tokens, tree.protected_tokens, tree.num_nodes
    halves = signed(digits[:16]), signed(digits[16:])
    if journal is None:
        return Summary(0, 0, 0, 0, 0, 0, *sizes, *halves)
    knows = 2 if journal.deep else int(journal.knows_numbers)
    return Summary(0, 1, knows, journal.number, *journal.hashes, *sizes, *halves)


def _gathered(numbers: Any, group: Any) -> torch.Tensor:
    """Return the numbers of all ranks, int64 [ranks, ...] in host memory."""
    device = "cuda" if distributed.get_backend(group) == "nccl" else "cpu"
    own = torch.as_tensor(numbers, dtype=torch.int64).to(device)
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(found, own, group)
    return torch.stack(found).cpu()


def _is_parted(ranks: list[Summary]) -> bool:
    """Return whether what was recorded differs: calls between any two ranks, numbers between two that know as much."""
    watched = [rank for rank in ranks if rank.watched]
    by_calls = {(rank.number, rank.by_calls) for rank in watched}
    by_numbers = {(rank.knows, rank.by_numbers) for rank in watched}
    return len(by_calls) > 1 or len(by_numbers) > len({rank.knows for rank in watched})


def _compare_now(ranks: list[Summary], field: str, name: str) -> None:
    """Raise RanksDifferError if the trees differ now in a number, though they were equal after each recorded call."""
    values = [getattr(rank, field) for rank in ranks]
    other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
    if other is None:
        return
    if name == "digests":
        values = [f"{half & (1 << 64) - 1:016x}" for half in values]
    what = f"the trees of ranks 0 and {other} differ: {name} {values[0]} and {values[other]}"
    if all(rank.watched for rank in ranks):
        what += (
            f"; yet the {ranks[0].number} recorded calls agree: keys, slots or priorities differ in one of them, or "
            "what the trees held before, or a CUDA graph ran. watch_ranks(..., deep=True) finds the call"
        )
    else:
        what += "; watch_ranks finds the call after which they do"
    raise RanksDifferError(what)


def _rows_of(journal: Journal | None) -> np.ndarray:
    """Return int64 [1 + KEPT, ENTRY]: the number of the first entry kept, and all that are."""
    rows = np.zeros((1 + KEPT, ENTRY), np.int64)
    if journal is not None:
        first, kept = journal.rows()
        rows[0, 0] = first
        rows[1 : 1 + len(kept)] = kept
    return rows


def _name_the_call(journal: Journal | None, ranks: list[Summary], group: Any) -> NoReturn:
    """Gather all entries, and raise RanksDifferError for the first call after which two ranks differ."""
    found = _gathered(_rows_of(journal), group).tolist()
    watched = []
    for rank, (told, (head, *lines)) in enumerate(zip(ranks, found, strict=True)):
        if told.watched:
            kept = [Entry.of(line) for line in lines[: told.number - head[0]]]
            watched.append(Rank(rank, told.knows, told.number, head[0], kept))
    parting = first_parting(watched)
    assert parting is not None, "hashes of equal entries differ"
    raise RanksDifferError(f"the ranks differ {parting.what}", parting.call, parting.operation)
