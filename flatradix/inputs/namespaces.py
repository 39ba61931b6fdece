"""Namespaces: small integer codes for names. A name keeps its code only while something is cached in it."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from flatradix.errors import QueryError
from flatradix.layout import numbers

Namespace = str | bytes | int | None
Key = str | int | tuple[bytes] | None
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1


def check(name: Any, query: int = 0, where: str = "") -> None:
    """Raise QueryError unless `name` is None, a str, bytes or an integer of 64 bits."""
    if name is None or isinstance(name, str | bytes):
        return
    if isinstance(name, bool) or not isinstance(name, int | np.integer):
        raise QueryError(
            f"the namespace{where} is a {type(name).__name__}; it must be None, a str, bytes or an integer", query
        )
    if not _LOWEST <= name <= _HIGHEST:
        raise QueryError(f"the namespace{where} is {name}, which does not fit 64 bits", query)


def key_of(name: Namespace) -> Key:
    """Return what stands for a name in a dictionary. The keys of 1, "1" and b"1" are unequal, and can be compared.

    `python -bb` forbids to compare bytes with a str, which a dictionary does if their hashes are equal.
    """
    kind = type(name)
    if kind is str or kind is int or name is None:
        return name  # type: ignore[return-value]
    if isinstance(name, bytes):
        return (bytes(name),)
    return str.__str__(name) if isinstance(name, str) else int(name)


def name_of(key: Key) -> Namespace:
    """Return the name of a key of `key_of`."""
    return key[0] if isinstance(key, tuple) else key


def name_hash(name: Namespace) -> int:
    """Return a signed hash of 64 bits of a name, for the digest. 1, "1" and b"1" differ."""
    if name is None:
        data = b"n"
    elif isinstance(name, str):
        data = b"s" + name.encode("utf-8", "surrogatepass")
    elif isinstance(name, int):
        data = b"i" + name.to_bytes(8, "little", signed=True)
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
        return self._codes.get(key_of(name), numbers.UNKNOWN_NAMESPACE)

    def give(self, name: Namespace) -> int:
        """Return the code of a name. Allocate one if it has none.

        The code may lie beyond `hashes`: the insert is then refused for lack of capacity.
        """
        key = key_of(name)
        code = self._codes.get(key)
        if code is None:
            code = heapq.heappop(self._free) if self._free else len(self._names)
            self._note(code, name_of(key))
            self.version += 1
            self._codes[key] = code
        return code

    def _note(self, code: int, name: Namespace) -> None:
        self._names[code] = name
        if code < len(self._hashes):
            self._hashes[code] = name_hash(name)

    def move_to(self, hashes: np.ndarray) -> None:
        """Use a longer array of hashes, to which the present ones have been copied. May be called again."""
        for key, code in self._codes.items():
            if code >= len(self._hashes):
                hashes[code] = name_hash(name_of(key))
        self._hashes = hashes

    def take_back(self, code: int) -> None:
        """Free the code of an empty namespace."""
        self.version += 1
        del self._codes[key_of(self._names[code])]
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
            key: code for key, code in self._codes.items() if code == 0 or (code < len(children) and children[code])
        }
        self._set([(code, name_of(key)) for key, code in codes.items()])

    def _set(self, items: Iterable[tuple[int, Namespace]]) -> None:
        names = dict(items)
        self.version += 1
        self._codes = {key_of(name): code for code, name in names.items()}
        self._names = names
        self._free = [code for code in range(max(names)) if code not in names]

    def name(self, code: int) -> Namespace:
        return self._names[code]

    def __len__(self) -> int:
        """Return the number of names in use, including None."""
        return len(self._codes)

    def items(self) -> list[tuple[int, Namespace]]:
        return sorted((code, name_of(key)) for key, code in self._codes.items())

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
