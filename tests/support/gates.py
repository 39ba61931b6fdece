"""Gates that stay taken: the thread whose call forgot to open its gate can go on, so no test of one thread sees it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from threading import get_ident
from typing import Any

import pytest

from flatradix.cache.prefix_cache import PrefixCache
from flatradix.events.block_events import BlockEvents
from flatradix.host.paged import PagedIndex
from flatradix.queue.waiting_queue import WaitingQueue
from tests.support.interrupts import Interrupt


def homes() -> list[type]:
    """Return the classes with a gate; without Triton, there is no index on a GPU."""
    found: list[type] = [PagedIndex, BlockEvents, WaitingQueue, PrefixCache]
    if find_spec("triton") is not None:
        from flatradix.device.index import DeviceIndex

        found.append(DeviceIndex)
    return found


def with_gates(kind: type) -> dict[str, Any]:
    """Return the methods of a class that take a gate, by their names."""
    methods = inspect.getmembers(kind, inspect.isfunction)
    return {name: method for name, method in methods if ".busy = me" in inspect.getsource(method.__code__)}


def _checked(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        home = getattr(self, "gate", self)
        within = home.busy == get_ident()
        try:
            result = method(self, *arguments, **keywords)
        except Interrupt:  # perhaps before a bytecode at which CPython interrupts nothing
            raise
        except BaseException:
            assert within or home.busy != get_ident(), f"{method.__qualname__} raised, and its gate is taken"
            raise
        assert within or home.busy != get_ident(), f"{method.__qualname__} returned, and its gate is taken"
        return result

    return call


@contextmanager
def all_checked() -> Iterator[None]:
    """Check the gate behind each call."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in {base for home in homes() for base in home.__mro__ if base.__module__.startswith("flatradix")}:
            for name, method in with_gates(kind).items():
                if name in vars(kind):
                    patch.setattr(kind, name, _checked(method))
        yield
