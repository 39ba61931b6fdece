"""Names: the namespaces of a tree on a GPU. The host learns late whether an insert has stored anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from flatradix.device.input import key_counts, known_counts, numbers_of
from flatradix.inputs import namespaces
from flatradix.inputs.namespaces import Namespaces
from flatradix.layout.queries import PerQuery, Values

NAME_IN_GRAPH = "a CUDA graph cannot hold a namespace: what it is called inside changes as others go"


class Names:
    """Namespace codes as kernels take them: code * 2 + (1 if the caller gave a name).

    known: the names and their codes. given: the codes allocated since the host last waited, which may turn out to be
    unused.
    """

    def __init__(self, codes: int, smallest: int, device: torch.device) -> None:
        """codes: the number of codes that the state can hold. smallest: tokens of the shortest key that is stored."""
        # Names are compared on the host. Only the digest needs hashes on the device, and it copies them there.
        self.known = Namespaces(np.zeros(codes, np.int64))
        self._codes = codes
        self._smallest = smallest
        self._device = device
        self.given: set[int] = set()
        self._unsure = False  # whether a code was given to a key that may store nothing

    def allow(self, codes: int) -> None:
        """Note that the state can hold more codes."""
        self._codes = codes

    def find(self, namespace: Any, batch: int) -> PerQuery:
        """Return the codes of one name, or of a list with one name a query, for a match."""
        if namespace is None:
            return PerQuery(0, 0)
        if not isinstance(namespace, list | tuple):
            namespaces.check(namespace)
            return PerQuery(0, 2 * self.known.find(namespace) + (namespace is not None))
        names = namespaces.spread(namespace, batch)
        return self._packed([self.known.find(name) for name in names], names)

    def give(self, namespace: Any, keys: Values, wait: Callable[[], object]) -> PerQuery:
        """Return the codes of names for an insert. New names get new codes.

        wait: waits for all calls so far and then frees unused codes.
        """
        if namespace is None:
            return PerQuery(0, 0)
        many = isinstance(namespace, list | tuple)
        names = namespaces.spread(namespace, keys.batch) if many else [namespaces.only(namespace)]
        counts = known_counts(keys)
        if len(self.known) + len(names) > self._codes:
            wait()  # refused inserts may hold codes that nothing uses
            if len(self.known) + len(names) > self._codes:
                counts = key_counts(keys)  # more names than pages: only keys that store something get a code
        if counts is not None and not many:
            counts = counts.max(keepdims=True)
        codes = [self._give_one(name, None if counts is None else counts[query]) for query, name in enumerate(names)]
        if many:
            return self._packed(codes, names)
        return PerQuery(0, 2 * codes[0] + (names[0] is not None))

    def _give_one(self, name: namespaces.Namespace, count: int | None) -> int:
        code = self.known.find(name)
        if code < 0 and (count is None or count >= self._smallest):
            code = self.known.give(name)
            self.given.add(code)
            self._unsure |= count is None
        return code

    def _packed(self, codes: Sequence[int], names: Sequence[namespaces.Namespace]) -> PerQuery:
        packed = [2 * code + (name is not None) for code, name in zip(codes, names, strict=True)]
        return numbers_of(np.array(packed, np.int64), self._device)

    def look(self, children: torch.Tensor, refused: bool) -> None:
        """Free the codes that were allocated for inserts which stored nothing. All inserts so far must be done.

        children: `TreeState.namespace_children`. refused: whether one of these inserts may have been refused.
        """
        if (refused or self._unsure) and self.given:
            codes = sorted(self.given)
            # A batch that did not fit may have been given codes beyond the array.
            places = torch.tensor(codes, device="cpu").clamp(max=len(children) - 1).to(children.device)
            found = np.zeros(max(codes) + 1, np.int64)
            found[codes] = children[places].cpu().numpy()
            found[len(children) :] = 0
            self.known.forget(codes, found)
        self.nothing_given()

    def forget_empty(self, children: torch.Tensor) -> None:
        """Free the codes of names in which nothing is cached any more. All calls so far must be done.

        children: as for `look`.
        """
        if len(self.known) > 1:
            codes = [code for code, _name in self.known.items()]
            found = children[: codes[-1] + 1].cpu().numpy()
            if any(code and (code >= len(found) or found[code] == 0) for code in codes):
                self.known.repair(found)
        self.nothing_given()

    def doubt(self) -> None:
        """Have the next `look` free the codes that no node uses."""
        self._unsure = True

    def nothing_given(self) -> None:
        self.given = set()
        self._unsure = False
