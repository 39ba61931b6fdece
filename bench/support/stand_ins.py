"""Stand-ins for packages that other code imports and never runs.

A stand-in may be a name, a base class or a decorator. It raises when its truth value is used.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterable, Sequence
from typing import Any


def missing(names: Iterable[str]) -> list[str]:
    """Return the packages of `names` that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


class _StandInType(type):
    """The class of every attribute of a stand-in module: usable only as a name, a base class or a decorator."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **_: Any) -> _StandInType:
        return super().__new__(cls, name, bases, body)

    def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any], **_: Any) -> None:
        super().__init__(name, bases, body)

    def __getattr__(cls, name: str) -> _StandInType:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandInType(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *_: Any, **__: Any) -> _StandInType:
        return cls

    def __getitem__(cls, _: Any) -> _StandInType:
        return cls

    def __or__(cls, _: Any) -> _StandInType:
        return cls

    __ror__ = __or__

    def __bool__(cls) -> bool:
        raise TypeError(f"the stand-in {cls.__name__} was used by SGLang: it should have been the real thing")


class _StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> _StandInType:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandInType(name, (), {"__module__": self.__name__})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An import hook that makes a stand-in for each module of `roots` and below them.

    It is active in a `with` block, or from `install` to the end of the process.
    """

    def __init__(self, roots: Iterable[str]) -> None:
        self._roots = set(roots)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        parts = name.split(".")
        if any(".".join(parts[:end]) in self._roots for end in range(1, len(parts) + 1)):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass

    def install(self) -> None:
        sys.meta_path.insert(0, self)

    def __enter__(self) -> StandIns:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandInModule)]:
            del sys.modules[name]
