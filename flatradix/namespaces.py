"""Namespaces: names to small codes, held only while something of theirs is cached."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np

from flatradix import meta

Namespace = str | bytes | None


def check(name: Any, query: int | None = None) -> None:
    if not (name is None or isinstance(name, str | bytes)):
        where = "" if query is None else f" of query {query}"
        raise ValueError(f"the namespace{where} is a {type(name).__name__}; it must be None, a str or bytes")


def name_hash(name: Namespace) -> int:
    """64 bits of a name for the digest, signed; "a" and b"a" differ."""
    if name is None:
        data = b"n"
    elif isinstance(name, str):
        data = b"s" + name.encode("utf-8", "surrogatepass")
    else:
        data = b"b" + name
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class Namespaces:
    """The codes of the names in use. Code 0 is None, for ever; others are given out, and taken back when empty.

    The lowest free code goes first, so that the codes of names that are cached stay below the number of pages.
    Names are compared, never their hashes: namespaces are a security boundary.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        """hashes: int64 [N], filled with `name_hash` for each code given out; writable, the state's own."""
        self._hashes = hashes
        self._codes: dict[Namespace, int] = {}
        self._names: dict[int, Namespace] = {}
        self._free: list[int] = []
        self._put(None, meta.NO_NAMESPACE)

    def _put(self, name: Namespace, code: int) -> None:
        self._codes[name] = code
        self._names[code] = name
        if code < len(self._hashes):
            self._hashes[code] = name_hash(name)

    def find(self, name: Namespace) -> int:
        """The code of a name, UNKNOWN_NAMESPACE if nothing of it is cached."""
        return self._codes.get(name, meta.UNKNOWN_NAMESPACE)

    def give(self, name: Namespace) -> int:
        """The code of a name, a new one if it has none. The insert fails for want of room if it is beyond the array."""
        code = self._codes.get(name)
        if code is None:
            code = heapq.heappop(self._free) if self._free else len(self._names)
            self._put(name, code)
        return code

    def take_back(self, code: int) -> None:
        """Forget an empty namespace."""
        del self._codes[self._names.pop(code)]
        heapq.heappush(self._free, code)

    def name(self, code: int) -> Namespace:
        return self._names[code]

    def __len__(self) -> int:
        """Names in use, None among them."""
        return len(self._names)

    def items(self) -> list[tuple[int, Namespace]]:
        return sorted(self._names.items())

    def restore(self, items: list[tuple[int, Namespace]]) -> None:
        for code, name in items:
            self._put(name, code)
        used = set(self._names)
        self._free = [code for code in range(max(used)) if code not in used]

    def clear(self) -> None:
        self._codes.clear()
        self._names.clear()
        self._free.clear()
        self._put(None, meta.NO_NAMESPACE)


def only(namespace: Any) -> Namespace:
    """The name of a single query."""
    if isinstance(namespace, list | tuple):
        return spread(namespace, 1)[0]
    check(namespace)
    return namespace


def spread(namespace: Any, queries: int) -> Sequence[Namespace]:
    """One name a query: `namespace` is one for all, or a list with one for each."""
    if isinstance(namespace, list | tuple):
        if len(namespace) != queries:
            raise ValueError(f"{len(namespace)} namespaces for {queries} queries; give one, or one a query")
        for query, name in enumerate(namespace):
            check(name, query)
        return namespace
    check(namespace)
    return [namespace] * queries
