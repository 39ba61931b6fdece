"""Keeping the machine code of kernels on disk for later processes. A disk that refuses never stops a call.

numba's own cache needs a folder that it may write to, stops at a damaged file, and knows the source of the kernel's own
file alone. Here, the sources of all kernels decide which files fit, each file has a checksum, and each process compiles
what cannot be kept, with one warning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import sys
import uuid
from collections.abc import Callable
from importlib import resources
from typing import Any

import llvmlite
import numba
from numba.core import config
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs

_CHECKSUM = 16
_logger = logging.getLogger("flatradix")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM).digest()


def _sources(package: str, folder: str = "") -> list[bytes]:
    """Return the files of a package or of a folder in it, which may lie in a zip file, or without its sources."""
    home = resources.files(package).joinpath(*folder.split("/")) if folder else resources.files(package)
    files = [file for file in home.iterdir() if file.name.endswith((".py", ".pyc"))]
    return [file.read_bytes() for file in sorted(files, key=lambda file: file.name)]


def _stamp() -> str:
    """Return a digest of everything that goes into a kernel: its own file, its helpers, and the compiler."""
    versions = [sys.version.encode(), numba.__version__.encode(), llvmlite.__version__.encode()]
    native = _sources(str(__package__).partition(".")[0], "kernels/native")  # a package that imports this module
    parts = [*versions, *_sources(str(__package__)), *native, *_sources("flatradix.layout")]
    return _digest(b"".join(map(_digest, parts))).hex()


_STAMP = _stamp()


@functools.cache
def _folders(home: str) -> tuple[str, ...]:
    """Return where the code of kernels in the folder `home` may lie. Like numba's cache, it is saved to the first."""
    wanted: str = config.CACHE_DIR  # type: ignore[attr-defined]
    found = [os.path.join(wanted, "flatradix")] if wanted else []
    if os.path.isdir(home):  # not in a zip file
        found.append(os.path.join(home, "__pycache__"))
    users = AppDirs(appname="numba", appauthor=False).user_cache_dir
    if os.path.isabs(users):  # a "~" stays where the user has no home
        found.append(os.path.join(users, "flatradix"))
    return tuple(found)


@functools.cache
def _warn_once() -> None:
    _logger.warning(
        "compiled kernels cannot be kept on disk, so each process compiles them anew, for a minute or two: "
        "set NUMBA_CACHE_DIR to a folder that can be written and has 50 MB of space"
    )


def _write(path: str, content: bytes) -> bool:
    """Write a file in one step, so that no other process reads a part of it. Return whether it could be written."""
    aside = f"{path}.tmp.{uuid.uuid4().hex[:16]}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(aside, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        return False
    return True


class _Kept:
    """The machine code of one kernel on disk, with the methods that numba wants of a cache.

    A file holds the code for one list of argument types and one kind of CPU: a checksum, and pickled (key, code).
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        code = function.__code__
        self._folders = _folders(os.path.dirname(os.path.abspath(code.co_filename)))
        self._base = f"{function.__module__.rpartition('.')[2]}.{function.__name__}-{code.co_firstlineno}-{_STAMP}"
        self._enabled = True

    @property
    def cache_path(self) -> str | None:
        return self._folders[0] if self._folders else None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Do nothing: files of other sources are never read."""

    def _paths(self, key: Any) -> list[str]:
        name = f"{self._base}.{_digest(repr(key).encode()).hex()}.nbc"
        return [os.path.join(folder, name) for folder in self._folders]

    def load_overload(self, types: Any, context: Any) -> CompileResult | None:
        """Return the code for these argument types, or None if there is none, or none that is whole."""
        context.refresh()
        key = types, context.codegen().magic_tuple()
        for path in self._paths(key) if self._enabled else ():
            try:
                with open(path, "rb") as file:
                    checksum, content = file.read(_CHECKSUM), file.read()
            except OSError:
                continue
            if checksum == _digest(content):
                found, code = pickle.loads(content)
                if found == key:
                    return CompileResult._rebuild(context, *code)
        return None

    def save_overload(self, types: Any, compiled: CompileResult) -> None:
        """Write to the first folder that takes the file; a damaged file of the same name is replaced."""
        if self._enabled:
            key = types, compiled.codegen.magic_tuple()
            content = dumps((key, compiled._reduce()))
            if not any(_write(path, _digest(content) + content) for path in self._paths(key)):
                _warn_once()


def keep(dispatcher: Any) -> None:
    """Let a dispatcher of numba look for its machine code on disk, and keep there what it compiles."""
    dispatcher._cache = _Kept(dispatcher.py_func)
