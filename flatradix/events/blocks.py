"""Blocks, and the hashes that name them unless the caller has hashes of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flatradix.inputs.namespaces import Namespace, name_hash

Hash = int | bytes | str
HashFunction = Callable[[Any, np.ndarray], Hash]
RootFunction = Callable[[Namespace], Any]


class Block(NamedTuple):
    """A cached block: `block_size` units of a key, behind all blocks before it.

    hash: names the block and, as it is chained, its whole prefix. parent_hash: of the block before; None for the first.
    tokens: int32 of numpy [block_size], with bigrams [block_size + 1]. namespace: as the keys were inserted with.
    """

    hash: Hash
    parent_hash: Hash | None
    tokens: np.ndarray
    namespace: Namespace


def root_hash(namespace: Namespace) -> int:
    """Return the parent of the first blocks of a namespace: an integer of 64 bits, other for 1, "1" and b"1".

    It is BLAKE2b with 8 bytes of digest, as an integer without sign, little-endian, of these bytes: "n" for None; "s"
    and the UTF-8 of a str; "b" and the bytes; "i" and the 8 bytes of a signed integer, little-endian.
    """
    return name_hash(namespace) & (2**64 - 1)


def chain_hash(parent: int, tokens: np.ndarray) -> int:
    """Return the hash of a block, an integer of 64 bits. parent: the hash of the block before, or a `root_hash`.

    It is BLAKE2b with 8 bytes of digest, as an integer without sign, little-endian, of the 8 bytes of `parent` in the
    same form, and of the tokens as int32, little-endian.
    """
    data = parent.to_bytes(8, "little") + tokens.astype("<i4", copy=False).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def block_hashes(
    tokens: Any, block_size: int, namespace: Namespace = None, hash: HashFunction = chain_hash,
    root: RootFunction = root_hash, bigram: bool = False,
) -> list[Hash]:  # fmt: skip
    """Return the hashes of the full blocks of a prompt, for a router that looks up how much of it a server has cached.

    tokens: a sequence of token ids. block_size, hash, root: as the BlockEvents of the server have them; namespace and
    bigram as its tree. O(tokens).
    """
    key = np.asarray(tokens, np.int32)
    parent, found = root(namespace), []
    for at in range(0, len(key) - bigram - block_size + 1, block_size):
        parent = hash(parent, key[at : at + block_size + bigram])
        found.append(parent)
    return found
