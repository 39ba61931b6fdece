"""Namespaces: small integer codes for names. A name keeps its code only while something is cached in it."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flatradix.errors import QueryError
from flatradix.layout import numbers

Namespace = str | bytes | None


def check(name: Any, query: int = 0, where: str = "") -> None:
    """Raise QueryError unless `name` is None, a str or bytes."""
    if not (name is None or isinstance(name, str | bytes)):
        raise QueryError(f"the namespace{where} is a {type(name).__name__}; it must be None, a str or bytes", query)


def name_hash(name: Namespace) -> int:
    """Return a signed hash of 64 bits of a name, for the digest. "a" and b"a" differ."""
    if name is None:
        data = b"n"
    elif isinstance(name, str):
        data = b"s" + name.encode("utf-8", "surrogatepass")
    else:
        data = b"b" + name
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class Namespaces:
    """The codes of the names in use. Code 0 is always None. Other codes are allocated, and freed when they are empty.

    The lowest free code is allocated first, so the codes of cached names stay below the number of pages.
    Names are compared, never their hashes: namespaces are a security boundary.

    version: a number that is different after each change. Only `_codes` and `version` are valid after an interrupted
    call: `repair` rebuilds the other fields from `_codes`.
    """

    def __init__(self, hashes: np.ndarray) -> None:
        """hashes: int64 [N], the state's own array. `name_hash` of each allocated code is written to it."""
        self._hashes = hashes
        self.version = 0
        self.clear()

    def find(self, name: Namespace) -> int:
        """Return the code of a name, or UNKNOWN_NAMESPACE if nothing is cached in it."""
        return self._codes.get(name, numbers.UNKNOWN_NAMESPACE)

    def give(self, name: Namespace) -> int:
        """Return the code of a name. Allocate one if it has none.

        The code may lie beyond `hashes`: the insert is then refused for lack of capacity.
        """
        code = self._codes.get(name)
        if code is None:
            code = heapq.heappop(self._free) if self._free else len(self._names)
            self._note(code, name)
            self.version += 1
            self._codes[name] = code
        return code

    def _note(self, code: int, name: Namespace) -> None:
        self._names[code] = name
        if code < len(self._hashes):
            self._hashes[code] = name_hash(name)

    def move_to(self, hashes: np.ndarray) -> None:
        """Use a longer array of hashes, to which the present ones have been copied. May be called again."""
        for name, code in self._codes.items():
            if code >= len(self._hashes):
                hashes[code] = name_hash(name)
        self._hashes = hashes

    def take_back(self, code: int) -> None:
        """Free the code of an empty namespace."""
        self.version += 1
        del self._codes[self._names[code]]
        del self._names[code]
        heapq.heappush(self._free, code)

    def forget(self, codes: Iterable[int], children: np.ndarray) -> None:
        """Free those of `codes` that are in use and have no child. A code may be given more than once.

        children: int [N], the number of children of each code.
        """
        for code in codes:
            if code in self._names and (code >= len(children) or children[code] == 0):
                self.take_back(code)

    def repair(self, children: np.ndarray) -> None:
        """Free the code of every namespace without a child, and rebuild the other fields from the names that are left.

        children: int [N], the number of children of each code.
        """
        codes = {
            name: code for name, code in self._codes.items() if code == 0 or (code < len(children) and children[code])
        }
        self._set([(code, name) for name, code in codes.items()])

    def _set(self, items: Iterable[tuple[int, Namespace]]) -> None:
        names = dict(items)
        self.version += 1
        self._codes = {name: code for code, name in names.items()}
        self._names = names
        self._free = [code for code in range(max(names)) if code not in names]

    def name(self, code: int) -> Namespace:
        return self._names[code]

    def __len__(self) -> int:
        """Return the number of names in use, including None."""
        return len(self._codes)

    def items(self) -> list[tuple[int, Namespace]]:
        return sorted((code, name) for name, code in self._codes.items())

    def restore(self, items: Iterable[tuple[int, Namespace]]) -> None:
        """Replace all names and codes by those of another tree."""
        self._set(items)
        for code, name in self.items():
            self._note(code, name)

    def clear(self) -> None:
        self._set([(numbers.NO_NAMESPACE, None)])
        self._note(numbers.NO_NAMESPACE, None)


def only(namespace: Any) -> Namespace:
    """Return the name of a single query, checked."""
    if isinstance(namespace, list | tuple):
        return spread(namespace, 1)[0]
    check(namespace)
    return namespace


def spread(namespace: Any, queries: int) -> Sequence[Namespace]:
    """Return one name a query, checked. namespace: one name for all, or a list with one for each."""
    if isinstance(namespace, list | tuple):
        if len(namespace) != queries:
            raise ValueError(f"{len(namespace)} namespaces for {queries} queries; give one, or one a query")
        for query, name in enumerate(namespace):
            check(name, query, f" of query {query}")
        return namespace
    check(namespace)
    return [namespace] * queries
