"""Opening files that may be compressed, each kind recognised by its first bytes."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

_CHUNK = 1 << 20


class UnpackError(ValueError):
    """A compressed file that is damaged, or that nothing here can unpack."""


class _Kind(NamedTuple):
    name: str
    magic: bytes
    open: Callable[[BinaryIO], Any]


class _Zstd(io.RawIOBase):
    """The unpacked bytes of a file of zstd frames. A file that is cut short raises UnpackError."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._new = _zstd_decompressor()
        self._frame: Any = None  # the frame that is open
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            data = self._packed.read(_CHUNK)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._rest = self._unpack(data)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def _unpack(self, data: bytes) -> bytes:
        parts = []
        while data:
            self._frame = self._new() if self._frame is None else self._frame
            parts.append(self._frame.decompress(data))
            data = b""
            if self._frame.eof:
                data, self._frame = self._frame.unused_data, None
        return b"".join(parts)


def _zstd_decompressor() -> Callable[[], Any]:
    """Return a function that makes a decompressor of one frame."""
    if sys.version_info >= (3, 14):
        return importlib.import_module("compression.zstd").ZstdDecompressor  # type: ignore[no-any-return]
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise UnpackError(
            "a file packed with zstd needs Python 3.14, or: pip install zstandard. Or unpack the file first: zstd -d"
        ) from None
    return lambda: zstandard.ZstdDecompressor().decompressobj()


_KINDS = (
    _Kind("gzip", b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    _Kind("xz", b"\xfd7zXZ\0", lzma.LZMAFile),
    _Kind("bzip2", b"BZh", bz2.BZ2File),
    _Kind("zstd", b"\x28\xb5\x2f\xfd", lambda file: io.BufferedReader(_Zstd(file), _CHUNK)),
)


class Unpacked:
    """The bytes of a file, line by line, unpacked if the file is compressed. name: the kind, "" if it is not.

    Raises UnpackError while lines are read, if what is compressed is damaged.
    """

    def __init__(self, raw: io.BufferedReader) -> None:
        begin = raw.peek(8)
        kind = next((kind for kind in _KINDS if begin.startswith(kind.magic)), None)
        self.name = "" if kind is None else kind.name
        self._file = raw if kind is None else kind.open(raw)

    def __iter__(self) -> Unpacked:
        return self

    def __next__(self) -> bytes:
        try:
            line: bytes = self._file.readline()
        except Exception as error:
            if self.name and _is_damage(error):
                raise UnpackError(f"the {self.name} data is damaged or cut short ({error})") from None
            raise
        if not line:
            raise StopIteration
        return line


def _is_damage(error: Exception) -> bool:
    """Return whether an error is about compressed data. bz2 raises an OSError, without a number, as gzip does."""
    if isinstance(error, OSError):
        return error.errno is None
    return isinstance(error, EOFError | zlib.error | lzma.LZMAError) or type(error).__name__ == "ZstdError"
