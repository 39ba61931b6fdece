"""SGLang's hashes of cached pages, as its KV events carry them.

SGLang's Python functions compile a C++ extension at their first call: in a server that would be during a request, for
up to a minute, and without a compiler or OpenSSL's headers the scheduler would end. SGLang's default tree computes the
hashes in its own core. Here hashlib does.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np


def page_hashes(key: Any, page_size: int, before: str | None) -> list[str]:
    """Return the hash of each page of a key, in hex.

    key: SGLang's RadixKey of whole pages with token ids below 2**32; bigrams are pairs of ids. before: the hash of the
    page before the key, None at the start of a prompt.
    """
    digest = bytes.fromhex(before) if before else _start(key.cache_salt)
    count = len(key)
    tokens = np.array(key.token_ids[: count + key.is_bigram], np.int64).astype("<u4")
    if key.is_bigram:
        tokens = np.stack([tokens[:-1], tokens[1:]], axis=1)
    data = tokens.tobytes()
    step = len(data) // count * page_size if count else 1
    hashes = []
    for start in range(0, len(data), step):
        digest = hashlib.sha256(digest + data[start : start + step]).digest()
        hashes.append(digest.hex())
    return hashes


def _start(cache_salt: str | None) -> bytes:
    """Return what stands before the first page. An extra key without a salt is not hashed."""
    if cache_salt is None:
        return b""
    return hashlib.sha256(b"sglang-cache-salt-v1\0" + cache_salt.encode()).digest()
