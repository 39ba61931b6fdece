"""Named arrays in one file, in the layout of safetensors: a header of JSON, the raw arrays, and a checksum at the end.

safetensors (https://github.com/huggingface/safetensors) opens these files too. flatradix writes and reads them itself:
the library has no checksum and no fsync, reads text beside the arrays only from a path, and copies all arrays once
more. `read_arrays` takes exactly what `write_arrays` writes, byte for byte, and holds the file once in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

CHECKSUM = "sha256"  # the last array: of all bytes before it
DTYPES: dict[str, np.dtype] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "U8": np.dtype("u1")}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MOST_HEADER = 1 << 16
_CHUNK = 1 << 22

# Name, dtype and length of each array, in the order of the file.
Fields = list[tuple[str, np.dtype, int]]


class NotArrays(ValueError):
    """The file does not begin as `write_arrays` begins it. `head`: its first bytes."""

    def __init__(self, head: bytes) -> None:
        super().__init__("it does not begin with a header of flatradix")
        self.head = head

    def __reduce__(self) -> tuple[type[NotArrays], tuple[bytes]]:
        return type(self), (self.head,)


def _begin(kind: str) -> bytes:
    """Return the first bytes of the JSON for the format `kind VERSION`, up to the version."""
    return b'{"__metadata__":{"format":"' + kind.encode()


def _header(form: str, text: str, fields: Fields) -> bytes:
    """Return all bytes before the arrays. form: the format; text: what the file says beside the arrays."""
    described: dict[str, Any] = {"__metadata__": {"format": form, "text": text}}
    at = 0
    for name, dtype, count in [*fields, (CHECKSUM, DTYPES["U8"], hashlib.sha256().digest_size)]:
        end = at + count * dtype.itemsize
        described[name] = {"dtype": _CODES[dtype], "shape": [count], "data_offsets": [at, end]}
        at = end
    data = json.dumps(described, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)  # so that arrays in a mapped file are aligned
    return struct.pack("<Q", len(data)) + data


class _Hash:
    """A checksum in a second thread, so that the disk need not wait for it."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread
        self._hash = hashlib.sha256()
        self._last: Future[Any] = thread.submit(int)

    def add(self, data: Any) -> None:
        """Add bytes, which must stay unchanged until the next call. Waits until the bytes before are added."""
        self._last.result()
        self._last = self._thread.submit(self._hash.update, data)

    def digest(self) -> bytes:
        self._last.result()
        return self._hash.digest()


@contextmanager
def _hashing() -> Iterator[_Hash]:
    with ThreadPoolExecutor(1) as thread:
        yield _Hash(thread)


def write_arrays(file: IO[bytes], form: str, text: str, arrays: dict[str, np.ndarray]) -> None:
    """Write one-dimensional arrays to a binary file, wide dtypes first. O(bytes)."""
    ordered = sorted(arrays.items(), key=lambda item: -item[1].itemsize)
    parts = {name: np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for name, array in ordered}
    fields = [(name, part.dtype, len(part)) for name, part in parts.items()]
    with _hashing() as checksum:
        for part in (np.frombuffer(_header(form, text, fields), np.uint8), *parts.values()):
            data = part.view(np.uint8).data
            checksum.add(data)
            _write_all(file, data)
        _write_all(file, memoryview(checksum.digest()))


def _write_all(file: IO[bytes], data: memoryview) -> None:
    """Write bytes to a file that may take fewer at a time, as an unbuffered file does."""
    while len(data):
        taken = file.write(data)
        data = data[len(data) if taken is None else taken :]


def read_head(file: IO[bytes], kind: str) -> tuple[bytes, str]:
    """Read up to the version of the format `kind VERSION`. Return the bytes read, and the format.

    Raises NotArrays if the file does not begin so.
    """
    begin = _begin(kind)
    head = _read_at_most(file, 8 + len(begin) + 16)
    form, quote, _ = head[8 + len(begin) - len(kind.encode()) :].partition(b'"')
    if head[8 : 8 + len(begin)] != begin or not quote:
        raise NotArrays(head)
    return head, form.decode("latin-1")


def read_arrays(file: IO[bytes], head: bytes, whole: bool) -> tuple[str, dict[str, np.ndarray]]:
    """Read what `write_arrays` wrote. Return the text beside the arrays, and the arrays, which may be written to.

    head: what `read_head` has read. whole: whether the file must end there. Takes no memory for arrays that the file
    does not have, where the file tells its size. Raises ValueError with the reason if any byte is not as written.
    """
    (size,) = struct.unpack("<Q", head[:8])
    if size > _MOST_HEADER:
        raise ValueError(f"its header has {size} bytes")
    header = head + _read_at_most(file, 8 + size - len(head))
    form, text, fields = _read_header(header[8 : 8 + size])
    if header != _header(form, text, fields):
        raise ValueError("its header is not as flatradix writes it")
    total = sum(count * dtype.itemsize for _, dtype, count in fields)
    left = _bytes_left(file)
    wanted = total + hashlib.sha256().digest_size
    if left is not None and (left < wanted or (whole and left > wanted)):
        raise ValueError(f"it has {len(header) + left} bytes and should have {len(header) + wanted}")
    data = _read_checked(file, header, total)
    return text, _split(data, fields)


def _read_header(data: bytes) -> tuple[str, str, Fields]:
    """Return format, text and fields of the JSON in a header. Only their types are checked."""
    try:
        described = json.loads(data)
        about = described.pop("__metadata__")
        del described[CHECKSUM]
        form, text = str(about["format"]), str(about["text"])
        fields = [(name, DTYPES[of["dtype"]], of["shape"][0]) for name, of in described.items()]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({error!r})") from None
    if not all(type(count) is int and 0 <= count < 2**31 for _, _, count in fields):
        raise ValueError("its header gives an array an impossible length")
    return form, text, fields


def _bytes_left(file: IO[bytes]) -> int | None:
    """Return how many bytes follow in a file, or None if it cannot tell."""
    try:
        at = file.tell()
        end = file.seek(0, io.SEEK_END)
        file.seek(at)
    except (OSError, ValueError, AttributeError):
        return None
    return end - at


def _read_at_most(file: IO[bytes], count: int) -> bytes:
    """Read `count` bytes, or fewer where the file ends."""
    found = b""
    while len(found) < count and (more := file.read(count - len(found))):
        found += more
    return found


def _read_checked(file: IO[bytes], header: bytes, total: int) -> np.ndarray:
    """Read `total` bytes and the checksum behind them. Return uint8 [total]."""
    data = np.empty(total, np.uint8)
    at = 0
    with _hashing() as checksum:
        checksum.add(header)
        while at < total:
            part = _read_at_most(file, min(_CHUNK, total - at))
            if not part:
                raise ValueError(f"it ends {total - at} bytes before its checksum")
            checksum.add(part)
            data[at : at + len(part)] = np.frombuffer(part, np.uint8)
            at += len(part)
        found = checksum.digest()
    if _read_at_most(file, len(found)) != found:
        raise ValueError("its content does not have the checksum that stands at its end")
    return data


def _split(data: np.ndarray, fields: Fields) -> dict[str, np.ndarray]:
    arrays, at = {}, 0
    for name, dtype, count in fields:
        end = at + count * dtype.itemsize
        arrays[name] = data[at:end].view(dtype).astype(dtype.newbyteorder("="), copy=False)
        at = end
    return arrays
